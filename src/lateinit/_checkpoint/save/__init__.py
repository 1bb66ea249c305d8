"""Save a model as safetensors: streamed, resumable, all or nothing.

The room gives ``api.py`` ``save_files`` and ``save_shards``, and ``_report`` the manifest and
``TensorComputer``. It may import the same rooms as ``_checkpoint``, and ``formats``, but not
``load``. Start with ``save.py``. In the order of a save: ``manifest.py`` lists the tensors,
``resume_digest.py`` identifies the save, ``pipeline.py`` computes and writes, ``atomic_output.py``
publishes.
"""

from lateinit._checkpoint.save.atomic_output import check_suffix
from lateinit._checkpoint.save.manifest import Item, collect, divide
from lateinit._checkpoint.save.pipeline import TensorComputer, batches
from lateinit._checkpoint.save.resume_digest import fingerprint
from lateinit._checkpoint.save.save import Asked, Saved, save_files, save_shards

__all__ = [
    "Asked",
    "Item",
    "Saved",
    "TensorComputer",
    "batches",
    "check_suffix",
    "collect",
    "divide",
    "fingerprint",
    "save_files",
    "save_shards",
]
