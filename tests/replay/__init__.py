"""Tests of the room `_replay`."""
