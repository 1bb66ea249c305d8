"""Load a checkpoint as ``load_state_dict`` would, tensor by tensor, all or nothing.

The room gives ``load_into`` to ``api.py``, and ``translated`` and ``plan_load`` to ``_report``. It
may import the same rooms as ``_checkpoint``, and ``formats``, but not ``save``. Start with
``load.py``; ``plan.py`` makes the plan (``dry_run.py`` finds the effects of loading,
``compatibility.py`` checks them), and ``assign.py`` puts the values into tensors.
"""

from lateinit._checkpoint.load.load import load_into
from lateinit._checkpoint.load.loaded import Loaded
from lateinit._checkpoint.load.plan import LoadPlan, plan_load
from lateinit._checkpoint.load.renamed import translated
from lateinit._checkpoint.load.selection import AS_FOUND, Choice, Rename, selected

__all__ = [
    "AS_FOUND",
    "Choice",
    "LoadPlan",
    "Loaded",
    "Rename",
    "load_into",
    "plan_load",
    "selected",
    "translated",
]
