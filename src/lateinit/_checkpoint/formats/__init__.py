"""Checkpoint formats, each read one tensor at a time: safetensors, ``torch.save``, DCP folders.

The room gives ``Reader`` (``base.py``) and ``open_checkpoint`` (``open.py``). A reader checks the
structure of its files when it is opened, and knows no module. It imports ``_torch`` and ``errors``
only. Start with ``base.py``.
"""
