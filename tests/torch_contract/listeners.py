"""Those who hear what torch does: a mode of each kind, a class of tensors, a function of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from lateinit._torch.modes import DispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable


class Functions(TorchFunctionMode):
    """A mode that notes every function called under it, and what ``ask`` says at each."""

    def __init__(self, ask: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.ask, self.heard, self.answers = ask, [], []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(func)
        if self.ask is not None:
            self.answers.append(self.ask())
        return func(*args, **(kwargs or {}))


class Operators(DispatchMode):
    """A mode that notes every operator called under it, by name, and its keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []
        self.given: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(func.name())
        self.given.append(kwargs or {})
        return func(*args, **(kwargs or {}))


class Heard(torch.Tensor):
    """A tensor whose class notes every function that it is asked for."""

    heard: list[Any]  # on the object

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            for arg in args:
                if isinstance(arg, Heard):
                    arg.__dict__.setdefault("heard", []).append(func)
            return func(*args, **(kwargs or {}))


def heard_tensor(*sizes: int) -> Heard:
    tensor = torch.ones(*sizes).as_subclass(Heard)
    tensor.__dict__["heard"] = []
    return tensor


def function_of(module: str, expression: str, **names: Any) -> Callable[..., Any]:
    """A function of any arguments that gives an expression, as if it stood in that module.

    Its own frame is no file of the tests: what looks at frames finds those of its caller.
    """
    code = compile(f"lambda *_, **__: {expression}", "<frozen function>", "eval")
    function: Callable[..., Any] = eval(code, {"__name__": module, **names})
    return function
