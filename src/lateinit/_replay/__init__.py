"""Run recorded ops on real memory, each draw at its own place in the random stream.

Gives the rooms above ``Execution`` (the values of a program under one seed, with the generator
state before each draw), ``Session`` (runs the steps of a plan) and ``ChunkedFill`` (one large
tensor filled in parts: several threads share the parts, or a rank fills only the parts that it
holds). May import ``_program``, ``_rng`` and the rooms below them. Start with ``execution``.
"""

from lateinit._replay.chunks import (
    PIECE,
    ChunkedFill,
    calls_of,
    fill_of,
    is_small,
    late_of,
    pieces,
    run_piece,
    words_of,
)
from lateinit._replay.dropping import costs_of, drop_later, needed_for
from lateinit._replay.execution import Execution, execution_of, one_thread
from lateinit._replay.samples import sample_of
from lateinit._replay.session import Computed, Memory, Session, Storages
from lateinit._replay.streams import recorded_seed

__all__ = [
    "PIECE",
    "ChunkedFill",
    "Computed",
    "Execution",
    "Memory",
    "Session",
    "Storages",
    "calls_of",
    "costs_of",
    "drop_later",
    "execution_of",
    "fill_of",
    "is_small",
    "late_of",
    "needed_for",
    "one_thread",
    "pieces",
    "recorded_seed",
    "run_piece",
    "sample_of",
    "words_of",
]
