"""Tests of the room `_rng`."""
