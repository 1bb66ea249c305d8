"""The block ``with lateinit.deferred():``: turn the construction of a model into a program.

A function mode (``function_mode``) answers Python code that inspects deferred tensors. A dispatch
mode below it (``recorder``) decides how each op is treated, and a ``ProgramWriter`` (``writer``)
writes it into the program. Patches (``patches``) replace the few functions of torch that reach
neither mode. Outside blocks, deferred tensors are guarded (``guard``): calls on them are answered
(``answers``) or followed (``calls_after_block``), and their ops recorded (``after_block``) by the
same writer. Gives the rooms above ``deferred`` and the filling of holes.
May import ``_tensors`` and the rooms below it. This room and ``_materialize`` do not import each
other.
Start with ``block``, then ``recording`` and ``recorder``.
"""

from lateinit._recording.block import deferred, deferred_init
from lateinit._recording.guard import DeferredTensor
from lateinit._recording.holes import abandoned, hole_of
from lateinit._recording.recording import fill, recording_block
from lateinit._recording.redraw import draw_again
from lateinit._recording.writer import ProgramWriter, current

__all__ = [
    "DeferredTensor",
    "ProgramWriter",
    "abandoned",
    "current",
    "deferred",
    "deferred_init",
    "draw_again",
    "fill",
    "hole_of",
    "recording_block",
]
