"""Calls of every operator of torch's own test list, with torch's own samples."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.support.deferred_kinds import Call, can_be_late, copied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Given = list[Any]

SAMPLES = 2
NONE = frozenset[str]()
# What is in fresh memory is no value; gelsy reads some, where there are fewer rows than columns.
UNINITIALISED = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    *("linalg.lstsq", "linalg.lstsq.grad_oriented"),
}
NOT_CALLED = {
    "jiterator_": "needs CUDA",
    "hash_tensor": "gives uint64, which gloo does not take",
}


def operators() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return [op for op in op_db if not op.name.startswith(tuple(NOT_CALLED))]


def named(operator: Any) -> str:
    variant = operator.variant_test_name
    return f"{operator.name}.{variant}" if variant else str(operator.name)


def samples(operator: Any) -> Iterator[Any]:
    if torch.float32 in operator.supported_dtypes("cpu"):
        torch.manual_seed(0)
        made = operator.sample_inputs("cpu", torch.float32, requires_grad=False)
        yield from itertools.islice(made, SAMPLES)


def calls_of(operator: Any) -> Iterator[Call]:
    """Every form of an operator, with each tensor of each sample deferred, and with all of them."""
    for number, sample in enumerate(samples(operator)):
        everything = ((sample.input, *sample.args), sample.kwargs)
        flat, spec = pytree.tree_flatten(everything)
        places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        values = tuple(flat[i] for i in places)
        possible = tuple(i for i, value in enumerate(values) if can_be_late(value))
        unsaid = frozenset({"bits"}) if named(operator) in UNINITIALISED else NONE

        def call(function: Any, given: Given, flat=flat, spec=spec, places=places) -> Any:
            made = list(flat)
            for place, tensor in zip(places, given, strict=True):
                made[place] = tensor
            args, kwargs = pytree.tree_unflatten(made, spec)
            return function(*args, **kwargs)

        for form, function, grad in forms(operator):
            for late in subsets(possible):
                yield Call(
                    f"{named(operator)} {number} {form} {shown(late, possible)}",
                    values,
                    lambda given, f=function, c=call: c(f, given),
                    late,
                    grad,
                    unsaid,
                )
        if operator.supports_out:
            yield from out_calls(operator, number, values, possible, call, unsaid)


def forms(operator: Any) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    yield "function", operator.op, True
    if operator.method_variant is not None:
        yield "method", operator.method_variant, True
    if operator.inplace_variant is not None:
        yield "in place", operator.inplace_variant, False


def subsets(possible: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield from ((i,) for i in possible)
    if len(possible) > 1:
        yield possible


def shown(late: tuple[int, ...], possible: tuple[int, ...]) -> str:
    return "all" if len(late) > 1 else str(late[0])


def out_calls(
    operator: Any, number: int, values: tuple[Tensor, ...], possible: Any, call: Any, unsaid: Any
) -> Iterator[Call]:
    """With ``out=``: a deferred tensor, a real one for deferred arguments, and all deferred."""
    try:
        torch.manual_seed(0)
        result = call(operator.op, [copied(v) if can_be_late(v) else v for v in values])
    except Exception:  # noqa: BLE001 - a sample that asks for what this build has not
        return
    several = isinstance(result, (tuple, list))
    outs = tuple(result) if several else (result,)
    if not all(isinstance(out, Tensor) and can_be_late(out) for out in outs):
        return
    count = len(values)

    def run(given: Given) -> Any:
        out = tuple(given[count:])
        keywords = {"out": out if several else out[0]}
        return call(lambda *a, **k: operator.op(*a, **k, **keywords), given[:count])

    own = tuple(range(count, count + len(outs)))
    fresh = tuple(torch.ones_like(out.detach()) for out in outs)
    for name, late in (("out", own), ("into real", tuple(possible)), ("all", (*possible, *own))):
        if late:
            yield Call(
                f"{named(operator)} {number} out= {name}", values + fresh, run, late, False, unsaid
            )
