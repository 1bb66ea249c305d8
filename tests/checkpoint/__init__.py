"""Tests of the room `_checkpoint`."""
