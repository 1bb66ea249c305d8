"""Deferred and lazy parameter initialisation for PyTorch.

Declare a model now; decide its shapes, memory, device and values later, and get exactly the model
that eager construction would have given. The public API is ``__all__`` of this module and of
``lateinit.nn``, ``lateinit.init``, ``lateinit.pfn_extras`` and ``lateinit.errors``. Names with an
underscore are private.
"""

import importlib
import threading
import typing

from lateinit import _log as _log
from lateinit import errors
from lateinit._version import __version__ as __version__

if typing.TYPE_CHECKING:
    from lateinit import init, nn, pfn_extras
    from lateinit._checkpoint.api import load_checkpoint, save_checkpoint
    from lateinit._lazy import discard, infer_shapes, lazy, settle_rng, size
    from lateinit._materialize import is_deferred, plan
    from lateinit._materialize.materialize import materialize
    from lateinit._recording import deferred, deferred_init
    from lateinit._report.summary import summary
    from lateinit._skip_init import skip_init

__all__ = [
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

# The modules that define the public names which need torch.
_MODULES = {
    "deferred": "lateinit._recording",
    "deferred_init": "lateinit._recording",
    "discard": "lateinit._lazy",
    "infer_shapes": "lateinit._lazy",
    "init": "lateinit.init",
    "is_deferred": "lateinit._materialize",
    "lazy": "lateinit._lazy",
    "load_checkpoint": "lateinit._checkpoint.api",
    "materialize": "lateinit._materialize.materialize",
    "nn": "lateinit.nn",
    "pfn_extras": "lateinit.pfn_extras",
    "plan": "lateinit._materialize",
    "save_checkpoint": "lateinit._checkpoint.api",
    "settle_rng": "lateinit._lazy",
    "size": "lateinit._lazy",
    "skip_init": "lateinit._skip_init",
    "summary": "lateinit._report.summary",
}
# Only one thread at a time imports. To avoid a deadlock, importlib lets a thread go on with a
# module that is only half imported (``_DeadlockError`` in importlib/_bootstrap.py).
_one_thread = threading.RLock()


def _resolve() -> dict[str, object]:
    """Import every public name, and put all of them into this module.

    All at once, since a module of lateinit that is imported later, while a block replaces functions
    of torch, would keep the replacements.
    """
    with _one_thread:
        modules = {name: importlib.import_module(module) for name, module in _MODULES.items()}
        found: dict[str, object] = {
            name: module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
            for name, module in modules.items()
        }
        for name, thing in found.items():
            globals().setdefault(name, thing)
        return found


if not typing.TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> object:  # PEP 562: called for names not in this module yet
        if name in _MODULES:
            return _resolve()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
