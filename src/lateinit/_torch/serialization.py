"""Names of private functions of torch in the pickles of ``torch.save`` (torch/_utils.py)."""

from __future__ import annotations

REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
REBUILD_TENSOR_WITH_DTYPE = ("torch._utils", "_rebuild_tensor_v3")
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
