"""``device=`` and ``dtype=``: the device and dtype that each tensor of a target gets.

``casting`` checks the two arguments. ``Casting.over`` decides the device and dtype of each tensor
of one target, before anything changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._identity import IdentityMap
from lateinit._integrations import has_accelerate, in_float32, inferred
from lateinit._tensors.cast import AS_RECORDED, Cast
from lateinit._tensors.deferred import Deferred
from lateinit._tensors.name_maps import NameMap
from lateinit._tensors.slots import Slot, is_deferred_tensor, is_parameter, slot_of
from lateinit._tensors.walk import Found, modules_by_name
from lateinit.errors import DeferredTensorError, DeviceError, PatternError, listing

DISK, AUTO = "disk", "auto"
Device = torch.device | str | int
Devices = Device | Mapping[str, Device]
DTypes = torch.dtype | Mapping[str, torch.dtype]


@dataclass(frozen=True, slots=True)
class Casting:
    """The checked arguments ``device=`` and ``dtype=`` of a public function.

    Attributes:
        device: one device for all tensors, devices by name, or None for the recorded devices.
        dtype: one dtype, dtypes by name, or None, in the same way.
    """

    device: torch.device | str | NameMap[torch.device | str] | None = None
    dtype: torch.dtype | NameMap[torch.dtype] | None = None

    def over(self, target: Any, found: Iterable[Found]) -> Casts:
        """The device and dtype of each tensor of a target.

        Args:
            target: the target.
            found: all of its tensors.

        Raises:
            PatternError: a pattern matches nothing, or two contradict each other on one tensor.
        """
        return Casts(self._on(target), target, list(found))

    def _on(self, target: Any) -> Casting:
        """The same arguments, with ``device="auto"`` or ``"disk"`` replaced by a map."""
        if self.device == DISK:
            return replace(self, device=NameMap("device", {"": DISK}))
        if self.device != AUTO:
            return self
        if not isinstance(target, nn.Module) or not has_accelerate():
            raise DeviceError(
                "device='auto' is for a module, and uses accelerate, which has to be installed"
            )
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else None
        try:
            places = inferred(target, dtype)
        except Exception as error:
            raise DeviceError(
                f"device='auto': accelerate can make no map for {type(target).__name__} "
                f"({type(error).__name__}: {error}): give a map, such as {{'': 'cpu'}}"
            ) from error
        return replace(self, device=casting(places, None).device)


AS_IT_IS = Casting()


def casting(device: Devices | None, dtype: DTypes | None) -> Casting:
    """The checked arguments ``device=`` and ``dtype=`` of a public function."""
    where = device if device == AUTO else _checked("device", device, _place)
    return Casting(where, _checked("dtype", dtype, _floating_point))


def _checked(argument: str, given: Any, check: Callable[[Any, str], Any]) -> Any:
    if given is None:
        return None
    if isinstance(given, Mapping):
        named = NameMap(argument, given).given
        return NameMap(
            argument, {p: check(v, f"{argument}={{{p!r}: {v!r}}}") for p, v in named.items()}
        )
    return check(given, f"{argument}={given!r}")


def _place(given: Device, told: str) -> torch.device | str:
    return DISK if given == DISK else device_of(given, told)


def device_of(given: Device, told: str = "device") -> torch.device:
    """The checked value of ``device=``: a device with memory, on this machine.

    Raises:
        DeviceError: this machine does not have the device.
    """
    if isinstance(given, bool) or not isinstance(given, (torch.device, str, int)):
        raise TypeError(f"{told}: a torch.device, its name, or the index of one is meant")
    if isinstance(given, int):  # the form of accelerate's maps
        kind = torch.accelerator.current_accelerator() or torch.device("cuda")
        given = f"{kind.type}:{given}"
    try:
        device = torch.device(given)
        if device.type != "meta":
            torch.empty(0, device=device)
    except Exception as error:
        raise DeviceError(f"{told}: this machine does not have that device ({error})") from error
    if device.type == "meta":
        raise ValueError(f"{told}: materialised tensors need a device that has memory")
    return device


def _floating_point(given: torch.dtype, told: str) -> torch.dtype:
    if not isinstance(given, torch.dtype):
        raise TypeError(f"{told}: a torch.dtype is meant, such as torch.bfloat16")
    if not given.is_floating_point:
        raise ValueError(f"{told}: weights are cast to a floating-point dtype")
    try:
        torch.empty(1, device="cpu").to(given)
    except NotImplementedError as error:
        raise ValueError(f"{told}: torch cannot cast to it ({error})") from error
    return given


class Casts:
    """The device and dtype of each tensor of one target.

    Args:
        casting: the arguments.
        target: the target.
        found: all of its tensors.
    """

    def __init__(self, casting: Casting, target: Any, found: list[Found]) -> None:
        self._casting = casting
        self._found = IdentityMap((each.tensor, each) for each in found if casting != AS_IT_IS)
        self._known: IdentityMap[Tensor, Cast] = IdentityMap()
        self._slots: dict[Slot, Cast] = {}
        self._made: dict[tuple[Any, Any], Cast] = {(None, None): AS_RECORDED}
        dtype = casting.dtype
        self._in_float32: Callable[[str, torch.dtype], bool] = _never
        if dtype is not None:
            self._in_float32 = in_float32(lambda: modules_by_name(target))
        self._explicit = set[str]()
        for asked in (casting.device, dtype):
            if isinstance(asked, NameMap):
                # accelerate's maps name modules that hold no tensors too
                asked.check(found, target if asked is casting.device else None)
        if isinstance(dtype, NameMap):
            self._explicit = self._named_alone(dtype, found)
        if casting != AS_IT_IS:
            for each in found:
                self.of(each)

    def over(self, target: Any, found: Iterable[Found]) -> Casts:
        """These casts, which also hold for a target that consists of tensors of the first one."""
        del target, found
        return self

    def of(self, found: Found) -> Cast:
        """The device and dtype of a tensor, by its names."""
        if self._casting == AS_IT_IS:
            return AS_RECORDED
        cast = self._known.get(found.tensor)
        if cast is None:
            slot = slot_of(found.tensor)
            if slot is not None and slot in self._slots and found.tensor not in self._found:
                return self._slots[slot]  # a hook made it, on the memory of a tensor of the target
            cast = self._by_name(self._found.get(found.tensor, found))
            self._known[found.tensor] = cast
            if slot is not None:
                self._slots.setdefault(slot, cast)
        return cast

    def _by_name(self, found: Found) -> Cast:
        # A tensor that an object keeps is neither moved nor cast: `Module.to` leaves it too.
        device = None if found.kind == "kept" else self._device(found)
        return self._cast(device, self._dtype(found)[0])

    def of_tensor(self, tensor: Tensor) -> Cast:
        """The device and dtype of a tensor that may have no name, such as one made by a hook."""
        cast = self._known.get(tensor)
        if cast is None:
            slot = slot_of(tensor)
            cast = self._slots.get(slot) if slot is not None else None
        if cast is None:
            device, dtype = self._casting.device, self._casting.dtype
            cast = self._cast(
                device if isinstance(device, torch.device) else None,
                dtype if isinstance(dtype, torch.dtype) and is_parameter(tensor) else None,
            )
        return cast

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The dtype that a tensor will have; a real tensor keeps its own."""
        dtype = self.of_tensor(tensor).dtype if is_deferred_tensor(tensor) else None
        return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype

    def of_saved(self, name: str, tensor: Tensor) -> Cast:
        """The device and dtype of a tensor in a state dict, which a hook may have made."""
        found = self._found.get(tensor)
        if found is None and self._casting != AS_IT_IS:
            return self._by_name(Found(tensor, [name], "buffer", persistent=True))
        return AS_RECORDED if found is None else self.of(found)

    def left_alone(self, found: Found) -> str | None:
        """The reason why ``dtype=`` does not cast a floating-point tensor; None if it does."""
        if self._casting.dtype is None or not found.tensor.is_floating_point():
            return None
        return self._dtype(found)[1]

    @property
    def on_disk(self) -> bool:
        """Whether any tensor goes to disk."""
        devices = self._casting.device
        return isinstance(devices, NameMap) and DISK in devices.given.values()

    def is_on_disk(self, found: Found) -> bool:
        """Whether a parameter goes to disk."""
        devices = self._casting.device
        entry = devices.entry_of(found) if isinstance(devices, NameMap) else None
        return isinstance(devices, NameMap) and entry is not None and devices.given[entry] == DISK

    def main_device(self) -> torch.device:
        """The device that computes with weights on disk: the first of the map but the CPU."""
        devices = self._casting.device
        given = devices.given.values() if isinstance(devices, NameMap) else ()
        real = [d for d in given if isinstance(d, torch.device)]
        return next((d for d in real if d.type != "cpu"), torch.device("cpu"))

    def check_gaps(self, found: Iterable[Found]) -> None:
        """Raise if a map of devices has no pattern for some of the parameters or buffers.

        Plain attributes stay on the recorded device, as ``Module.to`` leaves them.
        """
        devices = self._casting.device
        if not isinstance(devices, NameMap):
            return
        named = [self._found.get(f.tensor, f) for f in found]
        held = [f for f in named if f.given or f.kind in ("parameter", "buffer")]
        names = [f.name for f in held if devices.entry_of(f) is None]
        if names:
            raise PatternError(
                f"device=: no pattern of the map matches {listing(map(repr, names))}: add them, or "
                "'' for all that is left"
            )

    def _cast(self, device: torch.device | None, dtype: torch.dtype | None) -> Cast:
        return self._made.setdefault((device, dtype), Cast(device, dtype))

    def _device(self, found: Found) -> torch.device | None:
        asked = self._casting.device
        if not isinstance(asked, NameMap):
            return asked if isinstance(asked, torch.device) else None
        entry = asked.entry_of(found)
        if entry is None:
            return None
        device = asked.given[entry]
        return device if isinstance(device, torch.device) else self.main_device()

    def _dtype(self, found: Found) -> tuple[torch.dtype | None, str | None]:
        """The dtype to cast a tensor to, and the reason if it is not the dtype of ``dtype=``."""
        asked = self._casting.dtype
        if asked is None:
            return None, None
        if isinstance(asked, NameMap):
            entry = asked.entry_of(found)
            if entry is None:
                return None, "no pattern of dtype= matches it"
            if entry in self._explicit:
                return asked.given[entry], None
            asked = asked.given[entry]
        if not is_cast(found):
            return None, f"{_kind(found)}: name it in dtype= to cast it"
        if self._is_in_float32(found, asked):
            return torch.float32, "its library keeps it in float32"
        return asked, None

    def _is_in_float32(self, found: Found, dtype: torch.dtype) -> bool:
        return any(self._in_float32(name, dtype) for name in found.names)

    def _named_alone(self, asked: NameMap[torch.dtype], found: list[Found]) -> set[str]:
        """The patterns that match only tensors which a single dtype would leave: they cast them.

        Raises:
            PatternError: a pattern matches no floating-point tensor.
        """
        alone, floating = set(asked.given), set[str]()
        for each in found:
            if each.lazy or not each.tensor.is_floating_point():
                continue
            usual = is_cast(each)
            for pattern in asked.given:
                if any(asked.matches(pattern, name) for name in each.names):
                    floating.add(pattern)
                    if usual and not self._is_in_float32(each, asked.given[pattern]):
                        alone.discard(pattern)
        for pattern in asked.given:
            if pattern not in floating and not any(each.lazy for each in found):
                raise PatternError(
                    f"dtype=: {pattern!r} matches no floating-point tensor, and others are not cast"
                )
        return alone


def is_cast(found: Found) -> bool:
    """Whether a single ``dtype=`` casts a tensor: a parameter, in the state dict, or the target."""
    return found.given or found.kind == "parameter" or (found.kind == "buffer" and found.persistent)


def _kind(found: Found) -> str:
    kinds = {"buffer": "a buffer that is not saved", "kept": "an object keeps it"}
    return kinds.get(found.kind, "a plain attribute")


def _never(name: str, dtype: torch.dtype) -> bool:
    del name, dtype
    return False


def agreed(tensors: list[tuple[Deferred, Cast, bool]]) -> Cast:
    """The one device and dtype for all tensors on a storage.

    Args:
        tensors: each tensor, its cast, and whether an object keeps it: such a tensor is moved only
            if another tensor on the storage is.

    Raises:
        DeferredTensorError: they cannot have different devices, nor be cast to different dtypes.
    """
    names = listing(repr(deferred.name) for deferred, _, _ in tensors)
    devices = {cast.device: d.name for d, cast, kept in tensors if not kept}
    if len(devices) > 1:
        told = ", ".join(f"{name!r} to {device or 'its own'}" for device, name in devices.items())
        raise DeferredTensorError(
            f"{names} share one storage, but device= sends {told}: send them to the same device"
        )
    pairs = {(d.ref.dtype, cast.dtype_of(d.ref)): (d.name, cast) for d, cast, _ in tensors}
    if all(recorded is dtype for recorded, dtype in pairs):
        return Cast(next(iter(devices), None), None)
    if len(pairs) > 1:
        raise DeferredTensorError(_across(names, pairs))
    ((_, dtype),) = pairs
    return Cast(next(iter(devices), None), dtype)


def _across(names: str, pairs: Mapping[tuple[torch.dtype, torch.dtype], tuple[str, Cast]]) -> str:
    if len({recorded for recorded, _ in pairs}) > 1:
        asked = next(cast.dtype for _, cast in pairs.values() if cast.dtype is not None)
        return (
            f"{names} share one storage in several dtypes, so dtype={asked} cannot be honoured for "
            "them"
        )
    told = ", ".join(f"{name!r} {dtype}" for (_, dtype), (name, _) in pairs.items())
    return (
        f"{names} share one storage, but dtype= would make {told}: give them one dtype by a map of "
        "names, or leave them out with only="
    )
