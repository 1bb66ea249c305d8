"""Kernels in C that give the bits of torch's CPU kernels, several times as fast.

Gives the rooms above ``fill`` and ``normal_at`` (``uniform_`` and ``normal_`` on a flat tensor),
``jump`` (a generator's state after some words) and ``verdicts`` (which kernels are used, and why).
None is trusted: each is compared with torch's before its first use (``trial``), and each function
says whether it did what was asked, so that the caller can ask torch instead. The extension is
optional. May import the leaf modules only. Start with ``kernels``; docs/kernels.md explains the C.
"""

from lateinit._native.calls import DTYPES, NORMAL, UNIFORM
from lateinit._native.kernels import (
    WORTH,
    Verdict,
    can_jump,
    fill,
    in_range,
    is_native,
    jump,
    normal_at,
    verdicts,
)

__all__ = [
    "DTYPES",
    "NORMAL",
    "UNIFORM",
    "WORTH",
    "Verdict",
    "can_jump",
    "fill",
    "in_range",
    "is_native",
    "jump",
    "normal_at",
    "verdicts",
]
