"""The recorded construction as plain data, and planning on it.

Gives the rooms above ``Program`` (a sequence of ops over numbered storages), plans (the ops that
must run to compute some storages), the constants that ops read, and the words for how a tensor is
initialised. May import ``_torch`` and the leaf modules; ``_rng`` beside it knows no program. Start
with ``program``.
"""
