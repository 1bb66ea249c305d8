"""Real data that enters a program: constants, and how they stay what they were."""

from __future__ import annotations

from torch import Tensor

from lateinit._program.program import Const, Constant, Program
from lateinit._torch.storage import checksum, copied_with_strides, is_plain, storage_key

_SMALL = 1 << 16


class RealData:
    """The real tensors that recorded ops read.

    Data of up to 64 KiB, and data that numpy could change behind our back, is copied; other data
    is kept as it is, with its checksum, and copied before an op of the block writes to it. Its
    version would not do: that does not count what is written through ``.data`` or an array.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._kept: dict[int, list[int]] = {}

    def refer(self, tensor: Tensor) -> Const:
        """A reference to a real tensor, as it is now."""
        if not is_plain(tensor):
            return self.own(tensor.clone())
        storage = tensor.untyped_storage()
        small = tensor.numel() * tensor.element_size() <= _SMALL
        if small or not storage.resizable() or tensor.is_inference():
            return self.own(copied_with_strides(tensor))
        constant = self._keep(Constant(tensor, checksum(tensor)))
        self._kept.setdefault(storage_key(storage), []).append(constant.number)
        return constant

    def own(self, tensor: Tensor) -> Const:
        """A reference to data that nobody else can change."""
        return self._keep(Constant(tensor, None))

    def _keep(self, constant: Constant) -> Const:
        self.program.constants.append(constant)
        return Const(len(self.program.constants) - 1)

    def before_write(self, tensor: Tensor) -> None:
        """Copy what is kept of a tensor's storage before it is written in place."""
        if not is_plain(tensor):
            return
        for number in self._kept.pop(storage_key(tensor.untyped_storage()), ()):
            constant = self.program.constants[number]
            self.program.constants[number] = Constant(copied_with_strides(constant.tensor), None)
