"""Modules whose sizes are not known yet: declare them, infer their shapes, initialise them.

The room gives users ``infer_shapes``, ``lazy``, ``size``, the lazy layers, the mixins and the
placeholders; it gives ``_checkpoint`` the sizes that a checkpoint tells (``checkpoint_sizes``) and
stand-ins for a model's tensors (``borrowed_model``). It may import ``_recording`` and everything
below that, but not ``_materialize``, its neighbour. Start with ``lazy_class.py`` for how a lazy
module is declared and initialised, and with ``infer.py`` for a forward pass on shapes.
"""
