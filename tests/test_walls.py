"""``lateinit._torch`` is the only door to what torch keeps private, and each export is tested."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lateinit

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(lateinit.__file__).parent
DOOR = PACKAGE / "_torch"
CONTRACT = Path(__file__).parent / "torch_contract"
MODULES = sorted(path for path in DOOR.glob("*.py") if path.stem != "__init__")

FRAMES = {"_getframe", "f_back", "f_locals", "f_code", "f_globals", "currentframe"}
FRAME_FUNCTIONS = {"inspect.stack", "inspect.trace", "sys._current_frames"}


def is_private(name: str) -> bool:
    return any(p.startswith("_") and not p.endswith("__") for p in name.split("."))


def of_torch(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] == "torch"


def imported(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, str]]:
    """Every import: the statement, the name that it binds if any, and the full name of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                yield node, alias.asname or root, alias.name if alias.asname else root
                yield node, "", alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, alias.asname or alias.name, f"{node.module}.{alias.name}"


def chain(node: ast.expr) -> tuple[str, list[str]]:
    """``torch.a(1).b[2].c`` as its root, where that is a name, and the attributes after it."""
    parts: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return "", parts
    return node.id, parts


def asked_by_name(node: ast.AST) -> tuple[ast.expr, str] | None:
    """The object and the attribute of ``getattr(torch.nn, "_private")`` and the like."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    ):
        return node.args[0], str(node.args[1].value)
    return None


def looks_inside_torch(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the text of whatever uses a private name of torch."""
    names: dict[str, str] = {}
    for statement, name, full in imported(tree):
        if of_torch(full):
            names.update({name: full} if name else {})
            if is_private(full):
                yield statement.lineno, full
    for node in ast.walk(tree):
        asked = asked_by_name(node)
        if isinstance(node, ast.Attribute):
            root, parts = chain(node)
        elif asked is not None:
            root, parts = chain(asked[0])
            parts = [*parts, asked[1]]
        else:
            root, parts = "", []
        if parts and (parts[-1] == "_cdata" or (root in names and is_private(parts[-1]))):
            yield node.lineno, ".".join([names.get(root, root), *parts])
        if isinstance(node, ast.Constant) and "torch._" in str(node.value):
            yield node.lineno, str(node.value)


def looks_at_frames(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the text of whatever looks at Python frames."""
    for statement, _, full in imported(tree):
        if full in FRAME_FUNCTIONS or full.split(".")[-1] in FRAMES:
            yield statement.lineno, full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, parts = chain(node)
            if node.attr in FRAMES or ".".join([root, *parts]) in FRAME_FUNCTIONS:
                yield node.lineno, ".".join([root, *parts])


def exports(tree: ast.Module) -> Iterator[str]:
    """The public names that a module makes at its top, but for names of types."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made = [node.name]
        elif isinstance(getattr(node, "value", None), ast.Subscript):
            made = []
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            made = []
        yield from (name for name in made if not name.startswith("_"))


def used_in_tests(tree: ast.Module) -> set[str]:
    """The names that the test functions of a file use, and the classes and helpers beside them."""
    used: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return used


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def places(path: Path, found: Iterator[tuple[int, str]]) -> list[str]:
    return [f"{path.relative_to(PACKAGE)}:{line}: {text}" for line, text in found]


def test_no_other_room_looks_inside_torch() -> None:
    outside = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in ("_torch", "_integrations")
    ]
    assert outside
    assert [p for path in outside for p in places(path, looks_inside_torch(parsed(path)))] == []


def test_two_files_look_at_frames() -> None:
    files = {path for path in PACKAGE.rglob("*.py") if places(path, looks_at_frames(parsed(path)))}
    assert files == {DOOR / "callers.py", DOOR / "frames.py"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_every_export_has_a_contract_test(module: Path) -> None:
    tests = CONTRACT / f"test_{module.stem}.py"
    assert set(exports(parsed(module))) - used_in_tests(parsed(tests)) == set()


def test_every_contract_says_what_torch_does_and_where() -> None:
    silent = [
        f"{path.stem}.{node.name}"
        for path in sorted(CONTRACT.glob("test_*.py"))
        for node in parsed(path).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not (ast.get_docstring(node) or "").strip()
    ]
    assert silent == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._set_grad_enabled(True)",
        "import torch as t\nt.ones(1)[0]._version",
        "import torch.nn.functional as F\nF._pad",
        "from torch import Tensor\nTensor._make_subclass",
        "from torch import nn\nnn.Module()._modules",
        "from torch import nn\ngetattr(nn.init, '_no_grad_fill_')",
        "from torch._C import Tag",
        "from torch.nn.modules.module import _global_forward_hooks",
        "import torch.utils._pytree",
        "import torch.utils._pytree as pytree",
        "def f(x): return x.storage._cdata",
        "name = 'torch._utils'",
    ],
)
def test_looking_inside_torch_is_seen(source: str) -> None:
    assert list(looks_inside_torch(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.__future__.get_overwrite_module_params_on_conversion()",
        "import torch\ntorch.ones(1).add_(1).__class__",
        "class A:\n    def f(self): return self._own",
        "from lateinit import _torch\n_torch.modes._private",
        "import pytorch._C",
        "def f(x): return getattr(x, '_own', None)",
    ],
)
def test_what_is_public_or_our_own_is_let_through(source: str) -> None:
    assert not list(looks_inside_torch(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys._getframe(1)",
        "from sys import _getframe",
        "import inspect\ninspect.stack()",
        "from inspect import currentframe as here",
        "def f(error): return error.tb_frame.f_back.f_locals",
    ],
)
def test_looking_at_frames_is_seen(source: str) -> None:
    assert list(looks_at_frames(ast.parse(source)))
