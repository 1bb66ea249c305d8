"""Deferred tensors: what they are, where they are found, and how they become real."""
