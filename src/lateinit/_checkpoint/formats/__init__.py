"""Checkpoint formats, each read one tensor at a time: safetensors, ``torch.save``, DCP folders.

The room gives ``Reader`` (``base.py``) and ``open_checkpoint`` (``open.py``). A reader checks the
structure of its files when it is opened, and knows no module. It imports ``_torch`` and ``errors``
only. Start with ``base.py``.
"""

from lateinit._checkpoint.formats.base import Objects, Reader, StoredFile, StoredTensor, block_of
from lateinit._checkpoint.formats.foreign_classes import foreign_in
from lateinit._checkpoint.formats.open import open_checkpoint
from lateinit._checkpoint.formats.renamed import Renamed
from lateinit._checkpoint.formats.safetensors import DTYPES, OWN_KEYS, RESERVED

__all__ = [
    "DTYPES",
    "OWN_KEYS",
    "RESERVED",
    "Objects",
    "Reader",
    "Renamed",
    "StoredFile",
    "StoredTensor",
    "block_of",
    "foreign_in",
    "open_checkpoint",
]
