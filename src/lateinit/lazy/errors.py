"""What lazy modules raise.

LateinitError
 +-- ShapeError           (ValueError, RuntimeError)   a shape that disagrees with what is known
 +-- RuleError            (TypeError)                  a rule that does not fit its class
 +-- UninitializedError   (RuntimeError, ValueError)   a placeholder was used as a tensor
 +-- UnreachedError       (RuntimeError)               the forward never met some lazy modules
 +-- NeedsValuesError     (RuntimeError)               the forward depends on values, not shapes
"""

from __future__ import annotations

from lateinit.errors import LateinitError


class ShapeError(LateinitError, ValueError, RuntimeError):
    """An input or a checkpoint has a shape that disagrees with what is known."""


class RuleError(LateinitError, TypeError):
    """A rule names no argument of its class, or its class cannot be constructed with it."""


class UninitializedError(LateinitError, RuntimeError, ValueError):
    """A tensor whose shape is not known yet was used."""


class UnreachedError(LateinitError, RuntimeError):
    """A forward pass ended and some lazy modules were never called."""


class NeedsValuesError(LateinitError, RuntimeError):
    """A forward pass needs the values of a tensor of which only the shape is known."""
