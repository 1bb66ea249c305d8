"""Tests of the room `_tensors`."""
