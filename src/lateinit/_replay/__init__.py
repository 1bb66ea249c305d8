"""Run recorded ops on real memory, each draw at its own place in the random stream.

Gives the rooms above ``Replay`` (runs the steps of a plan), ``Streams`` (the generator state before
each draw) and chunked fills (one large tensor filled in parts, by threads or rank by rank). May
import ``_program``, ``_rng`` and the rooms below them. Start with ``replay``.
"""
