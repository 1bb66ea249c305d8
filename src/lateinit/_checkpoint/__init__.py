"""Files and models: save a model as a checkpoint, load a checkpoint into a model.

The room gives users ``save_checkpoint`` and ``load_checkpoint`` (``api.py``), and gives ``_report``
and the command the readers, the manifest and the computation of single tensors. It may import
``_lazy``, ``_materialize`` and everything below those. Inside it, ``formats`` reads files and knows
no module; ``save`` and ``load`` both build on it and do not import each other. Start with
``api.py``.
"""
