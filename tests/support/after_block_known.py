"""What is known to be neither honoured nor refused by name, with the reason.

A call in this table that is honoured or refused fails its test, so that it is taken from here. A
reason stands before its entries: an outcome, up to its colon; the kinds of tensor, and what the
other tensors are if not real; and patterns of calls, in which ``*`` and ``?`` stand for anything.
What happens ``sometimes`` need not: bits and strides differ between processors and torch versions.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = {
    "all": ("plain", "buffer", "parameter", "view", "shard", "dtensor"),
    "local": ("plain", "buffer", "parameter", "view", "shard"),
    "waiting": ("parameter", "view", "shard"),
}
TABLE = """
torch's meta kernels say other strides; the values are equal
    sometimes wrong | all | fft.rfftn 1 function *; linalg.eig 0 function *
out= is not resized, as torch's meta kernel does not
    wrong | local | native_batch_norm 1 out= all
a move to meta leaves what it moves deferred, which is on meta already
    sometimes wrong | module | Module: to meta
storage_type says nothing of meta
    wrong | plain, buffer | torch.Tensor.storage_type *
a shard that was given values keeps the class of its guard until it is asked something
    wrong | dtensor | real = real 0
torch makes a tensor on the device that a parameter says, meta, and combines the two
    result on meta | waiting | zeros on its device*
torch.masked makes its masks on the device that a parameter says, where it needs one
    sometimes result on meta | waiting, dtensor | masked.*
a storage is on meta; what reads or writes it is refused
    result on meta | all | torch.Tensor.untyped_storage *
    result on meta | local |
        storage all; storage 0; storage, *; torch.Tensor.storage *; typed storage all; typed
        storage 0; typed storage, *
torch's meta kernel takes a shape that the real one refuses
    accepted, and eager raises | local | addr 1 in place all
called as a function it copies what is no leaf of a graph
    accepted, and eager raises | parameter | torch.Tensor.__deepcopy__ *
the storage of a shard has no guard
    accepted, and eager raises | dtensor | storage resize_*
torch's real kernel resizes the tensor, and its meta kernel does not
    not to be materialised | local | addbmm 1 in place all
a gradient on meta, of a forward pass on meta, has to be removed first, as the error says
    not to be materialised | parameter, dtensor among meta, fake | backward of real, *
torch takes no question about a view that was made without gradients and written with them
    not to be materialised | parameter, dtensor | row copy_ of real all; row of real copy_ all
    foreign error | dtensor | row copy_ of real 0
torch draws before it asks for the values that are refused
    refused half-way | module | Module: spectral_norm
the generator of DTensor is moved before the op of the local part
    refused half-way | dtensor | torch.nn.functional.dropout*
torch asks nothing of a deferred tensor or storage that is given to a real one
    foreign error | all | data of real = it*0
    foreign error | local | real set_ of its storage*0; tensor on its storage*
    foreign error | plain, buffer, parameter, shard | real storage copy_*0
on meta torch.masked.median is refused as not deterministic
    sometimes foreign error | waiting, dtensor | masked.median 1 *
torch's parser takes no tensors with a hook for this out=
    foreign error | waiting | _native_batch_norm_legit ? out= all
torch's decomposition for other devices mixes DTensors with tensors
    foreign error | dtensor |
        nn.functional.interpolate.bilinear *; nn.functional.interpolate.trilinear *;
        nn.functional.upsample_bilinear *
torch compares the devices of an out= on meta and of a fake tensor
    sometimes foreign error | waiting among fake | linalg.matrix_rank* 1 out= *
a shard says meta to dlpack
    foreign error | dtensor among real, fake | dlpack*; torch.Tensor.__dlpack_device__ *
a real tensor does not tell of the gradient that it is given
    foreign error | plain, buffer | SGD* all; AdamW* all
torch draws before it looks at the shard
    sometimes refused half-way | dtensor | torch.nn.functional.gumbel_softmax 0
torch/nn/utils/prune.py registers the parameter again, as the last one
    sometimes refused half-way | module | Module: prune at random
torch compares the devices of tensors on meta and of parameters
    sometimes foreign error | waiting among meta, fake | nn.functional.linear_cross_entropy*
the copy that module_load makes first has no name
    refused without the name | dtensor | torch.Tensor.module_load 0
"""


@dataclass
class Known:
    """Calls that fail in one way, for one reason; ``seen`` is whether one was seen to."""

    reason: str
    outcome: str
    calls: str
    kinds: str = "all"
    others: str = "real"
    may: bool = False
    seen: bool = False

    def __post_init__(self) -> None:
        patterns = (fnmatch.translate(call.strip()) for call in self.calls.split(";"))
        self._is_call = re.compile("|".join(patterns)).fullmatch
        self._kinds = {k for name in self.kinds.split(", ") for k in KINDS.get(name, (name,))}

    def holds(self, name: str) -> bool:
        """Whether it is about the call of this name."""
        call, _, among = name.partition(" @ ")
        kind, _, others = among.partition(" among ")
        return kind in self._kinds and others in self.others and bool(self._is_call(call))


def _entries() -> Iterator[Known]:
    reason = ""
    for line in re.sub(r"\n {8}", " ", TABLE).strip().splitlines():
        if not line.startswith(" "):
            reason = line
            continue
        outcome, among, calls = line.strip().split(" | ")
        kinds, _, others = among.partition(" among ")
        always = outcome.removeprefix("sometimes ")
        yield Known(reason, always, calls, kinds, others or "real", always != outcome)


KNOWN = list(_entries())
