"""What is known to be neither honoured nor refused: the cause, the outcome and the calls.

A call in this table that is honoured or refused fails its test, so that it is taken from here. Each
entry has the kinds of tensor on one line, as ``kind among others``, and then calls; ``*`` stands
for any, ``?`` for any number of a sample.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field

from tests.support.after_block_foreign import FOREIGN


@dataclass
class Known:
    """Calls that fail in one way, for one reason."""

    reason: str
    outcome: str
    pattern: str
    seen: bool = False

    def __post_init__(self) -> None:
        self._matches = re.compile(fnmatch.translate(self.pattern)).match

    def holds(self, name: str) -> bool:
        """Whether it is about the call of this name."""
        return self._matches(name) is not None


@dataclass
class Table:
    """Finds what is known of a call by the first word of its name."""

    every: list[Known]
    _by_word: dict[str, list[Known]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for known in self.every:
            self._by_word.setdefault(known.pattern.partition(" ")[0], []).append(known)

    def of(self, name: str) -> Known | None:
        """What is known of a call, if anything."""
        found = self._by_word.get(name.partition(" ")[0], [])
        return next((known for known in found if known.holds(name)), None)


# (reason, outcome): lines of kinds, each followed by its calls.
CAUSES: dict[tuple[str, str], dict[str, str]] = {
    (
        "Tensor.__deepcopy__ called as a function copies the window, not the storage",
        "wrong",
    ): {
        "view among *": """
            torch.Tensor.__deepcopy__ *
        """,
    },
    (
        "`to` the device that it was recorded for makes a copy",
        "wrong",
    ): {
        "* among *": """
            torch.Tensor.cpu *
        """,
        "* among real": """
            cpu *; cpu, *; to cpu *; to cpu, recording *; to device of real ?;
            to device of real, recording gradients ?; to real ?; to real, recording gradients ?;
            torch.Tensor.type_as 0; type_as real ?; type_as real, recording gradients ?
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            real to it ?; real to it, recording gradients ?; real type_as it ?;
            real type_as it, recording gradients ?; torch.Tensor.type_as ?
        """,
    },
    (
        "a meta kernel says other strides",
        "wrong",
    ): {
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            fft.rfftn 1 function *; linalg.eig 0 function *
        """,
    },
    (
        "a storage, or a tensor's set_ to one, is not guarded",
        "wrong",
    ): {
        "* among *": """
            real storage copy_ all; real storage copy_, recording gradients all;
            storage copy_ of real all; storage copy_ of real, recording gradients all
        """,
        "* among real": """
            storage fill_*
        """,
        "buffer among real / parameter among real / plain among real / shard among real": """
            storage copy_ *
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            storage resize_*
        """,
    },
    (
        "an op on DTensors is refused by torch, not by name",
        "wrong",
    ): {
        "dtensor among *": """
            fft.rfftn 1 function *; linalg.eig 0 function *
        """,
    },
    (
        "autocast is not in force while an op on it is recorded",
        "wrong",
    ): {
        "* among *": """
            autocast all; autocast, recording gradients all
        """,
    },
    (
        "copy_ of a fake tensor is taken for a load of real values",
        "wrong",
    ): {
        "buffer among fake / parameter among fake / plain among fake / shard among fake": """
            copy_ *; data.copy_ *; torch.Tensor.copy_ 0
        """,
        "buffer among fake / plain among fake / shard among fake": """
            lu ? out= out
        """,
    },
    (
        "orthogonal draws if a tensor is not on meta",
        "wrong",
    ): {
        "* among *": """
            Module: orthogonal
        """,
    },
    (
        "the address of memory that there is not is 0",
        "wrong",
    ): {
        "buffer among real / parameter among real / plain among real / shard among real": """
            const_data_ptr *; data_ptr *
        """,
    },
    (
        "to_empty and a move to meta leave what they replace deferred",
        "wrong",
    ): {
        "* among *": """
            Module: to meta; Module: to_empty; Module: to_empty *; Module: to_empty, *
        """,
    },
    (
        "torch takes another kernel, or another path, for meta tensors",
        "wrong",
    ): {
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            nn.functional.interpolate.bilinear *; nn.functional.interpolate.trilinear *;
            nn.functional.upsample_bilinear *
        """,
        "buffer among * / parameter among * / plain among * / view among *": """
            linalg.matrix_rank 0 out= all; linalg.matrix_rank.hermitian 0 out= all
        """,
        "buffer among * / plain among * / shard among * / view among *": """
            linalg.cond ? function *; linalg.eigvalsh 0 function *; linalg.svdvals ? function *;
            norm.nuc 1 function *; norm.nuc 1 method *
        """,
    },
    (
        "what was made after the block is written op by op, until one is refused",
        "wrong",
    ): {
        "shard among *": """
            linalg.cond 1 out= all; linalg.matrix_rank 0 out= all;
            linalg.matrix_rank.hermitian 0 out= all; native_batch_norm 1 out= all;
            norm.nuc 1 out= all
        """,
        "shard among meta": """
            AdamW *; AdamW, *
        """,
    },
    (
        "Tensor.__deepcopy__ called as a function copies the window, not the storage",
        "accepted, and eager raises",
    ): {
        "parameter among *": """
            torch.Tensor.__deepcopy__ *
        """,
    },
    (
        "a load into a parameter does not ask whether gradients are recorded",
        "accepted, and eager raises",
    ): {
        "parameter among real": """
            copy_ of real, recording gradients ?; row copy_ of real, recording gradients ?
        """,
    },
    (
        "a storage, or a tensor's set_ to one, is not guarded",
        "accepted, and eager raises",
    ): {
        "dtensor among real": """
            storage resize_*
        """,
    },
    (
        "a deferred gradient is noticed when its tensor is materialised",
        "refused half-way",
    ): {
        "parameter among *": """
            AdamW all; AdamW, recording gradients all; SGD all; SGD, recording gradients all
        """,
    },
    (
        "what was made after the block is written op by op, until one is refused",
        "refused half-way",
    ): {
        "shard among *": """
            linalg.cholesky ? out= all; linalg.inv 0 out= all; linalg.ldl_factor ? out= all;
            linalg.lu_factor ? out= all; linalg.solve ? out= all; lu ? out= all
        """,
    },
    (
        "`to` the device that it was recorded for makes a copy",
        "result on meta",
    ): {
        "dtensor among real": """
            real to it ?; real to it, recording gradients ?; real type_as it ?;
            real type_as it, recording gradients ?; torch.Tensor.type_as 1
        """,
    },
    (
        "a storage, or a tensor's set_ to one, is not guarded",
        "result on meta",
    ): {
        "* among *": """
            storage all; torch.Tensor.storage *; torch.Tensor.untyped_storage *; typed storage all
        """,
        "* among real": """
            storage ?; storage clone*; storage, *; typed storage ?; typed storage, *
        """,
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            torch.Tensor.set_ *
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            set_ to *
        """,
    },
    (
        "torch makes a tensor on the device that it says, meta, and combines them",
        "result on meta",
    ): {
        "* among *": """
            masked.amax ? function all; masked.amin ? function all; masked.argmax ? function all;
            masked.argmin ? function all; masked.cumprod ? function all;
            masked.cumsum ? function all; masked.log_softmax ? function all;
            masked.logaddexp 1 function all; masked.mean ? function all;
            masked.norm ? function all; masked.prod ? function all; masked.softmax ? function all;
            masked.softmin ? function all; masked.std 0 *; masked.std ? function all;
            masked.sum ? function all; masked.var 0 *; masked.var ? function all; new_tensor all
        """,
        "* among real": """
            masked.amax 1 function 0; masked.amin 1 function 0; masked.argmax 1 function 0;
            masked.argmin 1 function 0; masked.mean ? function 0; masked.norm 1 function 0;
            masked.prod 1 function 0; masked.sum 1 function 0; new_tensor ?; new_tensor, *
        """,
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            __getitem__ 0 *; masked.logsumexp ? function all;
            nn.functional.fractional_max_pool2d *; nn.functional.fractional_max_pool3d *;
            pca_lowrank ? function all; svd_lowrank ? function all;
            torch.nn.functional.fractional_max_pool2d *;
            torch.nn.functional.fractional_max_pool2d_with_indices *;
            torch.nn.functional.fractional_max_pool3d *;
            torch.nn.functional.fractional_max_pool3d_with_indices *
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            masked.logsumexp 1 function 0; zeros on *
        """,
        "dtensor among *": """
            linalg.matrix_rank ? function *; linalg.matrix_rank.hermitian ? function *;
            linalg.pinv 1 function *; logdet *; nanquantile ? function *; nanquantile ? method *;
            pinverse *; quantile ? function *; quantile ? method *
        """,
    },
    (
        "a DTensor of partial sums, or of empty memory, has no part to compute",
        "not to be materialised",
    ): {
        "dtensor among *": """
            __rmatmul__ 0 function all; __rmatmul__ 0 method all; aminmax 0 function *;
            aminmax 0 method *; bucketize ? function all; dist ? function all; dist ? method all;
            dot ? function all; dot ? method all; einsum 0 *; empty_like *; inner 0 function all;
            inner 0 method all; linalg.matrix_norm ? function *; linalg.norm ? function *;
            linalg.norm.subgradients_at_zero ? function *; matmul 0 function all;
            matmul 0 method all; max.reduction_no_dim 0 function *;
            max.reduction_no_dim 0 method *; min.reduction_no_dim 0 function *;
            min.reduction_no_dim 0 method *; mm 1 function all; mm 1 method all; new_empty *;
            new_empty_strided *; nn.functional.binary_cross_entropy 1 function all;
            nn.functional.binary_cross_entropy_with_logits 1 function all;
            nn.functional.cosine_embedding_loss 1 function all;
            nn.functional.cross_entropy ? function all; nn.functional.embedding 0 function all;
            nn.functional.hinge_embedding_loss 1 function all;
            nn.functional.huber_loss 1 function all; nn.functional.l1_loss 1 function all;
            nn.functional.linear_cross_entropy 1 function all;
            nn.functional.mse_loss 1 function all; nn.functional.pairwise_distance 0 function all;
            nn.functional.smooth_l1_loss 1 function all;
            nn.functional.triplet_margin_loss ? function all;
            nn.functional.triplet_margin_with_distance_loss ? function all; norm ? function *;
            norm ? method *; norm.fro ? function *; norm.fro ? method *; norm.inf ? function *;
            norm.inf ? method *; prod *; sum_to_size 1 *; tensordot 1 function all;
            torch.frobenius_norm *; vdot ? function all; vdot ? method all
        """,
        "dtensor among real": """
            bucketize ? function 1; nn.functional.embedding 0 function 0
        """,
    },
    (
        "a deferred gradient is noticed when its tensor is materialised",
        "not to be materialised",
    ): {
        "* among *": """
            grad = real all; grad = real, recording gradients all
        """,
        "dtensor among *": """
            backward of real, recording gradients all; backward, *
        """,
        "dtensor among * / shard among *": """
            AdamW all; AdamW, recording gradients all; SGD all; SGD, recording gradients all
        """,
        (
            "dtensor among fake / dtensor among meta / parameter among fake / parameter among meta"
        ): """
            backward of real, *
        """,
        "dtensor among meta / parameter among meta": """
            AdamW *; AdamW, *; SGD *; SGD, *
        """,
    },
    (
        "an op on DTensors is refused by torch, not by name",
        "not to be materialised",
    ): {
        "dtensor among *": """
            row copy_ of real all; row of real copy_ all
        """,
    },
    (
        "what was made after the block is written op by op, until one is refused",
        "not to be materialised",
    ): {
        "shard among *": """
            _native_batch_norm_legit 1 function all; addbmm 1 in place all;
            native_batch_norm 1 function all
        """,
    },
}


def _known() -> list[Known]:
    return [
        Known(reason, outcome, f"{call.strip()} @ {kind}")
        for (reason, outcome), by_kinds in {**CAUSES, **FOREIGN}.items()
        for kinds, calls in by_kinds.items()
        for call in calls.split(";")
        for kind in kinds.split(" / ")
    ]


KNOWN = Table(_known())
