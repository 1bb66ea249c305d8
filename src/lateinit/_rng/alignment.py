"""Cut a flat tensor into parts that a kernel fills with the bits of the whole call."""

from __future__ import annotations

UNIT = 16
"""The number of elements that ``normal_`` draws as one group.

aten/src/ATen/native/cpu/DistributionTemplates.h: normal_fill; tensors of fewer elements are drawn
by another kernel.
"""


def cut(numel: int, length: int) -> list[tuple[int, int]]:
    """Flat ranges of about ``length`` elements at most, each but the last a multiple of 16 long.

    The last range has at least 16 elements, unless there are fewer in all.

    Example:
        >>> cut(100, 40)
        [(0, 48), (48, 100)]
    """
    length = -(-length // UNIT) * UNIT
    starts = [start for start in range(0, numel, length) if numel - start >= UNIT] or [0]
    return list(zip(starts, [*starts[1:], numel], strict=True))
