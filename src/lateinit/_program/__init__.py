"""The recorded construction as plain data, and planning on it.

Gives the rooms above ``Program`` (a sequence of ops over numbered storages), plans (the ops that
must run to compute some storages), the constants that ops read, and the words for how a tensor is
initialised. May import ``_torch`` and the leaf modules; ``_rng`` beside it knows no program. Start
with ``program``.
"""

from lateinit._program.constants import RealData
from lateinit._program.labels import called, describe_initialisation, initializer
from lateinit._program.ops import NUMBERS, Const, Draw, Op, TensorRef, tensor_refs
from lateinit._program.plan import Plan, Step, is_random, needed_ops, plan_storages
from lateinit._program.program import NEVER, Ambient, Program, Read, Ruled, Storage, Stream

__all__ = [
    "NEVER",
    "NUMBERS",
    "Ambient",
    "Const",
    "Draw",
    "Op",
    "Plan",
    "Program",
    "Read",
    "RealData",
    "Ruled",
    "Step",
    "Storage",
    "Stream",
    "TensorRef",
    "called",
    "describe_initialisation",
    "initializer",
    "is_random",
    "needed_ops",
    "plan_storages",
    "tensor_refs",
]
