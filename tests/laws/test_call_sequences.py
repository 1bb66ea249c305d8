"""Random sequences of public calls on a deferred model, each made on its eager twin as well.

The random programs of `tests.programs` vary the constructor; here the order of calls varies.
LATEINIT_SEQUENCES=10000 looks longer.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lateinit
from lateinit._tensors.walk import is_placeholder
from tests.support.building import step, trainable
from tests.support.call_sequences import (
    MODELS,
    REFUSED,
    Pair,
    Side,
    both,
    cast_together,
    other_values,
    shares_outside,
    twins,
)
from tests.support.snapshots import bits

NUMBERS = st.integers(0, 40)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
GLOBS = ("*", "*.weight", "*.bias", "*running*", "*o*", ("a*", "*.bias"))

# What is refused, and when: docs/failure-patterns.md and docs/lazy.md have each of them.
UNKNOWN = ("UninitializedError: the shape is not known", "RecordingError: .*lazy module")
NO_VALUES = ("needs the values of", "would change .* in place", "together with real tensors")
NO_MATCH = ("PatternError: .* matches no tensor",)
ONE_PLACE = ("shares its memory with a tensor that was materialised", "in several dtypes")
HALF_REAL = ("cannot pickle a deferred tensor whose storage is shared",)

WRITES = {
    "zero": lambda t: t.zero_(),
    "mul": lambda t: t.mul_(2),
    "data": lambda t: t.data.fill_(1),
    "first": lambda t: t.__setitem__(0, 1) if t.dim() else t.fill_(1),
    "normal": lambda t: nn.init.normal_(t) if t.is_floating_point() else t.zero_(),
    "constant": lambda t: nn.init.constant_(t, 0.3) if t.is_floating_point() else t.fill_(1),
    "kaiming": lambda t: nn.init.kaiming_uniform_(t) if t.dim() > 1 else t.zero_(),
    "copy": lambda t: t.copy_(torch.arange(t.numel()).view(t.shape)),
}
OPTIMIZERS: dict[str, Any] = {
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class CallSequences(RuleBasedStateMachine):
    """One pair is called at a time; those that it was copied from stay, and must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.folder = Path(tempfile.mkdtemp())

    @property
    def pair(self) -> Pair:
        return self.pairs[-1]

    @initialize(build=st.sampled_from(MODELS), seed=st.integers(0, 3))
    def construct(self, build: Any, seed: int) -> None:
        self.pairs = [twins(build, seed)]
        torch.manual_seed(seed + 100)

    # -- asking ------------------------------------------------------------------------------------

    @rule(number=NUMBERS, ask=st.sampled_from([lateinit.summary, lateinit.is_deferred, repr]))
    def ask(self, number: int, ask: Any) -> None:
        part = self.part(number)[1]
        both(self.pair, lambda: str(ask(part)))

    @rule(number=NUMBERS)
    def plan(self, number: int) -> None:
        part = self.part(number)[1]
        try:
            both(self.pair, lambda: str(lateinit.plan(part)), refusals=UNKNOWN)
        except AssertionError as error:
            if "several blocks" not in str(error):  # a plan is of one program
                raise

    # -- materialising -----------------------------------------------------------------------------

    def part(self, number: int) -> tuple[nn.Module, nn.Module]:
        parts = [list(side.model.modules()) for side in self.pair.sides]
        assert len(parts[0]) == len(parts[1])
        number %= len(parts[0])
        return parts[0][number], parts[1][number]

    def path(self, number: int) -> str:
        paths = [p for p, t in self.pair.late.tensors().items() if not is_placeholder(t)]
        return paths[number % len(paths)]

    def tensors(self, number: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        path = self.path(number)
        return path, self.pair.twin.tensors()[path], self.pair.late.tensors()[path]

    @rule(number=NUMBERS)
    def materialize_part(self, number: int) -> None:
        _, part = self.part(number)
        both(self.pair, lambda: lateinit.materialize(part, seed=None), refusals=self.unknown())

    @rule(number=NUMBERS)
    def materialize_tensor(self, number: int) -> None:
        _, _, tensor = self.tensors(number)
        done = both(self.pair, lambda: lateinit.materialize(tensor), refusals=self.unknown())
        assert done is REFUSED or done[1] is tensor

    @rule()
    def materialize_everything(self) -> None:
        if self.pair.lazy and self.pair.runs():
            self.infer_shapes(real=False)
        if not self.pair.lazy:
            for tensor in self.pair.late.tensors().values():
                both(self.pair, lambda tensor=tensor: lateinit.materialize(tensor))

    @rule(only=st.sampled_from(GLOBS))
    def materialize_glob(self, only: Any) -> None:
        late = self.pair.late.model
        refusals = (*self.unknown(), *NO_MATCH)
        both(self.pair, lambda: lateinit.materialize(late, only=only), refusals=refusals)

    @rule(number=NUMBERS)
    def materialize_name(self, number: int) -> None:
        names = list(self.pair.twin.model.state_dict())
        name, late = names[number % len(names)], self.pair.late.model
        refusals = self.unknown()
        both(self.pair, lambda: lateinit.materialize(late, only=[name]), refusals=refusals)

    def unknown(self) -> tuple[str, ...]:
        return UNKNOWN if self.pair.lazy else ()

    def no_values(self) -> tuple[str, ...]:
        return (*NO_VALUES, *self.unknown())

    @rule(number=NUMBERS, dtype=DTYPES)
    def materialize_cast(self, number: int, dtype: torch.dtype) -> None:
        """What is materialised with a cast has the values of the twin, cast, and the same ties.

        Only parameters and saved buffers are cast. Memory is cast as a whole: to ask for a part of
        what shares it binds the rest to the same dtype, where eager `to` would cut the tie; so all
        or nothing of it is asked for here.
        """
        eager, part = self.part(number)
        mine = {id(t) for t in _tensors_of(part)}
        taken = {p for p, t in self.pair.deferred().items() if id(t) in mine}
        if shares_outside(self.pair, taken, self.pairs):
            return
        saved = {id(t) for t in eager.state_dict(keep_vars=True).values()}
        found = [self.pair.twin.tensors()[path] for path in taken]
        expected = [t for t in found if id(t) in saved]
        both(
            self.pair,
            lambda: lateinit.materialize(part, dtype=dtype),
            lambda: cast_together(expected, dtype),
            refusals=(*self.unknown(), *ONE_PLACE, "share one storage, but dtype="),
        )

    # -- shapes ------------------------------------------------------------------------------------

    @rule(real=st.booleans())
    def infer_shapes(self, real: bool) -> None:
        if not self.pair.runs():
            return
        example = self.pair.example()
        given = example if real else example.to("meta")
        late = self.pair.late.model
        both(self.pair, lambda: lateinit.infer_shapes(late, given, real=real))
        assert not self.pair.lazy

    # -- loading and saving ------------------------------------------------------------------------

    def checkpoint(self, every: int, first: int) -> dict[str, torch.Tensor]:
        """Other values for some names; of a lazy layer its sizes have to follow from them."""
        state = dict(list(other_values(self.pair.twin.model).items())[first % every :: every])
        lazy = {name.rpartition(".")[0] for name in self.pair.lazy}
        unknown = {part for part in lazy if f"{part}.weight" not in state}
        return {name: t for name, t in state.items() if name.rpartition(".")[0] not in unknown}

    @rule(assign=st.booleans(), every=st.integers(1, 3), first=st.integers(0, 2))
    def load_state_dict(self, assign: bool, every: int, first: int) -> None:
        state, strict = self.checkpoint(every, first), every == 1

        def load(side: Side) -> None:
            given = copy.deepcopy(state)
            side.model.load_state_dict(given, strict=strict, assign=assign)

        twin, late = self.pair.sides
        both(self.pair, lambda: load(late), lambda: load(twin), refusals=self.unknown())

    @precondition(lambda self: not self.pair.lazy and len(self.pairs) < 4)
    @rule(assign=st.booleans(), real=st.booleans(), every=st.integers(1, 2))
    def load_from_another(self, assign: bool, real: bool, every: int) -> None:
        """The state dict of a model of the same class, which stays: what is assigned is shared."""
        other = twins(type(self.pair.twin.model))
        own = self.pair.late.model.state_dict().values()
        # To copy a deferred tensor into a real one needs its values.
        if other.lazy or not (assign or real or all(map(lateinit.is_deferred, own))):
            return
        if real:
            lateinit.materialize(other.late.model)

        def load(side: Side, source: Side) -> None:
            state = dict(list(source.model.state_dict().items())[::every])
            side.model.load_state_dict(state, strict=every == 1, assign=assign)

        twin, late = self.pair.sides
        both(self.pair, lambda: load(late, other.late), lambda: load(twin, other.twin))
        self.pairs.insert(0, other)

    @rule(every=st.integers(1, 3), first=st.integers(0, 2), wide=st.booleans())
    def load_checkpoint(self, every: int, first: int, wide: bool) -> None:
        state = self.checkpoint(every, first)
        if not state:  # a checkpoint without one name of the model is an error
            return
        if wide:
            state = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
        path, strict, late = self.new_path(), every == 1, self.pair.late.model
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        both(
            self.pair,
            lambda: lateinit.load_checkpoint(late, path, strict=strict),
            lambda: self.pair.twin.model.load_state_dict(state, strict=strict),
            refusals=self.unknown(),
        )

    @rule()
    def save_checkpoint(self) -> None:
        path, late = self.new_path(), self.pair.late.model
        refusals = ("CheckpointError: .* is lazy",) if self.pair.lazy else ()
        done = both(self.pair, lambda: lateinit.save_checkpoint(late, path), refusals=refusals)
        assert done is REFUSED or path.exists()
        if done is REFUSED:
            return
        expected = self.pair.twin.model.state_dict()
        for name, tensor in load_file(path).items():
            assert tensor.dtype == expected[name].dtype, name
            assert bits(name, tensor) == bits(name, expected[name]), name

    def new_path(self) -> Path:
        return self.folder / f"{len(list(self.folder.iterdir()))}.safetensors"

    @rule(number=NUMBERS, materialised=st.booleans())
    def keep_of_state_dict(self, number: int, materialised: bool) -> None:
        states = [side.model.state_dict() for side in self.pair.sides]
        assert list(states[0]) == list(states[1])
        name = list(states[0])[number % len(states[0])]
        if is_placeholder(states[1][name]):
            return
        for side, state in zip(self.pair.sides, states, strict=True):
            side.held.append(state[name])
        if materialised:
            found = states[1][name]
            both(self.pair, lambda: lateinit.materialize(found), refusals=self.unknown())

    # -- copies ------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.pairs) < 4)
    @rule()
    def copy_deeply(self) -> None:
        self.go_on_with(copy.deepcopy, copy.deepcopy)

    @precondition(lambda self: len(self.pairs) < 4 and self.saves())
    @rule()
    def save_and_load(self) -> None:
        refusals = (*HALF_REAL, "UninitializedError: torch.save cannot save")
        self.go_on_with(saved_and_loaded, saved_and_loaded, refusals)

    # A plain pickle of real tensors cuts their ties; one of deferred tensors does not. So it is
    # compared where nothing is real, with what `torch.save` keeps of the twin.
    @precondition(lambda self: len(self.pairs) < 4 and self.nothing_is_real() and self.saves())
    @rule()
    def pickle(self) -> None:
        self.go_on_with(
            lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded, HALF_REAL
        )

    def saves(self) -> bool:
        """`torch.save` refuses real memory that is seen in two dtypes."""
        return not hasattr(self.pair.twin.model, "bits")

    def nothing_is_real(self) -> bool:
        model = Side(self.pair.late.model)
        return all(t.is_meta or is_placeholder(t) for t in model.tensors().values())

    def go_on_with(self, late: Any, twin: Any, refusals: tuple[str, ...] = ()) -> None:
        models = [side.model for side in self.pair.sides]
        done = both(self.pair, lambda: late(models[1]), lambda: twin(models[0]), refusals=refusals)
        if done is not REFUSED:
            self.pairs.append(Pair(*map(Side, done)))

    # -- training ----------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(sorted(OPTIMIZERS)))
    def build_optimizer(self, kind: str) -> None:
        if self.pair.lazy and kind == "Adagrad":  # whose state has the shape of the parameters
            return
        for side in self.pair.sides:
            parameters = trainable(side.model)
            if parameters:
                side.optimizer = OPTIMIZERS[kind](parameters)

    @rule()
    def load_optimizer(self) -> None:
        twin, late = self.pair.sides
        if twin.optimizer is not None and late.optimizer is not None:
            state = twin.optimizer.state_dict()
            for side in (twin, late):
                side.optimizer.load_state_dict(copy.deepcopy(state))

    @precondition(lambda self: not self.pair.lazy and not any(self.deferred_parameters()))
    @rule()
    def train(self) -> None:
        pair = self.pair
        if not trainable(pair.twin.model):
            return
        if pair.twin.optimizer is None:
            self.build_optimizer("SGD")
        both(pair, *(lambda s=s: step(s.model, s.optimizer) for s in reversed(pair.sides)))

    @rule()
    def materialize_and_train(self) -> None:
        """Soon after an optimizer was built on what is deferred."""
        self.materialize_everything()
        if not self.pair.lazy:
            self.train()

    @precondition(lambda self: not self.pair.lazy and not self.pair.deferred())
    @rule()
    def run_forward(self) -> None:
        if not self.pair.runs():
            return
        models = [side.model for side in self.pair.sides]
        example = self.pair.example()
        expected, found = both(self.pair, lambda: models[1](example), lambda: models[0](example))
        assert bits("output", expected) == bits("output", found)

    def deferred_parameters(self) -> list[bool]:
        return [lateinit.is_deferred(p) for p in self.pair.late.model.parameters()]

    # -- what users do to a model ------------------------------------------------------------------

    @rule(number=NUMBERS, dtype=DTYPES, method=st.booleans())
    def cast(self, number: int, dtype: torch.dtype, method: bool) -> None:
        names = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float32: "float"}
        name = names.get(dtype, "double")
        parts = self.part(number)
        twin, late = (
            getattr(part, name) if method else (lambda part=part: part.to(dtype)) for part in parts
        )
        both(self.pair, late, twin)

    @rule(number=NUMBERS, flag=st.booleans())
    def set_requires_grad(self, number: int, flag: bool) -> None:
        parts = self.part(number)
        both(self.pair, *(lambda p=p: p.requires_grad_(flag) for p in reversed(parts)))

    @rule(number=NUMBERS, flag=st.booleans())
    def set_mode(self, number: int, flag: bool) -> None:
        for part in self.part(number):
            part.train(flag)

    @rule(number=NUMBERS, view=st.sampled_from(["flat", "t", "detach", "data", "tail", "twice"]))
    def keep_view(self, number: int, view: str) -> None:
        _, twin, late = self.tensors(number)
        if len(self.pair.late.held) >= 5:
            return
        done = both(self.pair, lambda: VIEWS[view](late), lambda: VIEWS[view](twin))
        if done is not REFUSED:
            for side, made in zip(self.pair.sides, done, strict=True):
                side.held.append(made)

    @rule(number=NUMBERS, write=st.sampled_from(sorted(WRITES)))
    def write(self, number: int, write: str) -> None:
        _, twin, late = self.tensors(number)

        def written(tensor: torch.Tensor) -> None:
            with torch.no_grad():
                WRITES[write](tensor)

        both(self.pair, lambda: written(late), lambda: written(twin), refusals=self.no_values())

    @rule(number=NUMBERS, of_another=st.booleans())
    def set_data(self, number: int, of_another: bool) -> None:
        """`tensor.data = value`: what shares its memory keeps the values that it had."""
        _, twin, late = self.tensors(number)
        values = [twin.detach().mul(3).to(twin.dtype) for _ in range(2)]

        def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
            tensor.data = tensor.data.clone() if of_another else value

        both(self.pair, lambda: put(late, values[1]), lambda: put(twin, values[0]))

    @rule(number=NUMBERS)
    def empty(self, number: int) -> None:
        _, part = self.part(number)
        tensors = [*part.parameters(), *part.buffers()]
        # Real tensors that come before a deferred one are emptied before that is asked for.
        if tensors and all(map(lateinit.is_deferred, tensors)):
            refusals = ("Module.to_empty would lose",)
            done = both(self.pair, lambda: part.to_empty(device="cpu"), refusals=refusals)
            assert done is REFUSED

    @rule(number=NUMBERS)
    def read(self, number: int) -> None:
        _, twin, late = self.tensors(number)
        done = both(self.pair, late.tolist, twin.tolist, refusals=self.no_values())
        assert done is REFUSED or repr(done[0]) == repr(done[1])

    @rule(number=NUMBERS)
    def compute(self, number: int) -> None:
        _, twin, late = self.tensors(number)
        other = torch.ones(twin.shape, dtype=twin.dtype)
        done = both(
            self.pair, lambda: late + other, lambda: twin + other, refusals=self.no_values()
        )
        if done is REFUSED:
            return
        expected, found = done
        if both(self.pair, lambda: lateinit.materialize(found), refusals=self.unknown()):
            assert bits("sum", expected) == bits("sum", found)

    # -- the stream, and other blocks --------------------------------------------------------------

    @rule(seed=st.integers(0, 3))
    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    @rule(count=st.sampled_from([1, 7, 700]))
    def draw(self, count: int) -> None:
        torch.randn(count)

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(build=st.sampled_from(MODELS))
    def build_another(self, build: Any) -> None:
        self.pairs.insert(0, twins(build))

    @rule(number=NUMBERS)
    def initialise_again_in_a_block(self, number: int) -> None:
        _, twin, late = self.tensors(number)
        # Eagerly a write to elements on one another is refused, and a recorded one when replayed.
        if not twin.is_floating_point() or 0 in twin.stride():
            return
        refusals = ("shares its memory with a tensor that is materialised",)
        both(
            self.pair,
            lambda: lateinit.deferred_init(nn.init.normal_, late, std=0.3),
            lambda: nn.init.normal_(twin, std=0.3),
            refusals=refusals,
        )

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def both_are_alike(self) -> None:
        for pair in self.pairs:
            pair.agree()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
        for pair in self.pairs:
            pair.finish()


def _tensors_of(part: nn.Module) -> list[torch.Tensor]:
    """Those that `materialize(part)` looks at."""
    model = Side(part)
    return [tensor for path, tensor in model.tensors().items() if path.startswith("model.")]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    """Through `torch.save`, which keeps ties."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


VIEWS = {
    "flat": lambda t: t.view(-1),
    "t": lambda t: t.mT if t.dim() > 1 else t,
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "tail": lambda t: t[1:] if t.dim() else t[None],
    "twice": lambda t: t.detach().expand(2, *t.shape),
}
TestCallSequences = CallSequences.TestCase
TestCallSequences.settings = settings(
    max_examples=int(os.environ.get("LATEINIT_SEQUENCES", "60")),
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
