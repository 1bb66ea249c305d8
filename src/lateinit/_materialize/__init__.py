"""Run a plan and put the values into the deferred tensors.

The room gives ``materialize``, ``plan`` and ``is_deferred`` to users, and ``execute`` (the steps of
a plan on several threads) to ``_checkpoint.save``. It may import ``_distributed`` and everything
below that, but not ``_lazy``, its neighbour, and not ``_recording``: recording and materialising
meet only in the program. Import the function ``materialize`` from the module of the same name.
Start with ``materialize.py``; ``scheduler.py`` executes its plans.
"""

from lateinit._materialize.checks import check_constants, check_holes, check_seed, check_shared
from lateinit._materialize.filling import Filling, plan_of
from lateinit._materialize.materialize import is_deferred, plan
from lateinit._materialize.offload import Offload, offload_of
from lateinit._materialize.scheduler import execute

__all__ = [
    "Filling",
    "Offload",
    "check_constants",
    "check_holes",
    "check_seed",
    "check_shared",
    "execute",
    "is_deferred",
    "offload_of",
    "plan",
    "plan_of",
]
