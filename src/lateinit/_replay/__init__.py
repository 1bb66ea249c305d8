"""Run recorded ops on real memory, each draw at its own place in the random stream.

Gives the rooms above ``Replay`` (runs the steps of a plan), ``Streams`` (the generator state before
each draw) and ``ChunkedFill`` (one large tensor filled in parts: several threads share the parts,
or a rank fills only the parts that it holds). May import ``_program``, ``_rng`` and the rooms below
them. Start with ``replay``.
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
from lateinit._replay.replay import Replay, Storages, streams_of
from lateinit._replay.streams import recorded_seed

__all__ = [
    "PIECE",
    "ChunkedFill",
    "Replay",
    "Storages",
    "calls_of",
    "fill_of",
    "is_small",
    "late_of",
    "pieces",
    "recorded_seed",
    "run_piece",
    "streams_of",
    "words_of",
]
