"""Tests of the room `_recording`."""
