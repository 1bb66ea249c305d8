"""Law 9: what cannot be honoured raises, says what to do, and leaves nothing half done."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import (
    ConstantChangedError,
    DeferredTensorError,
    LateinitError,
    MaterializeError,
    NotRecordedError,
    OutOfMemoryError,
    PatternError,
    RecordingError,
    SeedError,
)
from lateinit.replay import Replay
from tests.models import MODELS
from tests.snapshots import assert_same, snapshot, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """Of everything one: parameters, statistics, an integer, a buffer that is not saved, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(4, 8)
        self.dec = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 8)
        self.tied.weight = self.enc.weight
        nn.init.normal_(self.dec.weight, std=0.02)
        self.register_buffer("table", torch.arange(4.0).sqrt(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dec(self.enc(x).relu())) * self.table


def twins(build: Callable[[], nn.Module] = Net, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    eager = build()
    torch.manual_seed(seed)
    return eager, lateinit.deferred_init(build)


def still_deferred(model: nn.Module) -> list[str]:
    return [path for path, tensor in tensors_of(model) if lateinit.is_deferred(tensor)]


def assert_untouched(eager: nn.Module, model: nn.Module) -> None:
    """Nothing of a model was materialised or changed, and it can go on from here."""
    assert still_deferred(model) == [path for path, _ in tensors_of(model)]
    assert_same(eager, lateinit.materialize(model))


# -- using deferred tensors ------------------------------------------------------------------------


@torch.no_grad()
def add_in_place(model: nn.Module) -> None:
    model.enc.weight.add_(1)


@torch.no_grad()
def zero_a_row(model: nn.Module) -> None:
    model.enc.weight[0].zero_()


@torch.no_grad()
def set_an_item(model: nn.Module) -> None:
    model.enc.weight[0, 0] = 1.0


@torch.no_grad()
def foreach(model: nn.Module) -> None:
    torch._foreach_mul_([model.enc.weight], 2.0)


def step_an_optimizer(model: nn.Module) -> None:
    model.enc.weight.grad = torch.zeros(8, 4, device="meta")
    optimizer = torch.optim.SGD([model.enc.weight], lr=0.1)
    try:
        optimizer.step()
    finally:
        optimizer.zero_grad()


WRITES = {
    "init": lambda model: nn.init.normal_(model.enc.weight, std=0.02),
    "init of a constant": lambda model: nn.init.zeros_(model.enc.weight),
    "data": lambda model: model.enc.weight.data.fill_(1.0),
    "row of data": lambda model: model.enc.weight.data[0].zero_(),
    "detached": lambda model: model.enc.weight.detach().mul_(2),
    "add": add_in_place,
    "row": zero_a_row,
    "item": set_an_item,
    "foreach": foreach,
    "copy of another shape": lambda model: model.enc.weight.data.copy_(torch.zeros(4)),
    "copy of a deferred tensor": lambda model: model.enc.weight.data.copy_(model.dec.weight.T),
    "random": lambda model: model.enc.weight.data.uniform_(),
    "out": lambda model: torch.add(torch.ones(8, 4), 1, out=model.enc.weight.data),
    "optimizer": step_an_optimizer,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_after_the_block_is_refused(write: Callable[[nn.Module], object]) -> None:
    eager, model = twins()
    with pytest.raises(
        DeferredTensorError,
        match=r"'enc\.weight'.* no values yet.*lateinit\.deferred\(\).*lateinit\.materialize",
    ):
        write(model)
    assert_untouched(eager, model)


def test_write_that_torch_refuses_on_a_real_parameter_is_refused_by_torch() -> None:
    eager, model = twins()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model.enc.weight.add_(1)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model.enc.weight[0].zero_()
    assert_untouched(eager, model)


READS = {
    "item": lambda model: model.norm.num_batches_tracked.item(),
    "tolist": lambda model: model.table.tolist(),
    "numpy": lambda model: model.table.numpy(),
    "numpy by force": lambda model: model.enc.weight.numpy(force=True),
    "asarray": lambda model: np.asarray(model.table),
    "array": lambda model: np.array(model.table.cpu()),
    "bool": lambda model: bool(model.norm.num_batches_tracked),
    "int": lambda model: int(model.norm.num_batches_tracked),
    "float": lambda model: float(model.norm.num_batches_tracked),
    "complex": lambda model: complex(model.norm.num_batches_tracked),
    "index": lambda model: [1, 2][model.norm.num_batches_tracked],
    "format": lambda model: f"{model.norm.num_batches_tracked:03d}",
    "equal": lambda model: torch.equal(model.table, model.table),
    "allclose": lambda model: torch.allclose(model.table, model.table),
    "random": lambda model: torch.rand_like(model.table),
    "dropout": lambda model: nn.functional.dropout(model.table),
    "membership": lambda model: 3.0 in model.table,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_read_outside_the_block_is_refused(read: Callable[[nn.Module], object]) -> None:
    eager, model = twins()
    with pytest.raises(
        DeferredTensorError,
        match=r"(?:'table'|'norm\.num_batches_tracked'|enc\.weight).*lateinit\.materialize",
    ):
        read(model)
    assert_untouched(eager, model)


def test_memory_of_a_deferred_tensor_cannot_be_had() -> None:
    eager, model = twins()
    with pytest.raises((BufferError, DeferredTensorError), match=r"meta|lateinit\.materialize"):
        torch.utils.dlpack.to_dlpack(model.table)
    with pytest.raises(RuntimeError, match=r"only available on CPU|lateinit\.materialize"):
        model.share_memory()
    assert_untouched(eager, model)


def test_read_of_what_was_computed_from_deferred_tensors_is_refused() -> None:
    eager, model = twins()
    total = model.enc.weight.sum()
    with pytest.raises(DeferredTensorError, match=r"deferred tensor .*\(\).*lateinit\.materialize"):
        total.item()
    assert_untouched(eager, model)
    assert torch.equal(lateinit.materialize(total).detach(), eager.enc.weight.sum().detach())


def test_backward_through_deferred_tensors_is_refused_rather_than_forgotten() -> None:
    eager, model = twins()
    with pytest.raises(DeferredTensorError, match=r"lateinit\.materialize"):
        model.enc.weight.sum().backward()
    assert_untouched(eager, model)


FORWARDS = {
    "model": lambda model: model(torch.ones(2, 4)),
    "part": lambda model: model.enc(torch.ones(2, 4)),
    "arithmetic": lambda model: torch.ones(8, 4) * model.enc.weight,
    "copy into a real tensor": lambda model: torch.zeros(8, 4).copy_(model.enc.weight),
    "assignment to a slice": lambda model: torch.zeros(9, 8, 4).__setitem__(0, model.enc.weight),
    "functional": lambda model: nn.functional.linear(torch.ones(2, 4), model.enc.weight),
    "stack": lambda model: torch.stack([torch.ones(8, 4), model.enc.weight]),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_arithmetic_with_real_tensors_is_refused(forward: Callable[[nn.Module], object]) -> None:
    eager, model = twins()
    with pytest.raises(
        DeferredTensorError,
        match=r"'(?:enc\.)?(?:weight|bias)' \([48].*real tensors.*no values.*lateinit\.materialize",
    ):
        forward(model)
    assert_untouched(eager, model)


def test_failed_forward_pass_leaves_statistics_alone() -> None:
    eager, model = twins(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    lateinit.materialize(model, only="0.weight")
    with pytest.raises(DeferredTensorError, match=r"lateinit\.materialize"):
        model(torch.ones(2, 4))
    assert_same(eager, lateinit.materialize(model))


def test_shapes_can_be_propagated_on_meta() -> None:
    eager, model = twins()
    assert model.eval()(torch.ones(3, 4, device="meta")).shape == (3, 4)
    assert_untouched(eager.eval(), model)


def test_printing_a_deferred_tensor_says_what_it_is() -> None:
    eager, model = twins()
    expected = "<deferred Parameter (8, 4), torch.float32, requires_grad=True>"
    assert repr(model.enc.weight) == str(model.enc.weight) == f"{model.enc.weight}" == expected
    assert repr(model.table) == "<deferred tensor (4), torch.float32>"
    assert_untouched(eager, model)


def test_graph_of_a_constructor_is_refused_and_the_values_stay() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.scaled = layer.weight * 2
        return layer

    _, model = twins(build)
    lateinit.materialize(model)
    with pytest.raises(DeferredTensorError, match=r"graph was not recorded: compute it again"):
        model.scaled.sum().backward()
    assert torch.equal(model.scaled, model.weight * 2)


# -- asking for what is not there ------------------------------------------------------------------


def test_plain_meta_model_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with pytest.raises(
        NotRecordedError, match=r"never recorded: 0\.weight, 0\.bias\..*lateinit\.deferred\(\)"
    ):
        lateinit.materialize(model)
    with pytest.raises(NotRecordedError, match=r"never recorded"):
        lateinit.plan(model)


def test_model_that_is_in_part_plain_meta_is_not_begun() -> None:
    eager, model = twins()
    both = nn.Sequential(model, nn.Linear(2, 2, device="meta"))
    with pytest.raises(NotRecordedError, match=r"never recorded: 1\.weight, 1\.bias\."):
        lateinit.materialize(both)
    assert still_deferred(model) == [path for path, _ in tensors_of(model)]
    lateinit.materialize(both, only="0.*")
    assert_same(eager, model)


def test_unknown_pattern_lists_what_is_near() -> None:
    eager, model = twins()
    with pytest.raises(
        PatternError, match=r"only='\*\.wieght' matches no tensor; there are: .*enc\.weight"
    ):
        lateinit.materialize(model, only="*.wieght")
    with pytest.raises(PatternError, match=r"only='dce\.\*'.*dec\."):
        lateinit.materialize(model, only=["enc.*", "dce.*"])
    for ask in (lateinit.plan, lateinit.summary):
        with pytest.raises(PatternError, match=r"only='nothing'"):
            ask(model, only="nothing")
    assert_untouched(eager, model)


@pytest.mark.parametrize("only", [3, [3], [None]])
def test_selection_of_another_type_is_refused(only: object) -> None:
    eager, model = twins()
    with pytest.raises(TypeError, match=r"only="):
        lateinit.materialize(model, only=only)
    assert_untouched(eager, model)


def test_target_that_can_hold_no_tensor_is_refused() -> None:
    for target in (3, "model.pt", None):
        with pytest.raises(TypeError, match=r"module, a tensor"):
            lateinit.materialize(target)


def test_meta_as_the_device_is_refused() -> None:
    eager, model = twins()
    with pytest.raises(ValueError, match=r"device=.*meta"):
        lateinit.materialize(model, device="meta")
    assert_untouched(eager, model)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_dtype_that_holds_no_weights_is_refused(dtype: torch.dtype) -> None:
    eager, model = twins()
    with pytest.raises(ValueError, match=rf"dtype={dtype}.*floating"):
        lateinit.materialize(model, dtype=dtype)
    assert_untouched(eager, model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there_leaves_everything_as_it_was() -> None:
    eager, model = twins()
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        lateinit.materialize(model, device="cuda")
    assert_untouched(eager, model)


class TwoViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3))
        words = torch.randn(6)
        self.register_buffer("real", words[:4])
        self.register_buffer("rest", words[2:])


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3))
        self.register_buffer("floats", torch.randn(4))
        self.register_buffer("integers", self.floats.view(torch.int32))


def test_dtypes_that_share_memory_are_refused_before_anything_is_done() -> None:
    eager, model = twins(TwoDtypes)
    with pytest.raises(DeferredTensorError, match=r"floats.*integers.*share"):
        lateinit.materialize(model, dtype=torch.float64)
    assert_untouched(eager, model)


def test_memory_that_is_elsewhere_already_is_refused_before_anything_is_done() -> None:
    eager, model = twins(TwoViews)
    lateinit.materialize(model, only="real", dtype=torch.float64)
    with pytest.raises(
        DeferredTensorError, match=r"'rest' shares its memory.*dtype=torch\.float64: ask for the"
    ):
        lateinit.materialize(model)
    assert still_deferred(model) == ["first", "rest"]
    lateinit.materialize(model, only="rest", dtype=torch.float64)
    assert model.rest[0] == model.real[2]
    assert torch.equal(model.rest, eager.rest.double())


# -- seeds -----------------------------------------------------------------------------------------


class Coin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = torch.rand(()).item() < 0.5
        self.layer = nn.Linear(4, 6 if wide else 5)


class DrawnLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.rand(64).gt(0.5).nonzero())


class DrawnOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("outside", torch.from_numpy(np.zeros(8)))
        self.outside.normal_()
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize("build", [Coin, DrawnLength, DrawnOutside])
def test_seed_that_would_build_another_model_is_refused(build: Callable[[], nn.Module]) -> None:
    eager, model = twins(build)
    before = still_deferred(model)
    with pytest.raises(SeedError, match=r"seed"):
        lateinit.materialize(model, seed=1)
    assert still_deferred(model) == before
    assert_same(eager, lateinit.materialize(model))


def test_refused_seed_says_which_and_why() -> None:
    _, model = twins(Coin)
    with pytest.raises(
        SeedError, match=r"seed=1 cannot be honoured: the constructor read a random value.*record"
    ):
        lateinit.materialize(model, seed=1)


def test_seed_of_blocks_that_did_not_follow_each_other_is_refused() -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Linear(3, 3)
    torch.rand(3)
    with lateinit.deferred():
        nn.init.normal_(model.weight)
    with pytest.raises(SeedError, match=r"seed=1 cannot be honoured.*did not follow each other"):
        lateinit.materialize(model, seed=1)
    assert lateinit.is_deferred(model.weight)


# -- outside data ----------------------------------------------------------------------------------


def test_outside_data_that_changed_since_is_noticed() -> None:
    table = torch.randn(200, 200)

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.table = nn.Parameter(torch.empty(200, 200))
            self.table.data.copy_(table)
            self.last = nn.Linear(2, 2)

    eager, model = twins(Lookup)
    kept = table.clone()
    table.add_(1)
    with pytest.raises(
        ConstantChangedError,
        match=r"'table'.*\(200, 200\).*changed in place.*(?:materialise before|pass a copy)",
    ):
        lateinit.materialize(model)
    lateinit.materialize(model, only=["first.*", "last.*"])
    assert still_deferred(model) == ["table"]
    assert torch.equal(eager.table, kept)


def test_small_outside_data_may_change() -> None:
    table = torch.randn(20, 20)
    eager, model = twins(lambda: nn.Embedding.from_pretrained(table * 1))
    other = lateinit.deferred_init(lambda: nn.Parameter(torch.zeros(20, 20) + table))
    expected = table.clone()
    table.zero_()
    assert_same(eager, lateinit.materialize(model))
    assert torch.equal(lateinit.materialize(other), expected)


# -- running out of memory, and other failures half-way --------------------------------------------


def failing_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> list[int]:
    """Let the n-th op that is replayed fail; gives how many have been asked for."""
    calls: list[int] = []
    run = Replay.call

    def maybe(self: Replay, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise error
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Replay, "call", maybe)
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


def test_op_that_fails_when_replayed_is_named() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.first = nn.Linear(2, 2)
        model.row = nn.Embedding(3, 2)(torch.tensor([7])).detach()
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
assert 0 < len(done) < 16, done
lateinit.materialize(model)
torch.manual_seed(0)
for p, q in zip(build().parameters(), model.parameters(), strict=True):
    assert torch.equal(p, q)
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(lateinit.__file__).parents[1]}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits the data size, reads /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_real_shortage_of_memory_can_be_repeated_when_there_is_more(threads: int) -> None:
    run(MEMORY, str(threads))


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


# -- state dicts -----------------------------------------------------------------------------------


def other_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() * 3 + 1 for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_strict_loading_truly_loads(assign: bool) -> None:
    eager, model = twins()
    state = other_state(eager)
    result = model.load_state_dict(copy.deepcopy(state), assign=assign)
    eager.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert still_deferred(model) == ["table"]
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_partial_loading_leaves_the_rest_to_be_initialised(assign: bool) -> None:
    eager, model = twins()
    state = {name: t for name, t in other_state(eager).items() if name.startswith("dec.")}
    result = model.load_state_dict(copy.deepcopy(state), strict=False, assign=assign)
    expected = eager.load_state_dict(state, strict=False, assign=assign)
    assert result == expected
    assert not [path for path in still_deferred(model) if path.startswith("dec.")]
    assert_same(eager, lateinit.materialize(model))


def test_strict_loading_of_a_part_raises_as_torch_does() -> None:
    eager, model = twins()
    state = {"dec.bias": torch.ones(4), "odd": torch.ones(1)}
    for twin in (eager, model):
        with pytest.raises(RuntimeError, match=r'Missing key\(s\)[\s\S]*"enc\.weight"'):
            twin.load_state_dict(state)
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loading_of_a_wrong_shape_raises_as_torch_does(assign: bool) -> None:
    eager, model = twins()
    state = {**other_state(eager), "enc.bias": torch.ones(9)}
    for twin in (eager, model):
        with pytest.raises(RuntimeError, match=r"size mismatch for enc\.bias: .*\[9\].*\[8\]"):
            twin.load_state_dict(copy.deepcopy(state), assign=assign)
    assert lateinit.is_deferred(model.enc.bias)
    assert_same(eager, lateinit.materialize(model))


def test_loading_casts_to_the_dtype_of_the_model() -> None:
    eager, model = twins()
    state = {name: tensor.double() for name, tensor in other_state(eager).items()}
    for twin in (eager, model):
        twin.load_state_dict(state)
    assert_same(eager, lateinit.materialize(model))


def test_foreign_module_that_holds_a_deferred_parameter_truly_loads() -> None:
    eager, model = twins()
    foreign, expected = nn.Linear(4, 8), nn.Linear(4, 8)
    foreign.weight, expected.weight = model.enc.weight, eager.enc.weight
    state = other_state(expected)
    for twin in (foreign, expected):
        twin.load_state_dict(state)
    assert model.enc.weight is foreign.weight
    assert_same(expected, foreign)
    assert_same(eager, lateinit.materialize(model))


def test_foreign_module_that_holds_a_deferred_buffer_truly_loads() -> None:
    eager, model = twins()
    foreign = nn.Module()
    foreign.register_buffer("mine", model.table)
    foreign.load_state_dict({"mine": torch.full((4,), 9.0)})
    eager.table.fill_(9)
    assert_same(eager, lateinit.materialize(model))


def test_state_dict_on_meta_is_refused_and_never_taken_for_values() -> None:
    eager, model = twins()
    state = {name: t.to("meta") for name, t in eager.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"enc\.weight[\s\S]*meta|enc\.weight[\s\S]*no values"):
        model.load_state_dict(state)
    assert_same(eager, lateinit.materialize(model))


def test_deferred_state_dict_does_not_load_into_a_real_model() -> None:
    eager, model = twins()
    before = snapshot(eager)
    with pytest.raises(RuntimeError, match=r"enc\.weight[\s\S]*lateinit\.materialize"):
        eager.load_state_dict(model.state_dict())
    assert_same(before, snapshot(eager))
    assert_untouched(eager, model)


def test_loading_by_swapping_truly_loads_or_raises() -> None:
    eager, model = twins()
    state = other_state(eager)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        assert_same(eager, lateinit.materialize(model))
    else:
        eager.load_state_dict(state)
        assert_same(eager, lateinit.materialize(model))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_copying_values_into_a_deferred_parameter_gives_it_those() -> None:
    eager, model = twins()
    for twin in (eager, model):
        with torch.no_grad():
            twin.dec.weight.copy_(torch.ones(4, 8))
        twin.dec.bias.data.copy_(torch.arange(4.0))
    assert not lateinit.is_deferred(model.dec.weight)
    assert_same(eager, lateinit.materialize(model))


# -- optimizers, copies, other processes -----------------------------------------------------------


def test_optimizer_built_over_deferred_parameters_steps_over_real_ones() -> None:
    eager, model = twins()
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [p for p in twin.parameters() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in twin.parameters() if p.dim() <= 1], "lr": 0.5},
            ]
        )
        for twin in (eager, model)
    ]
    lateinit.materialize(model)
    inputs = torch.randn(6, 4)
    for _ in range(3):
        for twin, optimizer in zip((eager, model), optimizers, strict=True):
            optimizer.zero_grad()
            twin(inputs).square().sum().backward()
            optimizer.step()
    assert_same(eager, model)


def test_gradient_of_a_deferred_parameter_is_not_lost_in_silence() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.weight.sum().backward()
        return layer

    eager, model = twins(build)
    try:
        lateinit.materialize(model)
    except LateinitError:
        return
    assert torch.equal(eager.weight.grad, model.weight.grad)


def test_parameter_can_be_swapped_as_a_real_one_can() -> None:
    _, model = twins()
    parameter, ones = model.enc.weight, nn.Parameter(torch.ones(8, 4))
    torch.utils.swap_tensors(parameter, ones)
    assert torch.equal(parameter.detach(), torch.ones(8, 4))
    assert lateinit.is_deferred(ones)


SENT = """
import pickle, sys, warnings
import torch
import lateinit
from tests.models import MODELS
from tests.models import MODELS
from tests.snapshots import first_difference, snapshot

warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
torch.manual_seed(99)
with open(sys.argv[1], "rb") as file:
    sent = pickle.load(file)
for name, model in sent.items():
    lateinit.materialize(model)
    case = next(case for case in MODELS if case.name == name)
    torch.manual_seed(0)
    difference = first_difference(snapshot(case.build()), snapshot(model))
    if difference is not None:
        print(name, difference)
"""


def test_deferred_models_can_be_materialised_in_another_process(tmp_path: Path) -> None:
    sent = {}
    for case in MODELS:
        # What is inside a graph or was made in inference mode is pickled as a plain leaf.
        if case.pickles and case.deepcopies and case.trains:
            torch.manual_seed(0)
            sent[case.name] = lateinit.deferred_init(case.build)
    assert len(sent) > 90
    path = tmp_path / "models.pickle"
    path.write_bytes(pickle.dumps(sent))
    assert run(SENT, str(path)) == ""


def test_pickle_of_half_a_shared_memory_is_refused() -> None:
    eager, model = twins(TwoViews)
    lateinit.materialize(model.real)
    with pytest.raises(DeferredTensorError, match=r"cannot pickle.*shared.*materialise the rest"):
        pickle.dumps(model)
    assert_same(eager, lateinit.materialize(model))


def test_shallow_copy_of_a_model_has_its_very_parameters() -> None:
    eager, model = twins()
    copied = copy.copy(model)
    assert copied.enc.weight is model.enc.weight
    lateinit.materialize(copied)
    assert_same(eager, model)


def test_shallow_copy_of_a_parameter_shares_its_memory() -> None:
    eager, model = twins()
    copied = copy.copy(model.enc.weight)
    assert isinstance(copied, nn.Parameter)
    lateinit.materialize(model)
    lateinit.materialize(copied)
    assert type(copied) is nn.Parameter
    assert copied.data_ptr() == model.enc.weight.data_ptr()
    assert torch.equal(copied, eager.enc.weight)


def test_saving_a_deferred_state_dict_with_torch_saves_the_program(tmp_path: Path) -> None:
    eager, model = twins()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="lateinit"):
        torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = torch.load(tmp_path / "state.pt", weights_only=False)
    assert lateinit.is_deferred(loaded)
    lateinit.materialize(loaded)
    for name, tensor in eager.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert loaded["enc.weight"].data_ptr() == loaded["tied.weight"].data_ptr()
    assert_untouched(eager, model)


# -- skip_init -------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [nn.functional.linear, torch.Tensor, nn.Linear(2, 2), "Linear"])
def test_skip_init_of_what_is_no_module_class_raises_as_torch_does(thing: object) -> None:
    with pytest.raises(RuntimeError, match="Expected a Module"):
        lateinit.skip_init(thing)


def test_skip_init_whose_constructor_raises_leaves_the_generator() -> None:
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="missing"):
        lateinit.skip_init(nn.Linear, 3)
    assert torch.equal(state, torch.get_rng_state())
