"""The device and dtype of materialised tensors, and the memory that they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from lateinit._program import TensorRef
from lateinit._replay import Computed
from lateinit._torch import is_dtensor
from lateinit.errors import DeferredTensorError


@dataclass(frozen=True, slots=True)
class Cast:
    """The device and dtype of materialised tensors; None keeps the recorded one."""

    device: torch.device | None
    dtype: torch.dtype | None

    def dtype_of(self, ref: TensorRef) -> torch.dtype:
        """The dtype of a window after the cast; only floating-point windows are cast."""
        wanted = self.dtype is not None and ref.dtype.is_floating_point
        return self.dtype if wanted and self.dtype is not None else ref.dtype

    def apply(self, computed: Computed, refs: Iterable[TensorRef]) -> Real:
        """Move and cast a whole storage, so that the tensors on it keep sharing memory.

        Args:
            computed: the storage with its values.
            refs: the windows on it.
        """
        if self.device is None and self.dtype is None:
            return Real(computed.storage, strides=computed.strides)
        recorded = self.from_dtype(refs)
        shown = recorded or torch.uint8
        whole = torch.empty(0, dtype=shown, device=computed.storage.device).set_(computed.storage)
        moved = whole.to(device=self.device, dtype=self.dtype if recorded else shown)
        return Real(moved.untyped_storage(), self, recorded, computed.strides)

    def from_dtype(self, refs: Iterable[TensorRef]) -> torch.dtype | None:
        """The present dtype of a storage that is cast; None if its bytes stay as they are.

        A storage is cast only if all windows on it have one dtype, and that dtype changes.
        """
        if self.dtype is None:
            return None
        changes = {(ref.dtype, self.dtype_of(ref)) for ref in refs}
        recorded, dtype = changes.pop()
        return None if changes or recorded is dtype else recorded


AS_RECORDED = Cast(None, None)


class Real(NamedTuple):
    """The memory of a recorded storage, once it is real.

    Attributes:
        storage: the memory.
        cast: the requested device and dtype.
        recorded: the recorded dtype of the elements if they were cast; None if every byte is as it
            was recorded.
        strides: by window, the strides where they differ from those recorded.
    """

    storage: torch.UntypedStorage
    cast: Cast = AS_RECORDED
    recorded: torch.dtype | None = None
    strides: Mapping[TensorRef, tuple[int, ...]] = MappingProxyType({})

    def window(self, ref: TensorRef) -> TensorRef:
        """A recorded window as it is on this memory.

        Raises:
            DeferredTensorError: the memory was cast, and the window shows it in another dtype.
        """
        shown = ref
        if self.strides and ref in self.strides:  # most memory has none
            shown = ref._replace(stride=self.strides[ref])
        if self.recorded is None:
            return shown
        if ref.dtype is not self.recorded:
            raise DeferredTensorError(
                f"a {ref.dtype} tensor of shape {ref.size} shares its memory with a "
                f"{self.recorded} tensor that was materialised with dtype={self.cast.dtype}, so "
                "that its bytes are gone: build the model anew, and materialise both without dtype="
            )
        return shown._replace(dtype=self.cast.dtype_of(ref))


def device_to_move_to(
    tensor: Any, recorded: torch.device, asked: torch.device | None = None
) -> torch.device | None:
    """The device to move a tensor to, or None to leave it where it was computed.

    A ``DTensor`` goes to the current device of its mesh's type, unless a device was requested.

    Args:
        tensor: a deferred tensor or ``DTensor``.
        recorded: the device that the constructor asked for.
        asked: the device that the caller of a public function requested.
    """
    if asked is None and is_dtensor(tensor) and tensor.device_mesh.device_type != recorded.type:
        kind = tensor.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return asked
