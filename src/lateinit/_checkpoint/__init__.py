"""Files and models: save a model as a checkpoint, load a checkpoint into a model.

The room gives users ``save_checkpoint`` and ``load_checkpoint`` (``api.py``). ``_report`` imports
the readers, the manifest and the computation of single tensors from the folders in it. It may
import ``_lazy``, ``_materialize`` and everything below those. Inside it, ``formats`` reads files
and knows no module; ``save`` and ``load`` both build on it and do not import each other. Start with
``api.py``.
"""
