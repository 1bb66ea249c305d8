"""The part of ``after_block_known`` that is refused, by an error of torch or without a name."""

from __future__ import annotations

FOREIGN: dict[tuple[str, str], dict[str, str]] = {
    (
        "`.data` is set to or from a tensor that is not on meta",
        "foreign error",
    ): {
        "* among *": """
            Module: data *; data = real ?; data = real, recording gradients ?; data of real = it ?;
            data of real = it, recording gradients ?
        """,
        "* among fake": """
            vector_to_parameters *; vector_to_parameters, *
        """,
        (
            "* among real / "
            "buffer among * / "
            "parameter among * / "
            "plain among * / "
            "shard among * / "
            "view among *"
        ): """
            vector_to_parameters ?; vector_to_parameters, recording gradients ?
        """,
    },
    (
        "a real gradient",
        "foreign error",
    ): {
        "* among *": """
            grad = real ?; grad = real, recording gradients ?
        """,
        "* among fake": """
            AdamW *; AdamW, *; SGD *; SGD, *
        """,
        "* among real": """
            AdamW ?; AdamW, recording gradients ?; SGD ?; SGD, recording gradients ?
        """,
    },
    (
        "a storage, or a tensor's set_ to one, is not guarded",
        "foreign error",
    ): {
        "* among *": """
            data.set_ of a real storage ?; data.set_ of a real storage, recording gradients ?
        """,
        "* among real": """
            real set_ of its storage ?; real set_ of its storage, recording gradients ?;
            storage cpu*; storage item*; storage tolist*; tensor *; typed storage item*
        """,
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            data.set_ of real ?; data.set_ of real, recording gradients ?; set_ of real ?
        """,
        "buffer among * / plain among * / shard among * / view among *": """
            set_ of real, recording gradients ?
        """,
        "buffer among real / parameter among real / plain among real / shard among real": """
            real storage copy_ ?; real storage copy_, recording gradients ?
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            real set_ of it ?; real set_ of it, recording gradients ?
        """,
    },
    (
        "an export of its memory is refused by torch",
        "foreign error",
    ): {
        "* among *": """
            torch.Tensor.__dlpack_device__ *
        """,
        "* among fake / * among real": """
            dlpack *; dlpack, *
        """,
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            torch.Tensor.__array__ *
        """,
    },
    (
        "an item of it in a list given to torch.tensor",
        "foreign error",
    ): {
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            torch.lobpcg *
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            torch.tensor of *
        """,
    },
    (
        "an op on DTensors is refused by torch, not by name",
        "foreign error",
    ): {
        "dtensor among *": """
            corrcoef 0 *; cov *; masked.median ? function all;
            nn.functional.interpolate.bilinear *; nn.functional.interpolate.trilinear *;
            nn.functional.upsample_bilinear *; tensor_split 1 function all;
            tensor_split 1 method all
        """,
        "dtensor among real": """
            tensor_split 1 function 1; tensor_split 1 method 1
        """,
    },
    (
        "copy_ of a fake tensor is taken for a load of real values",
        "foreign error",
    ): {
        "buffer among fake / plain among fake / shard among fake / view among fake": """
            row copy_ *
        """,
        "parameter among fake": """
            row copy_ of real *
        """,
        "view among fake": """
            copy_ *; data.copy_ *; lu ? out= out; torch.Tensor.copy_ 0
        """,
    },
    (
        "load_state_dict wraps the refusal in its own error",
        "foreign error",
    ): {
        "* among *": """
            Module: load_state_dict into a *; Module: load_state_dict of its own
        """,
    },
    (
        "torch compares the devices of its arguments above the dispatcher",
        "foreign error",
    ): {
        "* among fake": """
            diff *; inner *; linalg.matrix_power 1 out= into *; linalg.matrix_rank 1 out= into *;
            linalg.matrix_rank.hermitian 1 out= into *; linalg.multi_dot *; special.ndtr *;
            take_along_dim 0 function *; take_along_dim 0 method *; tensordot ? out= *;
            torch.nn.functional.scaled_dot_product_attention *
        """,
        "* among fake / * among real": """
            linalg.cond ? out= into *; linalg.matrix_norm ? out= out; linalg.norm ? out= out;
            linalg.norm.subgradients_at_zero ? out= out; linalg.tensorinv ? out= into *;
            linalg.tensorsolve ? out= into *; linalg.vecdot ? out= out; norm.nuc ? out= out
        """,
        "* among real": """
            diff ? out= into *; diff ? out= out; inner ? function 0; inner ? function 1;
            inner ? method 0; inner ? method 1; inner ? out= into *; inner ? out= out;
            linalg.matrix_power ? out= into *; linalg.matrix_rank ? out= into *;
            linalg.matrix_rank.hermitian ? out= into *; linalg.multi_dot ? function 0;
            linalg.multi_dot ? function 1; linalg.multi_dot ? out= into *;
            linalg.multi_dot ? out= out; linalg.pinv 1 out= into *; special.ndtr ? out= into *;
            special.ndtr ? out= out; take_along_dim 0 function 0; take_along_dim 0 function 1;
            take_along_dim 0 method 0; take_along_dim 0 method 1; tensordot ? out= into *;
            tensordot ? out= out; torch.nn.functional.scaled_dot_product_attention ?
        """,
        "buffer among * / parameter among * / plain among * / shard among * / view among *": """
            tensor_split ? method all
        """,
        "buffer among * / parameter among * / plain among * / view among *": """
            arange *; eye *; full *; linspace *; linspace.tensor_overload ? out= all; logspace *;
            logspace.tensor_overload ? out= all; masked.median ? function all;
            normal.number_mean *; ones *; tensor_split ? function all; zeros ? *
        """,
        "buffer among * / plain among * / view among *": """
            empty *; randn *
        """,
        (
            "buffer among fake / "
            "buffer among real / "
            "parameter among fake / "
            "parameter among real / "
            "plain among fake / "
            "plain among real / "
            "shard among fake / "
            "shard among real / "
            "view among fake / "
            "view among real"
        ): """
            linspace.tensor_overload ? out= out; logspace.tensor_overload ? out= out
        """,
        (
            "buffer among fake / "
            "parameter among fake / "
            "plain among fake / "
            "shard among fake / "
            "view among fake"
        ): """
            all_gather into it*; cartesian_prod *; scatter into *; take_along_dim *
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            all_gather into it ?; all_gather into it, recording gradients ?;
            cartesian_prod 1 function 0; cartesian_prod ? function 1; nanquantile ? out= into *;
            nanquantile ? out= out; nn.functional.scaled_dot_product_attention ? function 0;
            nn.functional.scaled_dot_product_attention ? function 1;
            nn.functional.scaled_dot_product_attention ? function 2; quantile ? out= into *;
            quantile ? out= out; scatter into real ?; scatter into real, recording gradients ?;
            take_along_dim ? function 0; take_along_dim ? function 1; take_along_dim ? method 0;
            take_along_dim ? method 1; take_along_dim ? out= into *; take_along_dim ? out= out;
            tensor_split ? function 1; tensor_split ? method 1
        """,
        "dtensor among *": """
            eye 1 *
        """,
        "dtensor among fake": """
            linalg.cond *; linalg.matrix_norm *; linalg.matrix_power 1 *; linalg.matrix_rank 1 *;
            linalg.matrix_rank.hermitian 1 *; linalg.norm *; linalg.norm.subgradients_at_zero *;
            linalg.tensorinv *; linalg.tensorsolve ? out= *; linalg.vecdot ? out= *; norm.nuc *
        """,
        "dtensor among real": """
            linalg.cond ? out= out; linalg.matrix_norm ? out= into *;
            linalg.matrix_power ? out= out; linalg.matrix_rank ? out= out;
            linalg.matrix_rank.hermitian ? out= out; linalg.norm ? out= into *;
            linalg.norm.subgradients_at_zero ? out= into *; linalg.pinv 1 out= out;
            linalg.tensorinv ? out= out; linalg.tensorsolve ? out= out;
            linalg.vecdot ? out= into *; norm.nuc ? out= into *
        """,
        "shard among *": """
            arange ? out= out; empty ? out= out; eye ? out= out; full ? out= out;
            linspace ? out= out; logspace ? out= out; normal.number_mean ? out= out;
            ones ? out= out; randn ? out= out; zeros ? out= out
        """,
    },
    (
        "torch makes a tensor on the device that it says, meta, and combines them",
        "foreign error",
    ): {
        (
            "buffer among fake / "
            "buffer among real / "
            "parameter among fake / "
            "parameter among real / "
            "plain among fake / "
            "plain among real / "
            "shard among fake / "
            "shard among real / "
            "view among fake / "
            "view among real"
        ): """
            linalg.cond ? out= out; linalg.matrix_norm ? out= into *; linalg.norm ? out= into *;
            linalg.norm.subgradients_at_zero ? out= into *; linalg.tensorinv ? out= out;
            linalg.tensorsolve ? out= out; linalg.vecdot ? out= into *; norm.nuc ? out= into *
        """,
        (
            "buffer among fake / "
            "parameter among fake / "
            "plain among fake / "
            "shard among fake / "
            "view among fake"
        ): """
            linalg.matrix_power 1 out= out; linalg.matrix_rank 1 out= out;
            linalg.matrix_rank.hermitian 1 out= out
        """,
        (
            "buffer among real / "
            "parameter among real / "
            "plain among real / "
            "shard among real / "
            "view among real"
        ): """
            linalg.matrix_power ? out= out; linalg.matrix_rank ? out= out;
            linalg.matrix_rank.hermitian ? out= out; linalg.pinv 1 out= out
        """,
    },
    (
        "what was made after the block is written op by op, until one is refused",
        "foreign error",
    ): {
        "shard among *": """
            _native_batch_norm_legit ? out= all; arange ? out= all; empty ? out= all;
            eye ? out= all; full ? out= all; linspace ? out= all;
            linspace.tensor_overload ? out= all; logspace ? out= all;
            logspace.tensor_overload ? out= all; masked.median ? function all;
            normal.number_mean ? out= all; ones ? out= all; randn ? out= all;
            tensor_split ? function all; zeros ? out= all
        """,
    },
    (
        "a reader that is given it second names the tensor that it is given first",
        "refused without the name",
    ): {
        "buffer among * / parameter among * / shard among * / view among *": """
            torch.Tensor.map2_ 1; torch.Tensor.map2_ 2; torch.Tensor.map_ 1
        """,
    },
    (
        "a step on an intermediate tensor is refused, which has no name",
        "refused without the name",
    ): {
        "buffer among * / parameter among * / shard among * / view among *": """
            corrcoef *; cov *
        """,
        "buffer among fake / parameter among fake / shard among fake / view among fake": """
            linalg.cholesky ? out= into *; linalg.det ? out= into *; linalg.eigvalsh ? out= into *;
            linalg.inv ? out= into *; linalg.ldl_factor ? out= into *;
            linalg.lu_factor ? out= into *; linalg.slogdet ? out= into *;
            linalg.svdvals ? out= into *; msort ? out= into *;
            nn.functional.logsigmoid ? out= into *
        """,
        "buffer among real / parameter among real / shard among real / view among real": """
            nn.functional.cosine_similarity ? function 0
        """,
    },
}
