"""Names of private functions of torch in the pickles of ``torch.save`` (torch/_utils.py).

Also the private record of DCP that says where a block is.
"""

from __future__ import annotations

from typing import Any

REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
REBUILD_TENSOR_WITH_DTYPE = ("torch._utils", "_rebuild_tensor_v3")
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")


def stored_by_dcp(file: str, start: int, nbytes: int) -> Any:
    """Say where a block is, as DCP's readers look for it (torch/distributed/checkpoint/filesystem).

    Args:
        file: the name of the file.
        start: its first byte there.
        nbytes: how many it has.
    """
    # Slow to import.
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: PLC0415

    return _StorageInfo(file, start, nbytes)
