"""Initialisers as data: the functions of ``torch.nn.init`` with their arguments.

``init=`` also takes the name of a function of ``torch.nn.init``, the function itself, a
``functools.partial`` of it, and any function that initialises a tensor in place.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lateinit._tensors.name_maps import NameMap
from lateinit.errors import InitError, candidates

Rule = Callable[[Tensor], Any]
InitValue = str | Callable[..., Any] | Mapping[str, Any]
Init = Mapping[str, InitValue]


@dataclass(frozen=True)
class Initialiser:
    """A function of ``torch.nn.init`` with its arguments; call it with a tensor.

    Attributes:
        name: the name of the function, without the final underscore.
        arguments: the arguments that differ from the defaults, by name, in the function's order.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, tensor: Tensor) -> Tensor:
        """Initialise a tensor in place, and return it."""
        result: Tensor = getattr(nn.init, f"{self.name}_")(tensor, **dict(self.arguments))
        return result

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{self.name}({shown})"


def initialiser(name: str, *args: Any, **kwargs: Any) -> Initialiser:
    """The initialiser of ``torch.nn.init`` with this name and these arguments.

    Raises:
        InitError: there is no such function, or it does not take these arguments.
    """
    name = name.removesuffix("_")
    signature = _signatures().get(name)
    if signature is None:
        raise InitError(
            f"{name!r} is no initialiser of torch.nn.init; there are: "
            f"{candidates(name, _signatures())}"
        )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InitError(f"{name}: {error}; it takes {signature}") from error
    if bound.arguments.get("generator") is not None:
        raise InitError(f"{name}: a rule draws from a generator of its own; leave generator= out")
    defaults = signature.parameters
    given = {k: v for k, v in bound.arguments.items() if v != defaults[k].default}
    given.pop("generator", None)
    return Initialiser(name, tuple(given.items()))


@functools.cache
def _signatures() -> dict[str, inspect.Signature]:
    """The signatures, without the tensor, of the in-place functions of ``torch.nn.init``."""
    found = {}
    for name, function in vars(nn.init).items():
        if name.endswith("_") and not name.startswith("_") and inspect.isfunction(function):
            signature = inspect.signature(function)
            rest = list(signature.parameters.values())[1:]
            found[name.removesuffix("_")] = signature.replace(parameters=rest)
    return found


def rules_by_name(init: Init) -> NameMap[Rule]:
    """The checked argument ``init=`` of a public function.

    A value may itself be a mapping, like torchtitan's ``param_init``: from names of parameters, in
    the modules that the pattern matches, to initialisers.

    Raises:
        InitError: a value is no initialiser.
        TypeError: ``init`` is no mapping, or a pattern is no string.
    """
    if not isinstance(init, Mapping):
        raise TypeError(f"init={init!r}: a mapping from names or globs to initialisers is meant")
    rules: dict[str, Rule] = {}
    optional: set[str] = set()
    for pattern, value in NameMap("init", init).given.items():
        if not isinstance(value, Mapping):
            rules[pattern] = rule_of(value, f"init={{{pattern!r}: ...}}")
            continue
        for name, inner in NameMap("init", value).given.items():
            joined = f"{pattern}.{name}" if pattern else name
            rules[joined] = rule_of(inner, f"init={{{pattern!r}: {{{name!r}: ...}}}}")
            optional.add(joined)
    return NameMap("init", rules, optional=optional)


def rule_of(value: Any, told: str) -> Rule:
    """The initialiser for a value of ``init=``."""
    try:
        if isinstance(value, str):
            return _parsed(value)
        if isinstance(value, functools.partial) and _is_torchs(value.func):
            return initialiser(value.func.__name__, *value.args, **value.keywords)
        if _is_torchs(value):
            return initialiser(value.__name__)
    except InitError as error:
        raise InitError(f"{told}: {error}") from error
    if isinstance(value, nn.Module) or inspect.isclass(value) or not callable(value):
        raise InitError(
            f"{told}: {value!r} is no initialiser: give one of lateinit.init, its name, a function "
            "of torch.nn.init that ends in an underscore, or a function that initialises a tensor "
            "in place"
        )
    return value  # type: ignore[no-any-return]


def _is_torchs(value: Any) -> bool:
    name = getattr(value, "__name__", "")
    return name.removesuffix("_") in _signatures() and getattr(nn.init, name, None) is value


def _parsed(text: str) -> Initialiser:
    """Parse ``"zeros"``, or a call with literal arguments such as ``"normal(std=0.02)"``."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return initialiser(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            args = [ast.literal_eval(arg) for arg in node.args]
            kwargs = {str(key.arg): ast.literal_eval(key.value) for key in node.keywords}
            return initialiser(node.func.id, *args, **kwargs)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, InitError):
            raise
    raise InitError(f"{text!r} is no initialiser: 'zeros' or 'normal(std=0.02)' is meant")


def told(rule: Rule) -> str:
    """The words for a rule."""
    return repr(rule) if isinstance(rule, Initialiser) else getattr(rule, "__name__", repr(rule))
