"""Tests of the room `_integrations`."""
