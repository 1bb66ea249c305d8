"""Output for people: summary tables, the parity check, the verification of a checkpoint.

The room gives ``summary`` to users, and ``check_parity`` and ``verify`` to the command. It may
import every room below it (all but the command). Start with ``summary.py``.
"""

from lateinit._report.verify import Verification

__all__ = [
    "Verification",
]
