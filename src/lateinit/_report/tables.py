"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def in_columns(
    heads: Sequence[str], lines: Sequence[Sequence[str]], right: Collection[str] = ("bytes",)
) -> list[str]:
    """The lines of a table: its heads, a rule, its lines and the rule again.

    Args:
        heads: the names of the columns.
        lines: the cells of each line.
        right: the columns that are flush right.
    """
    table = [heads, *([printable(cell) for cell in line] for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    sides = [str.rjust if head in right else str.ljust for head in heads]
    shown = [
        "  ".join(
            side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)
        ).rstrip()
        for line in table
    ]
    rule = "  ".join("-" * width for width in widths)
    return [shown[0], rule, *shown[1:], rule]


def printable(text: str) -> str:
    """A text from a file, without control characters for a terminal and without line breaks."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
