"""Where a flat tensor may be cut, so that kernels draw its parts as they draw the whole."""

from __future__ import annotations

UNIT = 16
"""Kernels draw so many elements at a time, and fewer than that, in all, in another way."""


def cut(numel: int, length: int) -> list[tuple[int, int]]:
    """Flat ranges of at most about ``length`` elements, each but the last a multiple of 16 long.

    The last one has 16 elements at least, if there are so many.

    Example:
        >>> cut(100, 40)
        [(0, 48), (48, 100)]
    """
    length = -(-length // UNIT) * UNIT
    starts = [start for start in range(0, numel, length) if numel - start >= UNIT] or [0]
    return list(zip(starts, [*starts[1:], numel], strict=True))
