"""Tests of the room `_distributed`."""
