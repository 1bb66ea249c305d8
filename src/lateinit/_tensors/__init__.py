"""Deferred tensors: how they are recognised, found, guarded, and made real.

Gives the rooms above a slot for each deferred storage (``slots``), a walk over the tensors of a
module (``walk``), the class of deferred tensors outside a block (``guard``), and the exchange that
puts real storage into an existing tensor object (``realize``). May import ``_replay`` and the rooms
below it. Start with ``slots``: everything else asks it whether a tensor is deferred.
"""
