"""Rules: how a size follows from the arguments of a forward call.

``size`` is the usual rule; any function of the forward arguments can be a rule. ``evaluate_rules``
applies the rules of a lazy module to a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from lateinit.errors import RuleError, ShapeError, UninitializedError, candidates

Size = int | tuple[int, ...]


@dataclass(frozen=True)
class size:  # noqa: N801 - reads as a function in a rule
    """The rule "as long as this dim of the input".

    Called with the arguments of a forward call by name, it returns an int, or a tuple if there are
    several dims. Only shapes are read.

    Args:
        *dims: the dims of the input, by default the last one. Several dims give a tuple of sizes.
        of: the input: its name, or its place among the arguments of ``forward``; by default the
            first. With several inputs their sizes must agree.
        ndim: the rank, or ranks, that the input may have; by default any rank that has the dims.
        default: the size to take if the input does not have the dim.

    Raises:
        TypeError: a dim is no int.

    Example:
        >>> LazyLSTM = lateinit.lazy(torch.nn.LSTM, input_size=lateinit.size(-1))
        >>> lstm = LazyLSTM(hidden_size=8)
        >>> _ = lstm(torch.zeros(5, 2, 3))
        >>> lstm.input_size
        3
    """

    dims: tuple[int, ...]
    of: str | int | tuple[str | int, ...] = 0
    ndim: tuple[int, ...] = ()
    default: int | None = None

    def __init__(
        self,
        *dims: int,
        of: str | int | tuple[str | int, ...] = 0,
        ndim: int | tuple[int, ...] = (),
        default: int | None = None,
    ) -> None:
        if not all(isinstance(dim, int) for dim in dims):
            raise TypeError(f"size() takes the numbers of dims, not {dims}")
        ranks = (ndim,) if isinstance(ndim, int) else tuple(ndim)
        values = {"dims": dims or (-1,), "of": of, "ndim": ranks, "default": default}
        self.__dict__.update(values)

    def __call__(self, **inputs: Any) -> Size:
        """The size, from the arguments of a forward call by name.

        Raises:
            ShapeError: the input is missing, is no tensor, or lacks the rank or the dim; or the
                inputs disagree.
        """
        sources = self.of if isinstance(self.of, tuple) else (self.of,)
        found = {name: self._read(name, inputs[name]) for name in self._names(sources, inputs)}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name} says {value}" for name, value in found.items())
            raise ShapeError(f"its inputs disagree on one size: {said}")
        return next(iter(found.values()))

    def _names(self, sources: tuple[str | int, ...], inputs: Mapping[str, Any]) -> list[str]:
        names = list(inputs)
        wrong = [s for s in sources if (s >= len(names) if isinstance(s, int) else s not in names)]
        if wrong:
            raise ShapeError(
                f"its size follows from the input {wrong[0]!r}, which was not given: there are "
                f"{candidates(str(wrong[0]), names) or 'no inputs'}"
            )
        return [names[s] if isinstance(s, int) else s for s in sources]

    def _read(self, name: str, value: Any) -> Size:
        value = value.data if isinstance(value, PackedSequence) else value
        if isinstance(value, Proxy):
            raise UninitializedError(
                "its forward is being traced by torch.fx, which knows no sizes: call "
                "lateinit.infer_shapes(model, ...) first"
            )
        if not isinstance(value, Tensor):
            raise ShapeError(f"its input {name!r} must be a tensor, not {type(value).__name__}")
        shape = tuple(value.shape)
        if self.ndim and len(shape) not in self.ndim:
            ranks = " or ".join(f"{rank}D" for rank in self.ndim)
            raise ShapeError(f"its input {name!r} must be {ranks}, and has the shape {shape}")
        sizes = [self._at(name, shape, dim) for dim in self.dims]
        return sizes[0] if len(sizes) == 1 else tuple(sizes)

    def _at(self, name: str, shape: tuple[int, ...], dim: int) -> int:
        if -len(shape) <= dim < len(shape):
            return int(shape[dim])
        if self.default is not None:
            return self.default
        raise ShapeError(f"its input {name!r} has no dim {dim}: its shape is {shape}")


Rule = size | Callable[..., Any]


def evaluate_rules(
    rules: Mapping[str, Rule], module: nn.Module, args: Any, kwargs: Any
) -> dict[str, Any]:
    """The value of each rule, from the arguments of a forward call.

    Args:
        rules: the rule of each argument of the plain class.
        module: the module that is called, for the names of the arguments and for messages.
        args: the arguments of the call.
        kwargs: its keyword arguments.

    Raises:
        ShapeError: the inputs do not have the shape that a rule expects.
    """
    inputs = _inputs(module, args, kwargs)
    sizes = {}
    for name, rule in rules.items():
        try:
            sizes[name] = rule(**inputs) if isinstance(rule, size) else rule(*args, **kwargs)
        except ShapeError as error:
            raise ShapeError(
                f"{type(module).__name__}: {name} cannot be inferred: {error}"
            ) from error
    return sizes


def _inputs(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a forward call by name, without defaults."""
    signature = inspect.signature(type(module).forward)
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError as error:
        raise ShapeError(f"{type(module).__name__} was called wrongly: {error}") from error
    inputs: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            inputs |= {f"{name}[{i}]": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            inputs |= value
        else:
            inputs[name] = value
    return inputs


def check_rules(cls: type[nn.Module], rules: Mapping[str, Rule], names: list[str]) -> None:
    """Raise ``RuleError`` if a value is no rule, or its name is no argument of the class."""
    for name, rule in rules.items():
        if name not in names:
            raise RuleError(
                f"lazy({cls.__name__}, {name}=...): {cls.__name__} has no argument {name!r}; "
                f"there are: {candidates(name, names)}"
            )
        if not callable(rule):
            raise RuleError(
                f"lazy({cls.__name__}, {name}={rule!r}): a rule is lateinit.size(dim) or a "
                "function of the forward arguments; values go to the lazy class's constructor"
            )
    if not rules:
        raise RuleError(
            f"lazy({cls.__name__}) needs at least one rule, such as dim=lateinit.size(-1)"
        )
