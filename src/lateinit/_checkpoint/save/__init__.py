"""Save a model as safetensors: streamed, resumable, all or nothing.

The room gives ``api.py`` its steps, and ``_report`` the manifest and ``TensorComputer``. It may
import the same rooms as ``_checkpoint``, and ``formats``, but not ``load``. In the order of a save:
``manifest.py`` lists the tensors, ``resume_digest.py`` identifies the save, ``pipeline.py``
computes and writes, ``atomic_output.py`` publishes. Start with ``pipeline.py``.
"""

from lateinit._checkpoint.save.atomic_output import (
    Stage,
    check_room,
    check_suffix,
    check_target,
    returned,
    staged,
    was_interrupted,
)
from lateinit._checkpoint.save.companions import companions, metadata_of
from lateinit._checkpoint.save.manifest import Item, ShardFile, collect, divide
from lateinit._checkpoint.save.pipeline import TensorComputer, batches, write_shards
from lateinit._checkpoint.save.resume_digest import fingerprint
from lateinit._checkpoint.save.whole_files import WholeFiles

__all__ = [
    "Item",
    "ShardFile",
    "Stage",
    "TensorComputer",
    "WholeFiles",
    "batches",
    "check_room",
    "check_suffix",
    "check_target",
    "collect",
    "companions",
    "divide",
    "fingerprint",
    "metadata_of",
    "returned",
    "staged",
    "was_interrupted",
    "write_shards",
]
