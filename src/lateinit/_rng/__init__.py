"""torch's CPU generator: jump over draws, count them, draw parts of a tensor.

Gives the rooms above ``jump`` (``mt19937``), the words that each op draws (``consumption``), the
state before each of a sequence of draws (``position``), and truncated normals in parts. May import
``_torch`` and the leaf modules, and knows neither programs nor deferred tensors. Every assumption
about a kernel of torch is tried once per process, and not used if the trial fails. Start with
``mt19937``.
"""

from lateinit._rng.alignment import UNIT, cut
from lateinit._rng.global_states import RandomStates, seed_all
from lateinit._rng.mt19937 import STATE_BYTES, seed_behind, set_state, state_from, state_of
from lateinit._rng.position import Cost, Run, Seeker
from lateinit._rng.truncated_normal import BOUNDED_DTYPES, FARTHEST, Late

__all__ = [
    "BOUNDED_DTYPES",
    "FARTHEST",
    "STATE_BYTES",
    "UNIT",
    "Cost",
    "Late",
    "RandomStates",
    "Run",
    "Seeker",
    "cut",
    "seed_all",
    "seed_behind",
    "set_state",
    "state_from",
    "state_of",
]
