"""Run a plan and put the values into the deferred tensors.

The room gives ``materialize``, ``plan`` and ``is_deferred`` to users, and ``execute`` (the steps of
a plan on several threads) to ``_checkpoint.save``. It may import ``_distributed`` and everything
below that, but not ``_lazy``, its neighbour, and not ``_recording``: recording and materialising
meet only in the program. Start with ``materialize.py``; ``scheduler.py`` is what it drives.
"""
