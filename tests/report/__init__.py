"""Tests of the room `_report`."""
