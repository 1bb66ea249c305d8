"""Deferred and lazy parameter initialisation for PyTorch.

Declare a model now; decide its shapes, memory, device and values later, and get exactly the model
that eager construction would have given. These names, and those of ``lateinit.nn``,
``lateinit.init``, ``lateinit.pfn_extras`` and ``lateinit.errors``, are the public API; everything
with an underscore is not.
"""

from lateinit import errors, init, nn, pfn_extras
from lateinit._checkpoint.api import load_checkpoint, save_checkpoint
from lateinit._lazy import discard, infer_shapes, lazy, settle_rng, size
from lateinit._materialize import is_deferred, plan
from lateinit._materialize.materialize import materialize
from lateinit._recording import deferred, deferred_init
from lateinit._report.summary import summary
from lateinit._skip_init import skip_init
from lateinit._version import __version__ as __version__

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
