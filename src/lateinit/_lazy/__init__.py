"""Modules whose sizes are not known yet: declare them, infer their shapes, initialise them."""
