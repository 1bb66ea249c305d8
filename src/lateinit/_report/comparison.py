"""The result of a bitwise comparison of tensors, shared by ``parity`` and ``verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of a comparison with the values of a seed.

    Attributes:
        differences: pairs of a name and a description.
        tensors: the number of tensors that were compared.
        nbytes: the bytes of these tensors.
        seed: the seed.
    """

    differences: tuple[tuple[str, str], ...]
    tensors: int
    nbytes: int
    seed: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "equal": self.equal,
            "differences": [{"name": name, "what": what} for name, what in self.differences],
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "seed": self.seed,
        }

    def told(self, equal: str) -> list[str]:
        """A line for each difference, then the verdict: ``equal`` if there is no difference."""
        count = len(self.differences)
        verdict = equal if self.equal else f"DIFFERENT: {count} difference{'s' * (count != 1)}"
        return [*(f"  {name}: {what}" for name, what in self.differences), verdict]
