"""Law 9 outside blocks: what is done to a deferred tensor is honoured, or refused by name.

The calls are generated: torch's own operators with torch's own samples, whatever else a tensor and
a module have, and what Python, numpy and the rest of torch do with them. Each is made on several
kinds of deferred tensor, and compared with the eager twin bit for bit. A sweep makes every call on
every kind (``make sweep``); by default each is made on one, and half of the operators are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from lateinit._recording import after_block, guard
from lateinit._torch import below_python
from tests.support import honoured
from tests.support.after_block_known import KNOWN, Known
from tests.support.deferred_kinds import Call, chosen, variants
from tests.support.honoured import HOLDS, outcome_of
from tests.support.module_calls import NOT_CALLED, called, module_calls, public
from tests.support.op_calls import calls_of, operators
from tests.support.sweep import EVERYTHING, part_of
from tests.support.tensor_acts import act_calls
from tests.support.tensor_calls import (
    getter_calls,
    getters,
    method_calls,
    not_generated,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PARTS = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("alone", "fresh_memory_of_nan"),
]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A group of one process, whose collectives really run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(calls: Iterable[Call], *, every: bool = EVERYTHING) -> Iterator[tuple[str, str]]:
    """The names of calls on kinds of tensor, and what comes of each."""
    for call in calls:
        for kind, others in variants(call) if every else [chosen(call)]:
            among = f"{kind} among {others}"
            yield f"{call.name} @ {among}", outcome_of(call, kind, others)


def check(calls: Iterable[Call], least: int) -> None:
    """Each call is honoured or refused, unless it is known not to be."""
    tried, wrong, mended = 0, {}, []
    for name, outcome in made(calls):
        tried += 1
        for known in (known for known in KNOWN if known.holds(name)):
            if known.outcome == outcome.partition(":")[0]:
                known.seen = True
                break
            if outcome in HOLDS and not known.may:
                mended.append(f"{name}: no longer {known.outcome}: {known.reason}")
        else:
            if outcome not in HOLDS:
                wrong[name] = outcome
    assert tried >= least
    assert wrong == {}
    assert mended == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_an_operator_is_honoured_or_refused(part: int) -> None:
    some = part_of(operators(), 0, 2)[part::PARTS]
    check((call for op in some for call in calls_of(op)), 200)


def test_what_a_tensor_says_of_itself_is_what_the_eager_twin_says() -> None:
    check(getter_calls(), 80)


def test_a_function_that_tensors_can_override_is_honoured_or_refused() -> None:
    check(method_calls(), 300)


def test_what_python_numpy_and_collectives_do_with_a_tensor_is_honoured_or_refused() -> None:
    check(act_calls(), 400)


def test_a_method_of_a_module_is_honoured_or_refused() -> None:
    check(module_calls(), 80)


@pytest.mark.skipif(not EVERYTHING, reason="only a sweep makes every call")
def test_what_is_known_to_fail_was_seen_to() -> None:
    assert [str(known) for known in KNOWN if not (known.seen or known.may)] == []


def test_what_is_known_to_fail_and_no_longer_does_fails_the_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = Known("for this test", "wrong", "Tensor.shape of matrix")
    monkeypatch.setitem(globals(), "KNOWN", [known])
    calls = [call for call in getter_calls() if call.name == "Tensor.shape of matrix"]
    with pytest.raises(AssertionError, match="no longer wrong: for this test"):
        check(calls, 1)


# -- nothing is left out without a reason ----------------------------------------------------------


def test_every_public_method_of_a_module_is_called_or_has_a_reason() -> None:
    assert public() - called() <= set(NOT_CALLED)


def test_every_function_that_can_be_overridden_is_called_or_has_a_reason() -> None:
    assert not_generated() == []
    assert {"data", "grad", "T", "mT", "real", "imag", "shape", "is_leaf"} < set(getters())


# -- a check that cannot fail is a defect ----------------------------------------------------------


def some_calls() -> Iterator[Call]:
    named = {"add", "clone", "exp", "t"}
    acts = ("data.", "detach", "row", "item", "in ", "cat", "random", "comparison", "torch.tensor")
    yield from (call for op in operators() if op.name in named for call in calls_of(op))
    yield from (call for call in act_calls() if call.name.startswith(acts))


def unguarded(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    with below_python():
        return func(*args, **(kwargs or {}))


def without_a_guard(patch: pytest.MonkeyPatch) -> None:
    off = torch._C._disabled_torch_function_impl
    patch.setattr(guard.DeferredTensor, "__torch_function__", off)
    patch.setattr(guard.DeferredTensor, "__torch_dispatch__", classmethod(unguarded))


def without_refusals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(after_block.Follower, "_refuse_values", lambda *a, **k: None)


def without_names(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(after_block, "described", lambda tensor: "a tensor")


def without_the_next_step(patch: pytest.MonkeyPatch) -> None:
    def short(what: str, tensor: Any) -> Exception:
        return after_block.DeferredTensorError(after_block.described(tensor))

    patch.setattr(after_block, "would_change", short)


def with_draws(patch: pytest.MonkeyPatch) -> None:
    realise = honoured.realise
    patch.setattr(honoured, "realise", lambda values: (realise(values), torch.rand(1)))


def with_another_value(patch: pytest.MonkeyPatch) -> None:
    realise = honoured.realise

    def changing(values: list[Any]) -> None:
        realise(values)
        for value in values:
            if honoured.has_values(value) and value.is_floating_point() and value.numel():
                value.detach().view(-1)[0] += 1

    patch.setattr(honoured, "realise", changing)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (without_a_guard, {"result on meta", "wrong", "foreign error"}),
        (without_refusals, {"wrong"}),
        (without_names, {"refused without the name"}),
        (without_the_next_step, {"refused without the next step"}),
        (with_draws, {"wrong"}),
        (with_another_value, {"wrong", "refused half-way"}),
    ],
)
def test_what_is_broken_is_seen(
    broken: Callable[[pytest.MonkeyPatch], None],
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = [call for call in some_calls() if not call.kinds]
    before = {call.name for call in calls if outcome_of(call, "parameter", "real") in HOLDS}
    broken(monkeypatch)
    found = {
        outcome_of(call, "parameter", "real").split(":")[0] for call in calls if call.name in before
    }
    assert expected <= found
