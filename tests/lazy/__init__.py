"""Tests of the room `_lazy`."""
