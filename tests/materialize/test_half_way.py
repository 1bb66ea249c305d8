"""What is broken off, interleaved or nested leaves everything whole, and can go on."""

from __future__ import annotations

import copy
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lateinit
from lateinit._checkpoint.formats.safetensors import SafetensorsReader
from lateinit._program import program as program_module
from lateinit._program.ops import Draw, Op
from lateinit._program.program import Program
from lateinit._replay import Session, execution_of, streams
from lateinit._rng.mt19937 import state_of
from lateinit._tensors import realize
from lateinit.errors import (
    LateinitError,
    MaterializeError,
    OutOfMemoryError,
    RecordingError,
)
from tests.support.snapshots import assert_same, tensors_of
from tests.support.twins import (
    Net,
    assert_untouched,
    interrupted_at,
    run_alone,
    still_deferred,
    twins,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


# -- running out of memory, and other failures half-way --------------------------------------------


def failing_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> list[int]:
    """Let the n-th op that is replayed fail; gives how many have been asked for."""
    calls: list[int] = []
    run = Session.call

    def maybe(self: Session, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise error
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Session, "call", maybe)
    return calls


SHORTAGES = [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    torch.OutOfMemoryError("CUDA out of memory."),
]


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda error: type(error).__name__)
def test_every_shortage_of_memory_can_be_repeated(
    shortage: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, whole = twins()
    calls = failing_at(monkeypatch, -1, shortage)
    lateinit.materialize(whole)
    for call in range(1, len(calls) + 1):
        monkeypatch.undo()
        _, model = twins()
        failing_at(monkeypatch, call, shortage)
        state = torch.get_rng_state()
        with pytest.raises(
            OutOfMemoryError, match=r"out of memory while materialising '?\w.*stands.*again"
        ) as caught:
            lateinit.materialize(model)
        assert caught.value.__cause__ is shortage
        monkeypatch.undo()
        assert torch.equal(state, torch.get_rng_state())
        for (path, expected), (_, tensor) in zip(tensors_of(eager), tensors_of(model), strict=True):
            assert lateinit.is_deferred(tensor) or torch.equal(expected, tensor), path
        assert_same(eager, lateinit.materialize(model))


def test_interrupted_materialising_can_be_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, model = twins()
    failing_at(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        lateinit.materialize(model)
    monkeypatch.undo()
    assert 0 < len(still_deferred(model)) < len(tensors_of(model))
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("given", [0, 1, 2])
def test_memory_that_only_some_were_given_is_given_to_the_rest(
    given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        model, whole = nn.Module(), torch.randn(6, 4)
        for number, part in enumerate(whole.split(2)):
            model.register_parameter(f"part{number}", nn.Parameter(part))
        return model

    eager, model = twins(build)
    calls: list[int] = []

    def breaks_off(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > given:
            raise KeyboardInterrupt
        give(*arguments)

    give = realize.give
    monkeypatch.setattr(realize, "give", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        lateinit.materialize(model)
    monkeypatch.undo()
    assert len(still_deferred(model)) == 3 - given
    assert_same(eager, lateinit.materialize(model))


def test_program_that_is_interrupted_while_it_is_indexed_is_indexed_all_the_same() -> None:
    def build() -> Program:
        with lateinit.deferred(advance_rng=False) as program:
            torch.empty(3).normal_().add_(1).uniform_().mul_(2)
            torch.zeros(2).add_(3)
        return program

    def writers(program: Program) -> list[list[int]]:
        return [program.writers(number) for number in range(len(program.storages))]

    expected, line, done = writers(build()), 0, False
    while not done:
        line += 1
        program = build()
        with suppress(KeyboardInterrupt), interrupted_at(line, program_module.__file__):
            program.writers(0)
            done = True
        assert writers(program) == expected, line
    assert line > 20


def test_op_that_fails_when_replayed_is_named() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.first = nn.Linear(2, 2)
        # Too large for its values to be looked at in the block.
        model.row = nn.Embedding(3, 8192)(torch.tensor([7])).detach()
        return model

    model = lateinit.deferred_init(build)
    with pytest.raises(MaterializeError, match=r"'?row'?.*embedding.*index out of range") as caught:
        lateinit.materialize(model)
    assert isinstance(caught.value.__cause__, IndexError)
    lateinit.materialize(model.first)
    assert still_deferred(model) == ["row"]


MEMORY = """
import resource, sys
import torch
from torch import nn
import lateinit

def data_size():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))

def build():
    return nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)])  # 16 MiB each

hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
lateinit.materialize(lateinit.deferred_init(build))  # first uses map what is needed once
torch.manual_seed(0)
model = lateinit.deferred_init(build)
resource.setrlimit(resource.RLIMIT_DATA, (data_size() + 80 * 2**20, hard))
try:
    lateinit.materialize(model, threads=int(sys.argv[1]))
except lateinit.errors.OutOfMemoryError as error:
    assert "while materialising " in str(error), error
else:
    raise AssertionError("there was memory enough")
finally:
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
done = [name for name, p in model.named_parameters() if not lateinit.is_deferred(p)]
assert "0.weight" in done, done  # what had its memory
assert len(done) < 16, done
lateinit.materialize(model)
torch.manual_seed(0)
for p, q in zip(build().parameters(), model.parameters(), strict=True):
    assert torch.equal(p, q)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the data size, reads /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_real_shortage_of_memory_can_be_repeated_when_there_is_more(threads: int) -> None:
    run_alone(MEMORY, str(threads))


# -- exceptions inside a block ---------------------------------------------------------------------


class StopHereError(Exception):
    pass


def test_exception_restores_generators_modes_and_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.get_rng_state(), generator.get_state()
    made = nn.Parameter.__new__

    def build() -> None:
        with lateinit.deferred(), torch.device("cpu"):
            nn.Linear(2, 2)
            torch.randn(4, generator=generator)
            with lateinit.deferred():
                raise StopHereError

    with pytest.raises(StopHereError):
        build()
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], generator.get_state())
    assert nn.Parameter.__new__ is made
    assert not nn.Linear(2, 2).weight.is_meta
    eager, model = twins()
    assert_untouched(eager, model)


def test_exception_caught_in_the_block_costs_what_it_costs_eagerly() -> None:
    def build() -> nn.Module:
        with suppress(ValueError):
            nn.init.sparse_(nn.Linear(3, 3).weight[0], 0.5)
        return nn.Linear(2, 2)

    eager, model = twins(build)
    assert_untouched(eager, model)


def test_what_eager_construction_raises_is_raised_while_recording() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        lateinit.deferred_init(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(IndexError, match="out of bounds"):
        lateinit.deferred_init(lambda: torch.ones(2)[3])


def test_what_a_failed_block_made_can_still_be_had() -> None:
    kept: list[nn.Module] = []
    torch.manual_seed(0)
    expected = nn.Linear(2, 2)
    torch.manual_seed(0)

    def build() -> None:
        with lateinit.deferred():
            kept.append(nn.Linear(2, 2))
            raise StopHereError

    with pytest.raises(StopHereError):
        build()
    assert_same(expected, lateinit.materialize(kept[0]))


def test_operands_of_which_one_is_on_meta_by_request_are_refused() -> None:
    with pytest.raises(RecordingError, match=r"add.*mixes a deferred tensor.*meta"):
        lateinit.deferred_init(lambda: torch.ones(2) + torch.ones(2, device="meta"))


# -- threads, nested and second blocks -------------------------------------------------------------


def in_threads(*work: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return errors


def test_threads_that_materialise_what_shares_memory_give_it_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build() -> nn.Module:
        model, whole = nn.Module(), torch.randn(4, 4)
        model.first, model.last = nn.Parameter(whole[:2]), nn.Parameter(whole[2:])
        return model

    def slowly(self: Session, *arguments: Any) -> Any:
        time.sleep(0.2)
        return call(self, *arguments)

    eager, model = twins(build)
    call = Session.call
    monkeypatch.setattr(Session, "call", slowly)
    parts = [model.first, model.last, model.first]
    assert not in_threads(*(partial(lateinit.materialize, part) for part in parts))
    assert_same(eager, model)


def test_threads_count_the_draws_of_a_stream_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(op: Op) -> Any:
        time.sleep(0.001)
        return cost(op)

    cost = streams.cost
    monkeypatch.setattr(streams, "cost", slowly)
    torch.manual_seed(0)
    with lateinit.deferred(advance_rng=False) as program:
        for number in range(20):
            torch.rand(number)
    torch.manual_seed(0)
    states = [state_of(torch.default_generator)]
    for number in range(20):
        torch.rand(number)
        states.append(state_of(torch.default_generator))
    found: dict[int, bytes] = {}

    def ask(number: int) -> None:
        found[number] = execution_of(program).state(Draw(0, number))

    assert not in_threads(*(partial(ask, number) for number in (20, 19, 18, 17)))
    assert found == {number: states[number] for number in (20, 19, 18, 17)}


def test_two_threads_in_blocks_of_their_own_do_not_disturb_each_other() -> None:
    """Both are right, or one is told that it has to wait; never a wrong value."""
    made = nn.Parameter.__new__
    torch.manual_seed(5)
    before = torch.get_rng_state()
    opened, done = threading.Event(), threading.Event()
    models: dict[int, nn.Module] = {}

    def first() -> None:
        with lateinit.deferred(advance_rng=False):
            torch.manual_seed(1)
            layer = nn.Linear(3, 3)
            opened.set()
            done.wait(timeout=1)
            models[1] = nn.Sequential(layer, nn.Linear(3, 3))

    def second() -> None:
        opened.wait(timeout=1)
        try:
            with lateinit.deferred(advance_rng=False):
                torch.manual_seed(2)
                models[2] = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        finally:
            done.set()

    errors = in_threads(first, second)
    assert all(isinstance(error, LateinitError) for error in errors), errors
    assert torch.equal(before, torch.get_rng_state())
    assert models
    for seed, model in models.items():
        torch.manual_seed(seed)
        assert_same(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), lateinit.materialize(model))
    assert nn.Parameter.__new__ is made


def test_two_threads_in_blocks_leave_the_generator_where_eager_construction_could() -> None:
    torch.manual_seed(0)
    states = [torch.get_rng_state()]
    for _ in range(3):
        nn.Linear(2, 2)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    opened, done = threading.Event(), threading.Event()

    def first() -> None:
        with lateinit.deferred():
            nn.Linear(2, 2)
            opened.set()
            done.wait(timeout=1)
            nn.Linear(2, 2)

    def second() -> None:
        opened.wait(timeout=1)
        try:
            with lateinit.deferred():
                nn.Linear(2, 2)
        finally:
            done.set()

    errors = in_threads(first, second)
    assert all(isinstance(error, LateinitError) for error in errors), errors
    assert any(torch.equal(torch.get_rng_state(), state) for state in states)


def test_block_is_a_matter_of_the_thread_that_opened_it() -> None:
    layers: list[nn.Module] = []
    with lateinit.deferred():
        errors = in_threads(lambda: layers.append(nn.LayerNorm(3)))
        mine = nn.LayerNorm(3)
    assert not errors
    assert not lateinit.is_deferred(layers[0])
    assert lateinit.is_deferred(mine)


def test_inner_block_is_part_of_the_outer_one() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), Net(), nn.Linear(2, 2))

    torch.manual_seed(0)
    eager, ended = build(), torch.get_rng_state()
    torch.manual_seed(0)
    with lateinit.deferred() as outer:
        before = nn.Linear(2, 2)
        with lateinit.deferred(advance_rng=False) as inner:
            middle = Net()
        assert lateinit.is_deferred(middle)
        model = nn.Sequential(before, middle, nn.Linear(2, 2))
    assert inner is outer
    assert torch.equal(ended, torch.get_rng_state())
    assert_untouched(eager, model)


def test_one_block_object_can_be_used_again_and_inside_itself() -> None:
    block = lateinit.deferred()
    torch.manual_seed(0)
    with block:
        first = nn.Linear(2, 2)
        with block:
            second = nn.Linear(2, 2)
        third = nn.Linear(2, 2)
    with block:
        fourth = nn.Linear(2, 2)
    models = nn.ModuleList([first, second, third, fourth])
    assert_untouched(twins(lambda: nn.ModuleList([nn.Linear(2, 2) for _ in range(4)]))[0], models)


def reinitialise(model: nn.Module) -> None:
    nn.init.xavier_uniform_(model.dec.weight)
    with torch.no_grad():
        model.enc.weight.mul_(2).add_(torch.randn(8, 4))
        model.table[1:3] = 7
    model.extra = nn.Linear(3, 3)


@pytest.mark.parametrize("between", [0, 5], ids=["at once", "after other draws"])
def test_second_block_may_change_what_the_first_one_made(between: int) -> None:
    torch.manual_seed(0)
    eager = Net()
    torch.rand(between)
    reinitialise(eager)
    ended = torch.get_rng_state()
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net)
    torch.rand(between)
    with lateinit.deferred():
        reinitialise(model)
    assert torch.equal(ended, torch.get_rng_state())
    assert_untouched(eager, model)


def test_second_block_that_fails_leaves_what_it_had_done_by_then() -> None:
    torch.manual_seed(0)
    eager = Net()
    nn.init.ones_(eager.dec.weight)
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net)

    def fail() -> None:
        with lateinit.deferred():
            nn.init.ones_(model.dec.weight)
            raise StopHereError

    with pytest.raises(StopHereError):
        fail()
    assert_untouched(eager, model)


def test_second_block_may_change_what_is_materialised_already() -> None:
    torch.manual_seed(0)
    eager = Net()
    nn.init.xavier_uniform_(eager.dec.weight)
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net)
    lateinit.materialize(model.dec)
    with lateinit.deferred():
        nn.init.xavier_uniform_(model.dec.weight)
    assert_same(eager, lateinit.materialize(model))


def half(**options: Any) -> tuple[nn.Linear, torch.Tensor]:
    """A layer that is materialised and then changed, and a view of its weight that is deferred."""
    layer = lateinit.deferred_init(nn.Linear, 3, 3)
    view = layer.weight.data[1:]
    lateinit.materialize(layer, **options)
    with torch.no_grad():
        layer.weight.zero_()
    return layer, view


AFTER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cloned": torch.clone,
    "copied deeply": copy.deepcopy,
    "viewed": lambda t: t[1],
    "computed with": lambda t: t * 2,
    "in a list": lambda t: torch.stack([t, t]),
    "sent": lambda t: t.to(torch.float64),
}


@pytest.mark.parametrize("use", AFTER.values(), ids=list(AFTER))
def test_view_of_what_was_materialised_has_the_values_of_now(
    use: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    _, view = half()
    assert not use(view).any()


def test_write_to_a_view_of_what_was_materialised_is_a_write_to_it() -> None:
    layer, view = half()
    view.fill_(3)
    assert layer.weight[1:].eq(3).all()
    assert view.data_ptr() == layer.weight[1:].data_ptr()


def test_copy_into_a_view_of_what_was_materialised_in_another_dtype() -> None:
    layer, view = half(dtype=torch.bfloat16)
    view.copy_(torch.ones(2, 3))
    assert view.dtype == torch.bfloat16
    assert layer.weight[1:].eq(1).all()
    assert layer.weight.untyped_storage().nbytes() == 18


@pytest.mark.parametrize("use", [lambda t: t.sum().item(), lambda t: t * 2, lambda t: t.mul_(2)])
def test_view_of_what_was_materialised_is_real_in_a_block(
    use: Callable[[torch.Tensor], Any],
) -> None:
    layer, view = half()
    with torch.no_grad():
        layer.weight.fill_(5)
    same = torch.full((2, 3), 5.0)
    found, expected = lateinit.deferred_init(use, view), use(same)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert torch.equal(layer.weight[1:], same)


IN_A_BLOCK: dict[str, Callable[[torch.Tensor], Any]] = {
    "filled": nn.init.ones_,
    "as an array": torch.Tensor.numpy,
    "copied deeply": copy.deepcopy,
}


@pytest.mark.parametrize("use", IN_A_BLOCK.values(), ids=list(IN_A_BLOCK))
def test_view_of_what_was_materialised_is_refused_in_a_block(
    use: Callable[[torch.Tensor], Any],
) -> None:
    layer, view = half()
    with pytest.raises(RecordingError, match="shares its memory with a tensor that is mater"):
        lateinit.deferred_init(use, view)
    assert not lateinit.materialize(view).any()
    lateinit.deferred_init(lambda: view.fill_(1))
    assert layer.weight[1:].eq(1).all()


def test_view_that_outlives_its_tensor_in_a_block_is_refused_there() -> None:
    with lateinit.deferred():
        layer = nn.Linear(3, 3)
        view = layer.weight.data
        lateinit.materialize(layer)
        with pytest.raises(RecordingError, match="shares its memory"):
            view.fill_(3)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "with a hook"])
def test_what_a_load_breaks_off_at_stays_deferred(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        model = Net()
        if not plain:
            model.register_load_state_dict_post_hook(lambda *_: None)
        return model

    eager, model = twins(build)
    path = tmp_path / "saved.safetensors"
    state = {name: value.double() + 1 for name, value in Net().named_parameters()}
    state = {name: value.detach() for name, value in state.items()}
    save_file(state, path)
    read = SafetensorsReader.read

    def failing(reader: SafetensorsReader, name: str, *place: Any, **how: Any) -> torch.Tensor:
        found = read(reader, name, *place, **how)
        return found.to("meta") if name == "dec.weight" else found  # which nothing copies from

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsReader, "read", failing)
        with pytest.raises(NotImplementedError):
            lateinit.load_checkpoint(model, path, dtype=torch.float32, strict=False)
    assert "dec.weight" in still_deferred(model)
    lateinit.load_checkpoint(model, path, dtype=torch.float32, strict=False)
    eager.load_state_dict(state, strict=False)
    assert_same(eager, model)
