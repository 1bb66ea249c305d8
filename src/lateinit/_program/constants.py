"""Constants: the real data that enters a program, protected against later changes."""

from __future__ import annotations

from torch import Tensor

from lateinit._program.ops import Const
from lateinit._program.program import Constant, Program
from lateinit._torch import checksum, copied_with_strides, is_plain, storage_key

# 64 KiB: a copy of less costs next to nothing, and larger data should not be in memory twice.
_SMALL = 1 << 16


class RealData:
    """The real tensors that recorded ops read.

    Data of up to 64 KiB is copied, and so is memory that torch did not allocate (an array's owner
    may write to it). Other data is kept by reference, with a checksum that replay compares, and is
    copied before an op of the block writes to it. The tensor's version counter is not enough: it
    does not count writes through ``.data`` or an array.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._kept: dict[int, list[int]] = {}

    def refer(self, tensor: Tensor) -> Const:
        """A reference to the present values of a real tensor."""
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
        """A reference to data that no one else can write to."""
        return self._keep(Constant(tensor, None))

    def _keep(self, constant: Constant) -> Const:
        self.program.constants.append(constant)
        return Const(len(self.program.constants) - 1)

    def before_write(self, tensor: Tensor) -> None:
        """Copy the kept data on a tensor's storage, which is about to be written in place."""
        if not is_plain(tensor):
            return
        for number in self._kept.pop(storage_key(tensor.untyped_storage()), ()):
            constant = self.program.constants[number]
            self.program.constants[number] = Constant(copied_with_strides(constant.tensor), None)
