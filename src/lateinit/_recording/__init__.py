"""The block ``with lateinit.deferred():``: turn the construction of a model into a program.

A function mode (``function_mode``) answers Python code that inspects deferred tensors. A dispatch
mode below it (``recorder``) writes each op into the program. Patches (``patches``) replace the few
functions of torch that reach neither mode. Gives the rooms above ``deferred``, the filling of
holes, and the recording of ops after a block. May import ``_tensors`` and the rooms below it; it
and ``_materialize`` do not know each other. Start with ``block``, then ``recorder``.
"""

from lateinit._recording.block import deferred, deferred_init, fill, recording_block
from lateinit._recording.holes import hole_of
from lateinit._recording.recorder import Recorder, current

__all__ = [
    "Recorder",
    "current",
    "deferred",
    "deferred_init",
    "fill",
    "hole_of",
    "recording_block",
]
