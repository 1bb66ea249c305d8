"""Facts about torch's operators that their schemas and tags do not state: a row for each operator.

To teach lateinit about an operator, add a row. Only facts that lateinit relies on are stated: a
field that is left out promises nothing. ``operators.op_info`` joins a row with the schema.
``tests/torch_contract/test_op_table.py`` runs every operator of the table and compares what it does
with its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

_Number = int | float
FilledBy = tuple[str, tuple[str | _Number, ...]]
UNINITIALISED: FilledBy = ("", ())
"""The ``filled_by`` of factories that leave memory uninitialised, such as ``empty``."""

ZERO = "aten::zero_"
FILL = "aten::fill_.Scalar"
UNIFORM = "aten::uniform_"
NORMAL = "aten::normal_"
INTEGERS = "aten::random_.from"


@dataclass(frozen=True, slots=True)
class OpTraits:
    """One row.

    Attributes:
        fills: whether the op writes every element of ``self`` and reads none. A schema marks only
            that ``self`` is written.
        elementwise: whether each element of its result depends on the element of ``self`` at the
            same place, and on numbers, alone. An in-place op may then be run on pieces of a tensor
            (``_replay.chunks`` tries first whether the bits agree). A result has the shape of
            ``self``.
        allocates: for an op that makes new memory, the source of its shape: an argument ``size``; a
            tensor of the same shape ("like"); an argument ``size``, with a tensor that gives dtype
            and device ("new"); a number of elements ("count"); a start, an end and a step
            ("range"); or nothing, as the result is one number ("one").
        filled_by: for a factory, the in-place op that gives its memory the values, with that op's
            numbers or the names of the factory's arguments that are these numbers.
        copies: the position of the argument whose values its result has.
        draws: the number of words that the op draws from a CPU generator depends on the number of
            elements, dtype and layout, and on: nothing else ("fixed"), its numbers ("numbers"),
            the width of its range ("range"), or values, so that it must be run ("values"). None if
            it draws nothing, or draws through ``filled_by``.
        numbers: the numbers of a trial. If ``draws`` is "fixed", they stand for all others.
        usual: a test for numbers that the op surely accepts, for every floating-point dtype.
        method: whether the method of ``Tensor`` with its name, given numbers, calls this overload.
            Calling an ``OpOverload`` from Python takes as long as a small fill; a method is faster.
        layout_only: whether it answers from layouts alone, without values.
        spoken: its name in messages, if users know the op by another name.
        writes_unsaid: the positions of arguments that it writes although its schema does not mark
            them.
        layout: where the layout of its results comes from, if not from its meta kernel: a run of
            the real kernel on small tensors (``_recording.layouts``), always ("asked") or only if
            an argument is not contiguous ("asked if permuted"); torch's choice of backend
            ("convolution"); or a run on the real values ("values"), for results that are not
            windows on a storage.
    """

    fills: bool = False
    elementwise: bool = False
    allocates: Literal["size", "like", "new", "count", "range", "one"] | None = None
    filled_by: FilledBy | None = None
    copies: int | None = None
    draws: Literal["fixed", "numbers", "range", "values"] | None = None
    numbers: tuple[_Number, ...] = ()
    usual: Callable[..., bool] | None = None
    method: bool = False
    layout_only: bool = False
    spoken: str | None = None
    writes_unsaid: tuple[int, ...] = ()
    layout: Literal["asked", "asked if permuted", "convolution", "values"] | None = None


# uniform_ checks its bounds and their difference, and other ops each number, against the dtype's
# range (aten/src/ATen/native/DistributionTemplates.h, c10/util/TypeCast.h). The smallest one is
# float16's, 65504 > 2 * 3e4.
_FAR = 3e4
_REAL = frozenset({int, float})


def _near(*numbers: Any) -> bool:
    return _REAL.issuperset(map(type, numbers)) and all(-_FAR <= n <= _FAR for n in numbers)


def _bounds(low: _Number = 0.0, high: _Number = 1.0) -> bool:
    return -_FAR <= low <= high <= _FAR


def _scale(mean: _Number = 0.0, std: _Number = 1.0) -> bool:
    return std >= 0


_fill = partial(OpTraits, fills=True)
_size = partial(OpTraits, allocates="size")
_like = partial(OpTraits, allocates="like")
_new = partial(OpTraits, allocates="new")
_arithmetic = partial(OpTraits, elementwise=True, usual=_near)
_asked = OpTraits(layout="asked")
_permuted = OpTraits(layout="asked if permuted")
_by_values = OpTraits(layout="values")
_ZEROS: FilledBy = (ZERO, ())
_ONES: FilledBy = (FILL, (1,))
_FULL: FilledBy = (FILL, ("fill_value",))
_HIGH: FilledBy = (INTEGERS, (0, "high"))
_LOW_HIGH: FilledBy = (INTEGERS, ("low", "high"))

# Operators with the same facts share a row.
_ROWS: dict[str, OpTraits] = {
    # In-place fills.
    "zero_": _fill(elementwise=True, method=True),
    "fill_.Scalar": _fill(elementwise=True, method=True, numbers=(0.3,), usual=_near),
    "fill_.Tensor": _fill(),
    "copy_": _fill(copies=1),
    "uniform_": _fill(draws="fixed", elementwise=True, method=True, usual=_bounds),
    "normal_": _fill(draws="fixed", elementwise=True, method=True, usual=_scale),
    "cauchy_ log_normal_ random_": _fill(draws="fixed"),
    "geometric_": _fill(draws="fixed", numbers=(0.5,)),
    "bernoulli_.float": _fill(draws="numbers", numbers=(0.3,)),
    "exponential_": _fill(draws="numbers", numbers=(2.5,)),
    "random_.to": _fill(draws="range", numbers=(2,)),
    "random_.from": _fill(draws="range", numbers=(0, 2)),
    "bernoulli_.Tensor": _fill(draws="values"),
    # Factories.
    "empty.memory_format empty_strided": _size(filled_by=UNINITIALISED),
    "zeros": _size(filled_by=_ZEROS),
    "ones": _size(filled_by=_ONES),
    "full": _size(filled_by=_FULL, numbers=(0.3,)),
    "empty_like": _like(filled_by=UNINITIALISED),
    "zeros_like": _like(filled_by=_ZEROS),
    "ones_like": _like(filled_by=_ONES),
    "full_like": _like(filled_by=_FULL, numbers=(0.3,)),
    "new_empty new_empty_strided": _new(filled_by=UNINITIALISED),
    "new_zeros": _new(filled_by=_ZEROS),
    "new_ones": _new(filled_by=_ONES),
    "new_full": _new(filled_by=_FULL, numbers=(0.3,)),
    "empty.out": OpTraits(filled_by=UNINITIALISED),
    "zeros.out": OpTraits(filled_by=_ZEROS),
    "ones.out": OpTraits(filled_by=_ONES),
    "full.out": OpTraits(filled_by=_FULL, numbers=(0.3,)),
    "scalar_tensor": OpTraits(allocates="one", filled_by=(FILL, ("s",)), numbers=(0.3,)),
    "arange": OpTraits(allocates="range", numbers=(5,)),
    "arange.start": OpTraits(allocates="range", numbers=(-2, 5)),
    "arange.start_step": OpTraits(allocates="range", numbers=(-2, 5, 3)),
    "rand rand.generator": _size(filled_by=(UNIFORM, ())),
    "randn randn.generator": _size(filled_by=(NORMAL, ())),
    "normal.float_float": _size(filled_by=(NORMAL, ("mean", "std")), numbers=(0.5, 2.0)),
    "randint randint.generator": _size(filled_by=_HIGH, numbers=(9,)),
    "randint.low randint.low_generator": _size(filled_by=_LOW_HIGH, numbers=(-2, 9)),
    "rand_like rand_like.generator": _like(filled_by=(UNIFORM, ())),
    "randn_like randn_like.generator": _like(filled_by=(NORMAL, ())),
    "randint_like randint_like.generator": _like(filled_by=_HIGH, numbers=(9,)),
    "randint_like.low_dtype": _like(filled_by=_LOW_HIGH, numbers=(-2, 9)),
    "randint_like.low_generator_dtype": _like(filled_by=_LOW_HIGH, numbers=(-2, 9)),
    "randint_like.Tensor randint_like.Tensor_generator": _like(draws="values"),
    "randperm randperm.generator": OpTraits(allocates="count", draws="fixed"),
    # Copies.
    "clone _to_copy lift_fresh_copy": OpTraits(copies=0),
    # Arithmetic in place.
    "mul_.Tensor mul_.Scalar div_.Tensor": _arithmetic(numbers=(0.3,)),
    "add_.Tensor add_.Scalar sub_.Tensor": _arithmetic(numbers=(0.3,)),
    "clamp_ clamp_min_ clamp_max_": _arithmetic(numbers=(0.3,)),
    "neg_ abs_ erfinv_": _arithmetic(),
    "exp_ log_ sqrt_ rsqrt_ reciprocal_ sin_ cos_": OpTraits(usual=_near),
    "tanh_ sigmoid_ floor_ ceil_ trunc_": OpTraits(usual=_near),
    # Arithmetic that makes a new tensor.
    "relu sigmoid tanh gelu silu mish elu leaky_relu": OpTraits(elementwise=True),
    "hardswish hardsigmoid hardtanh softplus": OpTraits(elementwise=True),
    "erf exp sqrt rsqrt sin cos neg abs": OpTraits(elementwise=True),
    "mul.Scalar add.Scalar sub.Scalar div.Scalar": OpTraits(elementwise=True, numbers=(0.3,)),
    "clamp clamp_min clamp_max": OpTraits(elementwise=True, numbers=(0.3,)),
    "pow.Tensor_Scalar": OpTraits(elementwise=True, numbers=(2,)),
    # These update running statistics (aten/src/ATen/native/native_functions.yaml).
    "native_batch_norm": OpTraits(writes_unsaid=(3, 4), layout="asked"),
    "cudnn_batch_norm miopen_batch_norm": OpTraits(writes_unsaid=(3, 4)),
    "batch_norm_gather_stats": OpTraits(writes_unsaid=(3, 4)),
    "batch_norm_gather_stats_with_counts": OpTraits(writes_unsaid=(3, 4)),
    "batch_norm_update_stats": OpTraits(writes_unsaid=(1, 2)),
    # Their meta kernels give other layouts than those of the CPU, or other auxiliary results.
    "_linalg_svd linalg_eig _fft_c2r _fft_r2c nonzero_static": _asked,
    "_native_batch_norm_legit _native_batch_norm_legit.no_stats _batch_norm_with_update": _asked,
    "native_layer_norm _embedding_bag _embedding_bag_forward_only": _asked,
    "mul.Tensor pow.Scalar copysign.Tensor div.Tensor_mode floor_divide heaviside": _permuted,
    "ldexp.Tensor logaddexp logical_and logical_or logical_xor xlogy.Tensor": _permuted,
    "special_xlog1py angle log_sigmoid_forward": _permuted,
    "poisson _standard_gamma rrelu_with_noise normal.Tensor_Tensor normal.float_Tensor": _permuted,
    "channel_shuffle pixel_shuffle max_unpool2d nll_loss2d_forward": _permuted,
    "reflection_pad2d reflection_pad3d replication_pad2d replication_pad3d": _permuted,
    "native_dropout_backward _log_softmax_backward_data": _permuted,
    "hardswish_backward hardtanh_backward leaky_relu_backward threshold_backward": _permuted,
    "logit_backward mse_loss_backward huber_loss_backward smooth_l1_loss_backward": _permuted,
    "native_layer_norm_backward replication_pad2d_backward": _permuted,
    "convolution convolution_backward": OpTraits(layout="convolution"),
    # Quantised and nested tensors have no meta kernel, or one that gives a plain tensor.
    "quantize_per_tensor quantize_per_channel quantize_per_tensor_dynamic": _by_values,
    "quantize_per_tensor.tensor_qparams quantize_per_tensor.tensors": _by_values,
    "_local_scalar_dense": OpTraits(spoken="item"),
    "is_pinned is_same_size": OpTraits(layout_only=True),
}
OP_TABLE: dict[str, OpTraits] = {
    f"aten::{name}": traits for names, traits in _ROWS.items() for name in names.split()
}
"""The rows, by the qualified names of overloads."""

_CHECKING = (
    # Probabilities, rates and deviations.
    "bernoulli binary_cross_entropy multinomial normal poisson",
    # Matrices. Most other checks of linalg are an op of their own, `_linalg_check_errors`.
    "cholesky cholesky_inverse linalg_cholesky_ex linalg_eig linalg_inv_ex linalg_lstsq",
    "linalg_lu_solve linalg_pinv _linalg_eigh _linalg_eigvals linalg_eigvals linalg_eigvalsh",
    "linalg_svdvals linalg_cond linalg_matrix_norm linalg_matrix_rank _linalg_svd lu_unpack",
    # Indices, and values that are counted.
    "embedding _embedding_bag _embedding_bag_forward_only gather index index_add index_copy",
    "index_fill index_put _index_put_impl index_reduce index_select masked_scatter max_unpool2d",
    "max_unpool3d multi_margin_loss multilabel_margin_loss_forward nll_loss_forward put",
    "nll_loss2d_forward scatter scatter_add scatter_reduce searchsorted segment_reduce take",
    # Integers, which must not be divided by zero, and bounds.
    "div floor_divide fmod remainder histc histogram _histogramdd_bin_edges",
)
VALUE_CHECKS = frozenset(name for row in _CHECKING for name in row.split())
"""Operators, without overloads, whose kernels refuse some values of tensors."""
