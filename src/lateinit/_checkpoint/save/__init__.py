"""Save a model as safetensors: streamed, resumable, all or nothing.

The room gives ``api.py`` its steps, and ``_report`` the manifest and ``TensorComputer``. It may
import what ``_checkpoint`` may, and ``formats``, but not ``load``. In the order of a save:
``manifest.py`` lists the tensors, ``resume_digest.py`` identifies the save, ``pipeline.py``
computes and writes, ``atomic_output.py`` publishes. Start with ``pipeline.py``.
"""
