"""``device="disk"``: parameters that accelerate keeps in a folder, and loads in each forward."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._identity import IdentityMap
from lateinit._integrations import Disk, has_accelerate
from lateinit._tensors import Casts, Found, Only, SharedStorage, modules_by_name
from lateinit._torch import own_parameters
from lateinit._torch.swap import swap
from lateinit.errors import DeviceError, listing


class Offload:
    """The parameters of a module that go to disk, written one storage at a time.

    Args:
        module: the module.
        found: all of its tensors.
        casts: the device and dtype of each tensor.
        folder: the folder to write to.

    Raises:
        DeviceError: accelerate cannot do it, or there is no folder.
    """

    def __init__(
        self, module: nn.Module, found: Iterable[Found], casts: Casts, folder: Path
    ) -> None:
        self._disk, self._device = Disk(folder), casts.main_device()
        chosen = [f for f in found if f.kind == "parameter" and casts.is_on_disk(f)]
        self._names = IdentityMap((f.tensor, f.names) for f in chosen)
        self._modules: dict[str, nn.Module] = {}
        for name, part in modules_by_name(module).items():
            own = [p for p in own_parameters(part).values() if p is not None]
            if any(p in self._names for p in own):
                self._modules[name] = part
                apart = [p for p in own if p not in self._names]
                if apart:
                    told = repr(name) if name else "the model"
                    raise DeviceError(
                        f"device='disk': of the parameters of {told} itself some are on disk and "
                        "some are not, which accelerate's hooks cannot do: send all of them to "
                        "disk, or none"
                    )

    def check(self, storages: Iterable[SharedStorage]) -> None:
        """Raise if a tensor that goes to disk shares its memory with another one."""
        for shared in storages:
            if len(shared.tensors) > 1 and any(d.tensor in self._names for d in shared.tensors):
                raise DeviceError(
                    f"device='disk': {listing(map(repr, shared.names))} share one storage, which "
                    "files cannot: keep them on a device"
                )

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Write the real tensors that go to disk, and leave them on ``meta``."""
        for tensor in tensors:
            names = self._names.get(tensor)
            if names is not None and not tensor.is_meta:
                self._disk.write(names, tensor)
                swap(tensor, torch.empty_like(tensor, device="meta"))

    def finish(self) -> None:
        """Write the tensors that were real before too, and attach accelerate's hooks."""
        self.take(list(self._names))
        self._disk.attach(self._modules, self._device)


def offload_of(
    target: Any,
    found: Iterable[Found],
    casts: Casts,
    folder: str | os.PathLike[str] | None,
    only: Only | None,
) -> Offload | None:
    """The checked offloading if ``device=`` contains ``"disk"``, else None."""
    if not casts.on_disk:
        return None
    if not isinstance(target, nn.Module) or only is not None:
        raise DeviceError("device='disk' is for a whole module: give one, and leave only= out")
    if folder is None:
        raise DeviceError("device='disk': say where, by offload_folder=")
    if not has_accelerate():
        raise DeviceError("device='disk' uses the hooks of accelerate, which is not installed")
    return Offload(target, found, casts, Path(folder))
