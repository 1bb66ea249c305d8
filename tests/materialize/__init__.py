"""Tests of the room `_materialize`."""
