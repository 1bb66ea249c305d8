"""Every row of the op table against a trial of its operator."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from lateinit._torch import op_table
from lateinit._torch.op_table import (
    FILL,
    INTEGERS,
    NORMAL,
    OP_TABLE,
    UNIFORM,
    UNINITIALISED,
    VALUE_CHECKS,
    ZERO,
    OpTraits,
)
from lateinit._torch.operators import by_name, op_info, spoken
from tests.torch_contract.listeners import Operators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What an operator takes besides numbers.
OTHERS: dict[str, Callable[[], Tensor]] = {
    "fill_.Tensor": lambda: torch.tensor(1.5),
    "copy_": lambda: torch.arange(40.0).view(5, 8),
    "bernoulli_.Tensor": lambda: torch.full((5, 8), 0.5),
    "randint_like.Tensor": lambda: torch.tensor(9),
    "randint_like.Tensor_generator": lambda: torch.tensor(9),
}
# Other numbers that cost as many words as those of the row.
AS_DEAR = {
    "aten::uniform_": (-3.0, 4.0),
    "aten::normal_": (2.0, 0.02),
    "aten::cauchy_": (1.0, 3.0),
    "aten::log_normal_": (0.5, 1.5),
    "aten::geometric_": (0.9,),
    "aten::random_.to": (1 << 24,),
    "aten::random_.from": (-7, 90_000),
}


def rows(holds: Callable[[OpTraits], object]) -> pytest.MarkDecorator:
    """Run a test for each operator whose row satisfies a condition; there must be one."""
    names = [name for name, traits in OP_TABLE.items() if holds(traits)]
    assert names
    return pytest.mark.parametrize("name", names)


def is_drawn(traits: OpTraits) -> bool:
    """Whether a row says that its operator draws."""
    filled = OP_TABLE.get(traits.filled_by[0]) if traits.filled_by else None
    return traits.draws is not None or (filled is not None and filled.draws is not None)


def is_tried(traits: OpTraits) -> bool:
    return not (traits.writes_unsaid or traits.spoken or traits.layout_only or traits.layout)


def tensor(dtype: torch.dtype = torch.float64) -> Tensor:
    """Values in (-1, 1), none of them 0, in the shape (5, 8)."""
    return torch.linspace(-0.9, 0.9, 40, dtype=dtype).view(5, 8)


def run(name: str, first: Tensor | None = None, numbers: Any = None, seed: int | None = 1) -> Any:
    """Call an operator with the numbers of its row.

    Args:
        name: its qualified name.
        first: the tensor that it is given, if it takes one.
        numbers: the numbers to call it with in place of those of the row.
        seed: the seed of the generator that it draws from; None for the default generator.
    """
    info = by_name(name)
    rest = iter(info.numbers if numbers is None else numbers)
    other = OTHERS.get(name.removeprefix("aten::"))
    known: dict[str, Any] = {"size": [5, 8], "stride": [8, 1], "n": 40}
    args: list[Any] = []
    for argument in info.arguments:
        if argument == "self":
            args.append(tensor() if first is None else first)
        elif argument in known:
            args.append(known[argument])
        elif other is not None:
            args.append(other())
            break
        else:
            number = next(rest, None)
            if number is None:
                break
            args.append(number)
    kwargs: dict[str, Any] = {}
    if info.mutates_kw:
        kwargs["out"] = torch.full((5, 8), torch.nan) if first is None else first
    if seed is None:
        return info.func(*args, **kwargs, **({"generator": None} if info.takes_generator else {}))
    if info.takes_generator:
        return info.func(*args, **kwargs, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return info.func(*args, **kwargs)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, any NaN being like any other."""
    equal = a.dtype == b.dtype and a.shape == b.shape
    return equal and torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


def test_an_operator_has_one_row() -> None:
    """torch/_ops.py: a qualified name with its overload is one operator, so it has one row."""
    names = [name for names in op_table._ROWS for name in names.split()]
    assert sorted(names) == sorted(name.removeprefix("aten::") for name in OP_TABLE)


@rows(lambda traits: True)
def test_it_exists_in_the_installed_torch(name: str) -> None:
    """torch/_ops.py: every supported version, 2.11 to 2.15, has every operator of the table."""
    info = by_name(name)
    assert info.func.name() == name  # type: ignore[attr-defined]
    traits = OP_TABLE[name]
    assert all(getattr(info, field) == getattr(traits, field) for field in OpTraits.__slots__)


@rows(lambda traits: traits.fills)
def test_what_fills_gives_the_same_whatever_was_there(name: str) -> None:
    """aten/src/ATen/native/Distributions.cpp, Fill.cpp, Copy.cpp: kernels that only write self."""
    first, second = (run(name, torch.full((5, 8), was)) for was in (torch.nan, 7.0))
    assert torch.equal(first, second)


@rows(is_tried)
def test_the_generator_moves_if_and_only_if_it_draws(name: str) -> None:
    """aten/src/ATen/native/tags.yaml: nondeterministic_seeded; a generator is given, or default."""
    traits = OP_TABLE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        run(name, seed=None)
        moved = not torch.equal(before, torch.get_rng_state())
    assert moved == is_drawn(traits) == by_name(name).random


@rows(lambda traits: traits.draws in ("fixed", "range"))
def test_its_numbers_do_not_change_how_far_the_generator_moves(name: str) -> None:
    """aten/src/ATen/core/DistributionsHelper.h: one sample an element, whatever the numbers."""
    seeded = name if by_name(name).takes_generator else f"{name}.generator"
    ended = []
    for numbers in (OP_TABLE[name].numbers, AS_DEAR.get(name, ())):
        generator = torch.Generator().manual_seed(1)
        first: Any = 40 if OP_TABLE[name].allocates == "count" else tensor()
        by_name(seeded).func(first, *numbers, generator=generator)
        ended.append(generator.get_state())
    assert torch.equal(*ended)


def test_a_wide_range_takes_more_words_than_a_narrow_one() -> None:
    """aten/src/ATen/native/cpu/DistributionTemplates.h: from 2**28 or 2**32 on, two words each."""
    ended = []
    for high in (2, 1 << 40):
        generator = torch.Generator().manual_seed(1)
        by_name(INTEGERS).func(torch.empty(40, dtype=torch.int64), 0, high, generator=generator)
        ended.append(generator.get_state())
    assert not torch.equal(*ended)
    assert OP_TABLE[INTEGERS].draws == "range"


@rows(lambda traits: traits.allocates)
def test_its_memory_is_new_and_has_the_shape_and_dtype_that_were_asked_for(name: str) -> None:
    """aten/src/ATen/native/TensorFactories.cpp: a factory allocates its result."""
    given = tensor()
    results = run(name, given), run(name, given)
    assert len({t.untyped_storage().data_ptr() for t in (given, *results)}) == 3
    traits = OP_TABLE[name]
    shapes: dict[str | None, tuple[int, ...]] = {"count": (40,), "one": ()}
    if traits.allocates == "range":
        start, end, step = ((0, *traits.numbers, 1), (*traits.numbers, 1), traits.numbers)[
            len(traits.numbers) - 1
        ]
        shapes["range"] = (math.ceil((end - start) / step),)
    assert results[0].shape == shapes.get(traits.allocates, (5, 8))
    assert results[0].is_contiguous()
    assert (results[0].dtype == given.dtype) == by_name(name).from_sizes
    assert ("self" in by_name(name).arguments) == by_name(name).from_sizes
    assert ("size" in by_name(name).arguments) == (traits.allocates in ("size", "new"))


@rows(lambda traits: traits.allocates in ("like", "new") and traits.filled_by != UNINITIALISED)
def test_it_reads_no_values_of_the_tensor_that_lends_its_shape(name: str) -> None:
    """aten/src/ATen/native/TensorFactories.cpp: sizes, dtype and device are taken, no values."""
    assert same(run(name, tensor()), run(name, torch.full_like(tensor(), torch.nan)))


def test_no_operator_that_is_like_a_tensor_is_missing() -> None:
    """aten/src/ATen/native/native_functions.yaml: they are named ``_like`` or ``new_``."""
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        alike = base.endswith("_like") or base.startswith("new_")
        if name.startswith("aten::") and alike and not overload.endswith("out"):
            assert by_name(name).from_sizes, name


@rows(lambda traits: traits.filled_by and traits.filled_by != UNINITIALISED)
def test_a_factory_is_an_allocation_and_a_fill(name: str) -> None:
    """aten/src/ATen/native/TensorFactories.cpp: ``at::empty(...).fill_(...)`` and its like."""
    made = run(name)
    info = by_name(name)
    numbers = iter(info.numbers)
    fill = info.fill_for(
        tuple(0 if a in ("self", "size") else next(numbers, None) for a in info.arguments)
    )
    assert fill is not None
    assert OP_TABLE[fill[0]].fills
    assert same(made, run(fill[0], torch.full_like(made, 77), fill[1]))
    assert info.is_factory == (info.allocates is not None and not info.random)


@rows(lambda traits: traits.filled_by)
def test_memory_is_uninitialised_where_the_table_says_so(name: str) -> None:
    """torch/utils/deterministic.py: what would be uninitialised is then NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        empty = bool(run(name, torch.zeros(5, 8)).isnan().all())
    finally:
        torch.use_deterministic_algorithms(False)
    assert empty == (OP_TABLE[name].filled_by == UNINITIALISED) == by_name(name).is_empty


@rows(lambda traits: traits.copies is not None)
def test_a_copy_has_the_values_of_the_argument_that_the_table_names(name: str) -> None:
    """aten/src/ATen/native/Copy.cpp, TensorConversions.cpp: copied and, at most, cast."""
    args = [tensor(torch.float32), tensor(torch.float32) + 1][: len(by_name(name).arguments)]
    before = [arg.clone() for arg in args]
    result = by_name(name).func(*args)
    at = OP_TABLE[name].copies
    assert at is not None
    assert same(result, before[at])


def pieces(count: int) -> Iterator[slice]:
    """Parts that begin at multiples of 16 and, but for the last, hold a multiple of 16."""
    yield from itertools.starmap(slice, itertools.pairwise((0, 16, 64, 384, count)))


@pytest.mark.parametrize("dtype", FLOATING)
@rows(lambda traits: traits.elementwise and is_drawn(traits))
def test_a_draw_in_pieces_gives_the_bits_of_one_call(name: str, dtype: torch.dtype) -> None:
    """aten/src/ATen/native/cpu/DistributionTemplates.h: 16 elements at a time, in order."""
    func = by_name(name).func
    # 640 elements: groups of 16 without a remainder, of which the last elements are drawn again.
    whole = func(torch.empty(640, dtype=dtype), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    parts = [func(whole[part].clone(), generator=generator) for part in pieces(640)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", FLOATING)
@rows(lambda traits: traits.elementwise and not is_drawn(traits))
def test_elements_do_not_depend_on_their_neighbours(name: str, dtype: torch.dtype) -> None:
    """aten/src/ATen/native/cpu/Loops.h: one function, over vectors and over the remainder."""
    info = by_name(name)
    given = torch.linspace(-0.9, 0.9, 645, dtype=torch.float64).to(dtype)
    whole = info.func(given.clone(), *info.numbers)
    parts = torch.cat([info.func(given[part].clone(), *info.numbers) for part in pieces(645)])
    assert whole.shape == given.shape
    if info.mutates:
        assert same(whole, parts)
    else:  # only shapes are relied on; vectorised code may round differently from the remainder
        torch.testing.assert_close(whole, parts, equal_nan=True)
    turned = info.func(given[:40].view(5, 8).t(), *info.numbers)
    assert (turned.shape, turned.stride(), turned.dtype) == ((8, 5), (1, 8), dtype)


SOME = (0, 1, -1, 0.5, -2.5, 3e4, -3e4, 6e4, 1e30, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("dtype", FLOATING)
@rows(lambda traits: traits.usual)
def test_usual_numbers_are_accepted(name: str, dtype: torch.dtype) -> None:
    """aten/src/ATen/native/DistributionTemplates.h: checks of numbers, with TORCH_CHECK."""
    info = by_name(name)
    assert info.usual is not None
    longest = min(len(info.arguments) - 1, 2)
    shortest = len(info.numbers) or (0 if info.random else longest)
    tried = [
        n for size in range(shortest, longest + 1) for n in itertools.product(SOME, repeat=size)
    ]
    usual = [numbers for numbers in tried if info.usual(*numbers)]
    assert usual
    for numbers in usual:
        # In place, and nothing but values changes: that is what is recorded without a kernel.
        given = tensor(dtype)
        result = run(name, given, numbers)
        assert (result is given, result.shape, result.dtype) == (True, (5, 8), dtype)


@rows(lambda traits: traits.usual and (traits.numbers or traits.draws))
def test_numbers_that_are_refused_are_not_usual(name: str) -> None:
    """aten/src/ATen/native/DistributionTemplates.h: TORCH_CHECK(std >= 0), (from <= to)."""
    info = by_name(name)
    assert info.usual is not None
    given = itertools.product(SOME, repeat=2) if info.random else [(odd,) for odd in (*SOME, 1j)]
    refused = []
    for numbers in given:
        try:
            info.func(tensor(torch.float16), *numbers)
        except RuntimeError:
            refused.append(info.usual(*numbers))
    assert refused
    assert not any(refused)


@pytest.mark.parametrize("name", [ZERO, FILL, UNIFORM, NORMAL])
def test_the_fills_that_have_names_of_their_own_are_those_with_a_method(name: str) -> None:
    """tools/autograd/gen_python_functions.py: a method for each ``variants: method``."""
    assert (OP_TABLE[name].fills, OP_TABLE[name].method) == (True, True)


@rows(lambda traits: traits.method)
def test_the_method_of_that_name_calls_this_overload(name: str) -> None:
    """torch/csrc/autograd/python_variable_methods (generated): the method parses and calls it."""
    info = by_name(name)
    assert info.call is getattr(Tensor, name.removeprefix("aten::").partition(".")[0])
    with Operators() as mode:
        called = info.call(tensor(), *info.numbers, **generator_for(name))
    assert mode.heard[-1] == name
    assert same(called, info.func(tensor(), *info.numbers, **generator_for(name)))


def generator_for(name: str) -> dict[str, Any]:
    takes = by_name(name).takes_generator
    return {"generator": torch.Generator().manual_seed(1)} if takes else {}


@rows(lambda traits: traits.spoken)
def test_a_user_who_calls_the_spoken_name_calls_this_operator(name: str) -> None:
    """aten/src/ATen/native/Scalar.cpp: ``item`` is composite, and calls _local_scalar_dense."""
    one = torch.ones(())
    with Operators() as mode:
        getattr(one, spoken(name))()
    assert mode.heard == [name]
    assert not hasattr(Tensor, name.removeprefix("aten::"))


@rows(lambda traits: traits.writes_unsaid)
def test_running_statistics_are_written_and_their_schemas_do_not_say_so(name: str) -> None:
    """aten/src/ATen/native/native_functions.yaml: ``Tensor? running_mean`` is bare."""
    schema = by_name(name).func._schema.arguments  # type: ignore[attr-defined]
    assert not any(a.alias_info and a.alias_info.is_write for a in schema)
    running = tuple(i for i, a in enumerate(schema) if a.name.startswith("running_"))
    assert by_name(name).mutates == running


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("aten::native_batch_norm", (None, None, "mean", "var", True, 0.1, 1e-5)),
        ("aten::batch_norm_update_stats", ("mean", "var", 0.1)),
    ],
)
def test_those_with_a_kernel_for_the_cpu_write_just_them(name: str, rest: Any) -> None:
    """aten/src/ATen/native/Normalization.cpp: batch_norm_cpu_update_stats_template."""
    made = {"mean": lambda: torch.zeros(8), "var": lambda: torch.ones(8)}
    args = [tensor(torch.float32), *(made[r]() if isinstance(r, str) else r for r in rest)]
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    by_name(name).func(*args)
    changed = [
        i
        for i, (a, b) in enumerate(zip(args, before, strict=True))
        if isinstance(a, Tensor) and not torch.equal(a, b)
    ]
    assert tuple(changed) == OP_TABLE[name].writes_unsaid


def test_an_operator_without_a_row_is_known_by_its_schema_alone() -> None:
    """torch/_ops.py: OpOverload._schema marks ``self`` of cumsum_ as written."""
    info = op_info(torch.ops.aten.cumsum_.default)
    assert all(getattr(info, field) == getattr(OpTraits(), field) for field in OpTraits.__slots__)
    assert info.mutates == (0,)


@rows(lambda traits: traits.layout_only)
def test_what_needs_layouts_alone_answers_the_same_on_meta(name: str) -> None:
    """aten/src/ATen/native/TensorProperties.cpp compares sizes; Memory.cpp asks of pinning."""
    info = by_name(name)
    tensors = 2 if "other" in info.arguments else 1
    answers = set()
    for shapes in (((2, 3), (2, 3)), ((2, 3), (3, 2))):
        real, on_meta = (
            info.func(*(torch.ones(shape, device=device) for shape in shapes[:tensors]))
            for device in ("cpu", "meta")
        )
        assert real == on_meta
        answers.add(real)
    assert name == "aten::is_pinned" or answers == {True, False}


@pytest.mark.parametrize("name", sorted(VALUE_CHECKS))
def test_what_looks_at_values_exists_in_the_installed_torch(name: str) -> None:
    """aten/src/ATen/native: these kernels raise for values that they refuse."""
    found = [base for base in (name, f"{name}_") if hasattr(torch.ops.aten, base)]
    assert found
    for base in found:
        packet = getattr(torch.ops.aten, base)
        assert all(op_info(getattr(packet, o)).checks_values for o in packet.overloads())
