"""Models named on a command line: ``transformers:gpt2``, ``timm:resnet50``, ``file.py:make``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lateinit.errors import SpecError, candidates

Build = Callable[[], nn.Module]
_FORMS = (
    "transformers:MODEL_TYPE, transformers:path/to/config.json, timm:NAME, torchvision:NAME, "
    "package.module:callable or path/to/file.py:callable"
)


def load_spec(spec: str, kwargs: Mapping[str, Any] | None = None) -> Build:
    """Find the model that a specification names, without building it.

    Args:
        spec: one of the following.
            - ``transformers:MODEL_TYPE``: the default configuration, as a causal language model if
              there is one, else as the bare model; ``transformers:MODEL_TYPE:CLASS`` names a class.
            - ``transformers:PATH``: a ``config.json`` or its folder; the class is the one under
              ``architectures``.
            - ``timm:NAME`` and ``torchvision:NAME``, without pretrained weights.
            - ``package.module:callable`` and ``path/file.py:callable``.
        kwargs: arguments of the callable; for transformers, attributes of the configuration to set.

    Returns:
        A function that builds the model, anew at each call. It raises ``SpecError`` if the result
        is no module.

    Raises:
        SpecError: the specification names no model, or ``kwargs`` do not fit it.

    Example:
        >>> from lateinit._integrations import model_specs
        >>> build = model_specs.load_spec("torch.nn:Linear", {"in_features": 4, "out_features": 2})
        >>> build()
        Linear(in_features=4, out_features=2, bias=True)
    """
    given = dict(kwargs or {})
    where, colon, what = spec.partition(":")
    if not colon or not where or not what:
        raise SpecError(f"{spec!r} names no model: write {_FORMS}")
    if where in _LIBRARIES:
        return _LIBRARIES[where](what, given)
    where, _, what = spec.rpartition(":")
    is_file = where.endswith(".py") or "/" in where
    module = _from_file(Path(where)) if is_file else _import(where, spec)
    return _calling(_attribute(module, what, spec), given, spec)


def path_named(argument: str) -> Path | None:
    """The file or folder that an argument names; None if the argument is a specification.

    An argument that exists as a path is one, even with a colon in its name.

    Raises:
        SpecError: the argument neither exists as a path nor has the colon of a specification.
    """
    if os.path.exists(argument):  # noqa: PTH110 - False for a name that no file can have, too
        return Path(argument)
    if ":" not in argument:
        raise SpecError(
            f"there is no file or folder {argument!r}, and it names no model: write {_FORMS}"
        )
    return None


def parse_kwargs(text: str | None, option: str = "--kwargs") -> dict[str, Any]:
    """Parse keyword arguments from a JSON object on the command line.

    Args:
        text: the JSON text, or None for no arguments.
        option: the name of the option, for messages.

    Raises:
        SpecError: the text is no JSON object.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{option} is no JSON: {error}. Write an object in quotes, as in "
            """'{"hidden_size": 64}'"""
        ) from error
    if not isinstance(found, dict):
        raise SpecError(f"{option} must be a JSON object of names and values, not {text}")
    return found


# -- callables -----------------------------------------------------------------------------------


def _import(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists; a module that it imports does not
        raise SpecError(
            f"{spec!r}: there is no module {error.name!r} on the import path. Write {_FORMS}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = candidates(path.name, (p.name for p in path.parent.glob("*.py")))
        raise SpecError(f"there is no file {path}" + (f"; there are: {near}" if near else ""))
    name = path.stem
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise SpecError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    # As for a script: the file can import its neighbours, and instances of its classes can be
    # pickled.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, path: str, spec: str) -> Callable[..., Any]:
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            public = (n for n, v in vars(found).items() if callable(v) and not n.startswith("_"))
            raise SpecError(
                f"{spec!r}: {getattr(found, '__name__', found)} has no {name!r}; "
                f"it has: {candidates(name, public) or 'nothing to call'}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise SpecError(f"{spec!r} is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def _calling(make: Callable[..., Any], kwargs: dict[str, Any], spec: str) -> Build:
    """A function that makes the model; arguments are checked now, against the signature if any."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # builtins have none
        signature = None
    if signature is not None:
        try:
            signature.bind(**kwargs)
        except TypeError as error:
            raise SpecError(
                f"{spec!r} cannot be called with {kwargs or 'no arguments'}: {error}; it takes "
                f"{signature}. Give its arguments as --kwargs (JSON)"
            ) from error

    def build() -> nn.Module:
        model = make(**kwargs)
        if not isinstance(model, nn.Module):
            raise SpecError(f"{spec!r} gave a {type(model).__name__} and not an nn.Module")
        return model

    return build


# -- libraries -----------------------------------------------------------------------------------


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise SpecError(
            f"{name}: models need the package {name}, which is not installed: pip install {name}"
        ) from error


def _timm(name: str, kwargs: dict[str, Any]) -> Build:
    timm = _library("timm")
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}; near: {candidates(name, timm.list_models())}")
    return _calling(
        lambda **given: timm.create_model(name, pretrained=False, **given), kwargs, f"timm:{name}"
    )


def _torchvision(name: str, kwargs: dict[str, Any]) -> Build:
    models = _library("torchvision").models
    if name not in (names := models.list_models()):
        raise SpecError(f"torchvision has no model {name!r}; near: {candidates(name, names)}")
    builder = models.get_model_builder(name)
    # Builders of models with a backbone download the backbone's weights by default
    # (`weights_backbone`).
    unweighted = ("weights", "weights_backbone")
    given = {k: None for k in unweighted if k in inspect.signature(builder).parameters} | kwargs
    return _calling(builder, given, f"torchvision:{name}")


def _transformers(what: str, kwargs: dict[str, Any]) -> Build:
    _library("transformers")
    from lateinit._integrations import transformers_models  # noqa: PLC0415 - imports transformers

    return transformers_models.load_transformers(what, kwargs)


_LIBRARIES: dict[str, Callable[[str, dict[str, Any]], Build]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
