"""Kernels in C that give the bits of torch's CPU kernels, several times as fast.

Gives the rooms above ``fill`` (``uniform_`` and ``normal_`` on a flat tensor), ``fill_rows`` and
``normal_at`` (parts of it), ``jump`` (a generator's state after some words), ``verdicts`` (which
kernels are used, and why) and ``digest_of_draws`` (a sample of torch's own draws). Each kernel is
compared with torch's before its first use (``trial``). Each function returns whether it did the
work, so that the caller can use torch's kernel instead. The extension is optional. May import the
leaf modules only. Start with ``kernels``; docs/kernels.md explains the C code.
"""

from lateinit._native.calls import APART, DTYPES, NORMAL, UNIFORM
from lateinit._native.kernels import (
    WORTH,
    Verdict,
    can_jump,
    fill,
    fill_rows,
    in_range,
    is_native,
    jump,
    normal_at,
    verdicts,
)
from lateinit._native.trial import digest_of_draws

__all__ = [
    "APART",
    "DTYPES",
    "NORMAL",
    "UNIFORM",
    "WORTH",
    "Verdict",
    "can_jump",
    "digest_of_draws",
    "fill",
    "fill_rows",
    "in_range",
    "is_native",
    "jump",
    "normal_at",
    "verdicts",
]
