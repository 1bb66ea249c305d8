"""Calls of what a tensor has and ``op_db`` does not reach: getters, methods, and Python's own."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import get_overridable_functions, get_testing_overrides, resolve_name

from tests.support.deferred_kinds import Call, copied
from tests.support.op_calls import operators, shown, subsets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Given = list[Any]

ASKS_DEVICE = {
    *("device", "is_meta", "is_cpu", "get_device", "__dlpack_device__", "type", "storage_type"),
}
UNLIKE = {
    "_cdata": "an address",
    "_version": "counts writes, and a recorded write is counted once more where it is replayed",
    "_python_dispatch": "the guard hears ops",
    "__dir__": "lists the attributes that a guard adds",
    "data_ptr": "an address",
    "const_data_ptr": "an address",
}

# torch itself crashes: the storage of a DTensor has a size and no memory.
CRASHES_ON_DTENSOR = {
    *(
        "share_memory_",
        "apply_",
        "map_",
        "map2_",
        "storage fill_",
        "storage copy_ of real",
        "storage tolist",
    ),
    *("real storage copy_", "storage clone", "storage item", "storage cpu", "typed storage item"),
    *("tensor on its storage", "real set_ of its storage"),
    *("storage", "typed storage", "forking pickler", "data.set_ of a real storage"),
}
NOT_DISTRIBUTED = ("plain", "parameter", "buffer", "view", "shard")

# -- values ----------------------------------------------------------------------------------------


@functools.cache
def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(3, 3, generator=generator) + torch.eye(3)
    return {
        "matrix": matrix,
        "vector": torch.arange(1.0, 5.0),
        "ints": torch.arange(1, 10).view(3, 3),
        "bools": matrix > 1,
        "scalar": torch.tensor(2.5),
        "complex": torch.complex(matrix, matrix.T.contiguous()),
        "images": torch.rand(2, 4, 4, 4, generator=generator),
        "int32": torch.arange(4, dtype=torch.int32),
    }


class Same:
    """Stands for another tensor with the values of the first."""


S = Same()
ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    (),
    (S,),
    (0,),
    (0.5,),
    (2,),
    (0, 1),
    ((0,),),
    (S, S),
    ((3, 3),),
    (0.5, False),
    (0, 0, 1),
    (1.0, 2.0),
    ((0, 1), (1, 0)),
    (torch.float64,),
    (S, 0.5),
    (lambda v: v + 1,),
    (S, lambda a, b: a + b),
    (S, S, lambda a, b, c: a + b + c),
    (2, 1, 1),
)


# -- functions that can be overridden --------------------------------------------------------------

NOT_GENERATED = {
    "fbgemm_": "needs quantised weights, packed",
    "quantize": "quantised tensors cannot be recorded by values",
    "quantized_": "likewise",
    "choose_qparams": "likewise",
    "fused_moving_avg": "needs an observer's state",
    "fake_quantize": "needs a scale and a zero point; op_db has others of its family",
    "q_": "quantised",
    "qscheme": "quantised",
    "int_repr": "quantised",
    "dequantize": "quantised",
    "miopen_": "needs ROCm",
    "cudnn_": "needs CUDA",
    "batch_norm_": "needs CUDA",
    "cuda": "needs CUDA",
    "xpu": "needs XPU",
    "ipu": "needs IPU",
    "mtia": "needs MTIA",
    "record_stream": "needs CUDA",
    "pin_memory": "needs an accelerator",
    "_functional_assert_async": "needs a token",
    "_assert_async": "asks for a value on the device",
    "_fused_rms_norm": "nn.functional.rms_norm is in op_db",
    "_fw_primal_copy": "needs a level of forward gradients",
    "_make_dual_copy": "likewise",
    "_rowwise_prune": "packed weights",
    "_wrapped_": "packed weights",
    "_autocast_to": "private arguments",
    "_to_dense": "sparse",
    "affine_grid_generator": "nn.functional.affine_grid is called",
    "autocast": "takes no tensor; the acts below compute under it",
    "convolution": "the convolutions of nn.functional are in op_db",
    "embedding_bag": "that of nn.functional is called",
    "native_norm": "torch.norm is in op_db",
    "multi_head_attention_forward": "its ops are in op_db",
    "all_gather": "a collective: the acts below and test_guard call them",
    "all_reduce": "likewise",
    "all_to_all": "likewise",
    "broadcast": "likewise",
    "reduce": "likewise",
    "backward": "among the acts below",
    "register_": "likewise",
    "retain_grad": "likewise",
    "isend": "a group of one has nobody to send to; test_guard calls the ops",
    "irecv": "likewise",
    "send": "likewise",
    "recv": "likewise",
    "_sym_": "of symbolic numbers",
    "sym_": "of symbolic numbers, not of tensors",
    "sspaddmm": "sparse arguments",
    "smm": "likewise",
    "hspmm": "likewise",
    "spmm": "likewise",
    "sparse_": "likewise",
    "_sparse": "likewise",
    "_nested": "nested tensors",
    "_coalesced": "sparse",
    "coalesce": "sparse",
    "crow_": "sparse",
    "col_": "sparse",
    "ccol_": "sparse",
    "row_indices": "sparse",
    "indices": "sparse",
    "_indices": "sparse",
    "values": "sparse",
    "_values": "sparse",
    "_nnz": "sparse",
    "_dimI": "sparse",
    "_dimV": "sparse",
    "resize_as_sparse": "sparse",
    "is_coalesced": "sparse",
    "rnn_": "an RNN's packed weights; nn.RNN is called below as a module",
    "lstm": "likewise",
    "gru": "likewise",
}


def is_getter(function: Any) -> bool:
    return getattr(function, "__name__", "") in {"__get__", "__set__", "__delete__"}


@functools.cache
def reached() -> frozenset[str]:
    """The names of the functions that ``op_db`` calls."""
    names: set[str] = set()
    for operator in operators():
        for function in (operator.op, operator.method_variant, operator.inplace_variant):
            names |= {operator.name, getattr(function, "__name__", operator.name)}
    return frozenset(names)


def overridable() -> list[tuple[str, Any]]:
    """The functions that torch lets a tensor class override, less those of ``op_db``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {id(f): f for f in get_testing_overrides()}
        for functions in get_overridable_functions().values():
            found |= {id(f): f for f in functions}
    named = {
        str(resolve_name(f) or getattr(f, "__qualname__", f)): f
        for f in found.values()
        if not is_getter(f) and getattr(f, "__name__", "") not in reached()
    }
    return sorted(named.items())


def reason_for_not(name: str) -> str | None:
    last = name.rsplit(".", 1)[-1]
    return next((why for start, why in NOT_GENERATED.items() if last.startswith(start)), None)


@functools.cache
def accepted(function: Any) -> tuple[str, tuple[Any, ...]] | None:
    """The first of ``values`` and ``ARGUMENTS`` that a function takes."""
    for (kind, value), arguments in itertools.product(values().items(), ARGUMENTS):
        try:
            with torch.no_grad():
                given = [copied(value) for _ in range(count(arguments))]
                if applied(function, arguments)(given) is NotImplemented:
                    continue
        except Exception:  # noqa: BLE001 - it does not take these
            continue
        return kind, arguments
    return None


def count(arguments: tuple[Any, ...]) -> int:
    return 1 + sum(argument is S for argument in arguments)


def applied(function: Any, arguments: tuple[Any, ...]) -> Callable[[Given], Any]:
    def run(given: Given) -> Any:
        tensors = iter(given)
        first = next(tensors)
        return function(first, *(next(tensors) if a is S else a for a in arguments))

    return run


def pair(function: Any) -> Callable[[Given], Any]:
    return lambda given: function(list(given))


def with_more(function: Any, *more: Any) -> Callable[[Given], Any]:
    return lambda given: function(*given, *more)


WRITTEN: dict[str, tuple[tuple[str, ...], Callable[[Any], Callable[[Given], Any]]]] = {
    "torch.concat": (("matrix", "matrix"), pair),
    "torch.concatenate": (("matrix", "matrix"), pair),
    "torch.row_stack": (("matrix", "matrix"), pair),
    "torch.embedding": (("matrix", "row"), with_more),
    "torch.nn.functional.embedding": (("row", "matrix"), with_more),
    "torch.nn.functional.embedding_bag": (
        ("row", "matrix"),
        lambda f: with_more(f, torch.tensor([0])),
    ),
    "torch.nn.functional.conv_tbc": (("cube", "cube", "three"), with_more),
    "torch.nn.functional.fold": (("columns",), lambda f: with_more(f, (2, 2), (1, 1))),
    "torch.nn.functional.affine_grid": (
        ("affine",),
        lambda f: with_more(f, (1, 1, 2, 2), False),
    ),
    "torch.grid_sampler": (("image", "grid"), lambda f: with_more(f, 0, 0, False)),
    "torch.unsafe_split_with_sizes": (("matrix",), lambda f: with_more(f, [1, 2])),
    "torch.Tensor.unsafe_split_with_sizes": (("matrix",), lambda f: with_more(f, [1, 2])),
    "torch.Tensor.__deepcopy__": (("matrix",), lambda f: with_more(f, {})),
    "torch.Tensor.__index__": (("number",), with_more),
    "torch.special.polygamma": (("matrix",), lambda f: lambda given: f(1, *given)),
    "torch.orgqr": (("matrix", "three"), with_more),
    "torch.Tensor.orgqr": (("matrix", "three"), with_more),
    "torch.view_as_complex_copy": (("pairs",), with_more),
}


@functools.cache
def written_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        **values(),
        "row": torch.tensor([2, 0, 1]),
        "number": torch.tensor(3),
        "three": torch.tensor([0.5, 0.25, 0.75]),
        "cube": torch.rand(3, 3, 3, generator=generator),
        "columns": torch.rand(1, 1, 4, generator=generator),
        "affine": torch.rand(1, 2, 3, generator=generator),
        "image": torch.rand(1, 1, 3, 3, generator=generator),
        "grid": torch.rand(1, 2, 2, 2, generator=generator),
        "pairs": torch.rand(3, 2, generator=generator),
    }


def written_calls() -> Iterator[Call]:
    functions = dict(overridable())
    for name, (kinds, make) in WRITTEN.items():
        if name in functions:
            given = tuple(written_values()[kind] for kind in kinds)
            run = make(functions[name])
            for late in subsets(tuple(range(len(given)))):
                yield Call(f"{name} {shown(late, late)}", given, run, late, grad=False)


def not_generated() -> list[str]:
    """The functions that no call is made of, and no reason is given for."""
    return [
        name
        for name, function in overridable()
        if name not in WRITTEN
        and name.rsplit(".", 1)[-1] not in LEFT_OUT
        and reason_for_not(name) is None
        and accepted(function) is None
    ]


def method_calls() -> Iterator[Call]:
    yield from written_calls()
    for name, function in overridable():
        last = name.rsplit(".", 1)[-1]
        if name in WRITTEN or last in LEFT_OUT or reason_for_not(name) is not None:
            continue
        found = accepted(function)
        if found is None:
            continue
        kind, arguments = found
        given = (values()[kind],) * count(arguments)
        unsaid = frozenset({"value"} if last in UNLIKE else ())
        for late in subsets(tuple(range(len(given)))):
            words = f"{name} {shown(late, late)}"
            kinds = NOT_DISTRIBUTED if last in CRASHES_ON_DTENSOR else ()
            run = applied(function, arguments)
            asks = last in ASKS_DEVICE
            yield Call(words, given, run, late, False, unsaid, kinds=kinds, asks_device=asks)


LEFT_OUT = {
    "__repr__": "a deferred tensor says that it is deferred",
    "__reduce_ex__": "what a pickle consists of; pickling is called below",
    "__array_wrap__": "takes an array, no tensor",
    "__format__": "a deferred tensor says that it is deferred",
    "resize": "deprecated: warns, and is resize_",
    "__setstate__": "called by unpickling, on a tensor made for it",
}


# -- getters ---------------------------------------------------------------------------------------


def getters() -> list[str]:
    """The attributes of a tensor that are no methods."""
    return [
        name
        for name in sorted(dir(Tensor))
        if not callable(inspect.getattr_static(Tensor, name, None))
        and not isinstance(inspect.getattr_static(Tensor, name, None), (staticmethod, classmethod))
        and not name.startswith("__")
    ]


def getter_calls() -> Iterator[Call]:
    for name in getters():
        unsaid = frozenset({"value"} if name in UNLIKE else ())
        for kind in ("matrix", "complex"):
            words, get = f"Tensor.{name} of {kind}", functools.partial(get_attribute, name)
            asks = name in ASKS_DEVICE
            yield Call(words, (values()[kind],), get, unsaid=unsaid, asks_device=asks)


def get_attribute(name: str, given: Given) -> Any:
    return getattr(given[0], name)
