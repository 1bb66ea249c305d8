"""Format and parse sizes in bytes, such as ``497.8 MB`` and ``2GiB``."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def format_bytes(count: int) -> str:
    """A size in decimal units: ``497.8 MB``."""
    number, prefix = _scaled(count)
    return f"{number} {prefix}B"


def format_count(count: int) -> str:
    """A count in decimal units: ``3.9 G``."""
    number, prefix = _scaled(count)
    return f"{number} {prefix}".rstrip()


def _scaled(count: int) -> tuple[str, str]:
    size = float(count)
    for prefix in ("", "k", "M", "G"):
        # Round before comparing: 999.96 kB becomes 1.0 MB, not 1000.0 kB.
        if round(size, 1) < 1000:
            return (f"{size:.1f}" if prefix else f"{size:.0f}"), prefix
        size /= 1000
    return f"{size:,.1f}", "T"


def parse_bytes(size: int | str) -> int:
    """The number of bytes in ``"5GB"`` (10**9), ``"2GiB"`` (2**30), ``"500"`` or an integer.

    Raises:
        ValueError: ``size`` is no positive size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(found[2].upper()) if found else None
    count = int(float(found[1]) * unit) if found and unit else 0
    if count <= 0:
        raise ValueError(f"{size!r} is no size: write it as 5GB, 500MB, 2GiB or a count of bytes")
    return count
