"""The public face: what there is, in what order, and that each part explains itself."""

from __future__ import annotations

import inspect
import pickle
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lateinit

# Adding to the public face is one line here, on purpose.
PUBLIC = [
    "deferred",
    "deferred_init",
    "discard",
    "errors",
    "infer_shapes",
    "init",
    "is_deferred",
    "lazy",
    "load_checkpoint",
    "materialize",
    "nn",
    "pfn_extras",
    "plan",
    "save_checkpoint",
    "settle_rng",
    "size",
    "skip_init",
    "summary",
]
MODULES = [name for name in PUBLIC if isinstance(getattr(lateinit, name), ModuleType)]
OBJECTS = [name for name in PUBLIC if name not in MODULES]

ERRORS = {
    "CheckpointError": ValueError,
    "ConstantChangedError": RuntimeError,
    "CorruptCheckpointError": ValueError,
    "DeferredTensorError": RuntimeError,
    "DeviceError": RuntimeError,
    "InitError": ValueError,
    "MaterializeError": RuntimeError,
    "MismatchError": ValueError,
    "NeedsValuesError": RuntimeError,
    "NotRecordedError": RuntimeError,
    "OutOfMemoryError": MemoryError,
    "ShardingError": RuntimeError,
    "OutputError": OSError,
    "OutputExistsError": FileExistsError,
    "PatternError": ValueError,
    "RecordingError": RuntimeError,
    "RuleError": TypeError,
    "SeedError": ValueError,
    "ShapeError": ValueError,
    "SpecError": ValueError,
    "UninitializedError": RuntimeError,
    "UnreachedError": RuntimeError,
}


def public(name: str) -> Any:
    return getattr(lateinit, name)


def test_public_names_are_these() -> None:
    assert lateinit.__all__ == PUBLIC


def test_public_names_are_sorted() -> None:
    assert sorted(lateinit.__all__) == lateinit.__all__


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from lateinit import *", names)
    assert sorted(names.keys() - {"__builtins__"}) == PUBLIC


def test_nothing_else_looks_public() -> None:
    others = [
        name
        for name, thing in vars(lateinit).items()
        if not name.startswith("_") and name not in PUBLIC and not isinstance(thing, ModuleType)
    ]
    assert not others


@pytest.mark.parametrize("name", MODULES)
def test_names_of_a_public_module_exist_and_are_sorted(name: str) -> None:
    module = public(name)
    assert module.__doc__
    if name != "errors":
        assert sorted(module.__all__) == module.__all__
        assert all(hasattr(module, each) for each in module.__all__)


@pytest.mark.parametrize("name", OBJECTS)
def test_public_object_says_what_it_is_with_an_example(name: str) -> None:
    text = inspect.getdoc(public(name)) or ""
    first, _, rest = text.partition("\n")
    assert first.endswith((".", "?"))
    assert len(first) <= 100
    assert "Example:" in rest
    assert ">>> " in rest.partition("Example:")[2]


@pytest.mark.parametrize("name", OBJECTS)
def test_arguments_of_a_public_function_are_explained(name: str) -> None:
    text = inspect.getdoc(public(name)) or ""
    parameters = inspect.signature(public(name)).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(named) > 2:
        explained = set(re.findall(r"^ +(\w+):", text, re.MULTILINE))
        assert [name for name in named if name not in explained] == []


@pytest.mark.parametrize("name", ["materialize", "plan", "summary", "save_checkpoint", "deferred"])
def test_options_come_by_keyword_only(name: str) -> None:
    parameters = list(inspect.signature(public(name)).parameters.values())
    options = [p for p in parameters if p.default is not p.empty]
    assert options
    assert all(p.kind is p.KEYWORD_ONLY for p in options)


def test_errors_are_one_tree_and_builtins_too() -> None:
    found = {
        name: thing
        for name, thing in vars(lateinit.errors).items()
        if inspect.isclass(thing) and issubclass(thing, lateinit.errors.LateinitError)
    }
    assert found.keys() - {"LateinitError"} == ERRORS.keys()
    for name, builtin in ERRORS.items():
        assert issubclass(found[name], builtin), name
        assert found[name].__doc__, name


def test_what_a_strict_load_of_torch_raises_is_raised_too() -> None:
    assert issubclass(lateinit.errors.MismatchError, RuntimeError)


def test_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = re.findall(r"\+-- (\w+) +\((\w+)[\w, ]*\)", lateinit.errors.__doc__ or "")
    assert dict(drawn) == {name: builtin.__name__ for name, builtin in ERRORS.items()}


@pytest.mark.parametrize("name", ERRORS)
def test_error_can_be_pickled(name: str) -> None:
    error = getattr(lateinit.errors, name)("what happened")
    loaded = pickle.loads(pickle.dumps(error))
    assert type(loaded) is type(error)
    assert str(loaded) == str(error) == "what happened"


def test_version_is_that_of_the_project() -> None:
    try:
        installed = metadata.version("lateinit")
    except metadata.PackageNotFoundError:
        return
    assert installed == lateinit.__version__


def test_package_says_that_it_is_typed() -> None:
    assert (Path(lateinit.__file__).parent / "py.typed").is_file()
