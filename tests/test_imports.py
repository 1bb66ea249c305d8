"""What importing does. Which room may import which is checked by import-linter."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lateinit
from tests.support.sweep import part_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(lateinit.__file__).parent

OPTIONAL = {
    *("timm", "torchvision", "transformers", "lateinit._integrations.transformers_models"),
    "plotly.offline",
    # It takes long, and is there where it is needed.
    "torch._functorch",
    "lateinit._checkpoint.save.sharded",  # torch.distributed.checkpoint
    "torch.distributed.checkpoint.filesystem",
}
NOT_AT_IMPORT = (
    "transformers",
    "timm",
    "torchvision",
    "accelerate",
    "plotly",
    "torch._dynamo",
    "typer",
)


def module_of(path: Path) -> str:
    """``recorder`` or ``lazy.mixin``; a package is named by its folder, the root by nothing."""
    parts = [part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"]
    return ".".join(parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement, and the full name of what it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                known = full.removeprefix("lateinit.") in FILES
                yield node, full if known else str(node.module)


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FILES)
def test_functions_import_only_what_is_optional(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    top = {id(node) for node in tree.body}
    for block in tree.body:  # `if TYPE_CHECKING:` and `try:` stand at the top too
        if isinstance(block, (ast.If, ast.Try)):
            top |= {id(node) for node in ast.walk(block)}
    inner = {full for node, full in imports(tree) if id(node) not in top}
    assert inner <= OPTIONAL


# Under an empty `lateinit`, or its `__init__` would have imported every module before. A fresh
# interpreter for each would take minutes; a fork of one that has torch takes none.
ALONE = """
import importlib, os, sys, types
import numpy, rich.console, rich.progress, rich.table, safetensors, torch, typer
for name in {names!r}:
    child = os.fork()
    if child == 0:
        try:
            if name != "lateinit":
                empty = sys.modules["lateinit"] = types.ModuleType("lateinit")
                empty.__path__ = [{package!r}]
            importlib.import_module(name)
        except BaseException as error:
            print(f"{{name}}: {{type(error).__name__}}: {{error}}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each module")
def test_each_module_can_be_imported_alone() -> None:
    # One runs, the other needs transformers.
    skipped = {"__main__", "_integrations.transformers_models"}
    names = [f"lateinit.{name}".rstrip(".") for name in FILES if name not in skipped]
    names = part_of(names, 0, 3)
    assert run(ALONE.format(names=names, package=str(PACKAGE))) == ""


def test_no_module_draws_from_a_random_generator_when_it_is_imported() -> None:
    names = sorted(f"lateinit.{name}".rstrip(".") for name in FILES if name != "__main__")
    script = f"""
        import importlib, random
        import numpy, torch
        def states():
            numbers = torch.get_rng_state().tolist()
            return str([random.getstate(), numbers, numpy.random.get_state()])
        before = states()
        for name in {names}:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:  # an optional library that is not here
                assert not error.name.startswith(("lateinit", "torch", "rich")), error
            assert states() == before, name
    """
    run(script)


def test_importing_does_not_import_what_is_optional_or_slow() -> None:
    script = f"""
        import sys
        import torch
        before = set(sys.modules)
        import lateinit
        assert not [name for name in {NOT_AT_IMPORT} if name in set(sys.modules) - before]
        with lateinit.deferred():
            layer = torch.nn.Linear(2, 2)
        lateinit.materialize(layer)
        print([name for name in {NOT_AT_IMPORT} if name in set(sys.modules) - before])
    """
    assert run(script) == "[]\n"


def test_type_checkers_see_each_public_name_where_it_is_imported_from() -> None:
    seen = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "typing.TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                for alias in statement.names:
                    full = f"{statement.module}.{alias.name}"
                    seen[alias.name] = (
                        full
                        if full in ("lateinit.init", "lateinit.nn", "lateinit.pfn_extras")
                        else (str(statement.module))
                    )
    assert seen == lateinit._MODULES
    assert sorted([*seen, "errors"]) == lateinit.__all__


@pytest.mark.parametrize(
    "statement",
    [
        "import lateinit",
        "import lateinit.errors; lateinit.errors.LateinitError",
        "from lateinit import errors",
        "import lateinit; lateinit.__version__, dir(lateinit)",
        "import lateinit; assert not hasattr(lateinit, 'materialise')",
    ],
)
def test_torch_is_not_imported_before_a_name_needs_it(statement: str) -> None:
    run(f"import sys; {statement}; assert 'torch' not in sys.modules")


def test_no_module_is_imported_in_a_block() -> None:
    script = """
        import sys
        import torch
        import lateinit
        block = lateinit.deferred()
        before = set(sys.modules)
        with block:
            layers = lateinit.nn.LazyLinear(3), lateinit.pfn_extras.LazyLinear(None, 2)
            net = torch.nn.Sequential(*layers)
            lateinit.infer_shapes(net, torch.ones(2, 4))
            lateinit.materialize(torch.nn.Linear(2, 2))
        print([name for name in set(sys.modules) - before if name.startswith("lateinit")])
    """
    assert run(script) == "[]\n"


def test_importing_the_names_is_no_op_of_any_mode() -> None:
    script = """
        import torch
        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                assert func is torch.device, func
                return func(*args, **(kwargs or {}))

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                raise AssertionError(func)

        import lateinit
        with Functions(), Ops():
            lateinit.plan
    """
    run(script)


def test_many_threads_may_use_the_first_name() -> None:
    script = """
        import threading
        import lateinit
        found, start = [], threading.Barrier(16)

        def use(name):
            start.wait()
            found.append(getattr(lateinit, name) is not None)

        names = [lateinit.__all__[i % len(lateinit.__all__)] for i in range(16)]
        threads = [threading.Thread(target=use, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(found), all(found))
    """
    assert run(script) == "16 True\n"


def test_a_pickle_is_read_where_lateinit_was_not_used_before(tmp_path: Path) -> None:
    write = f"""
        import pickle, torch, lateinit
        torch.manual_seed(0)
        model = lateinit.deferred_init(torch.nn.Linear, 2, 2)
        pickle.dump((model, lateinit.materialize), open({str(tmp_path / "model")!r}, "wb"))
    """
    read = f"""
        import pickle, torch
        model, materialize = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
        torch.manual_seed(0)
        print(torch.equal(torch.nn.Linear(2, 2).weight, materialize(model).weight))
    """
    run(write)
    assert run(read) == "True\n"


UNCHANGED = """
import types
import torch
from torch import nn

OWNERS = (
    torch, torch.random, nn, nn.init, nn.Module, nn.Parameter, nn.Linear, nn.LazyLinear,
    torch.Tensor, torch.Generator, torch.UntypedStorage, nn.modules.module, nn.parameter,
    nn.modules.lazy, torch.overrides, torch.serialization, torch.utils._python_dispatch,
)

def looks():
    return [
        {key: id(value) for key, value in vars(owner).items()
         if not isinstance(value, types.ModuleType) and key != "__warningregistry__"}
        for owner in OWNERS
    ]

def hooks():
    return [
        len(getattr(nn.modules.module, name)) for name in vars(nn.modules.module)
        if name.startswith("_global_") and hasattr(getattr(nn.modules.module, name), "__len__")
    ]

nn.Linear(2, 2)
before, hooked = looks(), hooks()

def check(when):
    for owner, was, now in zip(OWNERS, before, looks(), strict=True):
        for key in was.keys() | now.keys():
            assert was.get(key) == now.get(key), f"{when}: {owner.__name__}.{key}"
    assert hooked == hooks(), when

import lateinit
check("after the import")
with lateinit.deferred():
    layer = nn.Linear(2, 2)
    assert nn.Parameter.__new__ is not None
check("after a block")
try:
    with lateinit.deferred():
        with lateinit.deferred():
            raise KeyError
except KeyError:
    pass
check("after an exception in a block")
lateinit.materialize(layer)
check("after materialising")
lateinit.skip_init(nn.Linear, 2, 2)
lazy = nn.Sequential(lateinit.nn.LazyLinear(2))
lateinit.infer_shapes(lazy, torch.ones(1, 3))
check("after inferring shapes")
"""


def test_nothing_of_torch_is_changed_by_importing_or_by_a_block() -> None:
    run(UNCHANGED)
