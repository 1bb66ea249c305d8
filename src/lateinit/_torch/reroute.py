"""Redirect the calls of a Python function, by whatever name it is called.

``from torch.nn.init import xavier_uniform_`` binds another name, so replacing the name in
``torch.nn.init`` has no effect on it. But both names are bound to the same function object, and the
code of that object can be exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

_TO = "_lateinit_to"


def _elsewhere(*args: Any, _lateinit_to: Any, **kwargs: Any) -> Any:
    return _lateinit_to(*args, **kwargs)


class Rerouted:
    """A function without a closure, whose calls are redirected between ``begin`` and ``end``.

    Both methods can be called again after an interrupt: each sets everything.

    Args:
        function: the function.
        to: called in place of the function, with this object and the arguments.

    Attributes:
        function: the function.
        found: another function object with the original code.
    """

    def __init__(self, function: Any, to: Callable[..., Any]) -> None:
        self.function = self.found = function
        self._defaults: Any = None

        def called(*args: Any, **kwargs: Any) -> Any:
            return to(self, *args, **kwargs)

        self._called = called

    def begin(self) -> None:
        function = self.function
        if function.__code__ is not _elsewhere.__code__:
            self._defaults = function.__kwdefaults__
            self.found = FunctionType(
                function.__code__, function.__globals__, function.__name__, function.__defaults__
            )
            self.found.__kwdefaults__ = self._defaults
            self.found.__annotations__ = function.__annotations__
        # `inspect.signature` follows `__wrapped__` to the arguments that the function really takes.
        function.__wrapped__ = self.found
        # In this order: another thread may call the function between any two lines.
        function.__kwdefaults__ = {_TO: self._called}
        function.__code__ = _elsewhere.__code__

    def end(self) -> None:
        function = self.function
        if function.__code__ is _elsewhere.__code__:
            function.__code__ = self.found.__code__
        if _TO in (function.__kwdefaults__ or {}):
            function.__kwdefaults__ = self._defaults
            function.__dict__.pop("__wrapped__", None)
