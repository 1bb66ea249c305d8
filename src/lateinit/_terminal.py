"""What lateinit uses of rich, imported without a change of Python's random generator.

``rich.style`` draws from it when it is imported. Constructors draw from it too, and the first block
of a process imports lateinit.
"""

from __future__ import annotations

import random

_state = random.getstate()
try:
    from rich import box, progress
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text
finally:
    random.setstate(_state)

__all__ = ["Console", "ConsoleOptions", "RenderResult", "Table", "Text", "box", "progress"]
