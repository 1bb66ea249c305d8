"""Every operator of torch's own test list, with torch's own samples, in a constructor."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lateinit
from lateinit._replay import execution_of
from lateinit._tensors import Deferred, is_deferred_tensor
from lateinit._torch.storage import as_bytes
from lateinit.errors import LateinitError, MaterializeError
from tests.support.deferred_kinds import can_be_late, copied
from tests.support.sweep import part_of

if TYPE_CHECKING:
    from collections.abc import Callable

_SAMPLES = 8  # of each operator
_PARTS = 3
# What is in fresh memory is no value; gelsy reads some, where there are fewer rows than columns.
_UNINITIALISED = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    *("linalg.lstsq", "linalg.lstsq.grad_oriented"),
}
_REFUSED = {
    "addbmm": "in place, it resizes what it writes to",
}


def operators() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


def named(operator: Any) -> str:
    variant = operator.variant_test_name
    return f"{operator.name}.{variant}" if variant else str(operator.name)


def made_here(value: Any) -> Any:
    """A tensor that a block makes, with the values of one from outside; all else as it is."""
    return copied(value) if isinstance(value, Tensor) and can_be_late(value) else value


def calling(function: Callable[..., Any], sample: Any) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        given = pytree.tree_map(made_here, ((sample.input, *sample.args), sample.kwargs))
        result = function(*given[0], **given[1])
        return [leaf for leaf in pytree.tree_leaves((result, given)) if isinstance(leaf, Tensor)]

    return call


def differs(eager: list[Tensor], found: list[Tensor]) -> str | None:
    """What is not the same of two results, if anything."""
    if len(eager) != len(found):
        return "number of tensors"
    for ours, theirs in zip(found, eager, strict=True):
        if (ours.dtype, ours.shape, ours.layout) != (theirs.dtype, theirs.shape, theirs.layout):
            return "dtype, shape or layout"
        if ours.layout is not torch.strided or ours.is_nested or ours.is_quantized:
            continue
        if not torch.equal(as_bytes(ours), as_bytes(theirs)):
            return "bits"
        triples = zip(ours.shape, ours.stride(), theirs.stride(), strict=True)
        if ours.numel() > 1 and any(n > 1 and a != b for n, a, b in triples):
            return "strides"
    return None


def compared(function: Callable[..., Any], sample: Any, name: str) -> str | None:
    """What differs between an eager call and a recorded one, if anything."""
    call = calling(function, sample)
    torch.manual_seed(0)
    try:
        eager = call()
    except Exception:  # noqa: BLE001 - a sample that asks for what this build has not
        return None
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        found = lateinit.materialize(lateinit.deferred_init(call))
    except (LateinitError, RuntimeError) as error:
        return None if name in _REFUSED else f"{type(error).__name__}: {error}"
    if not torch.equal(state, torch.get_rng_state()):
        return "random state"
    return differs(eager, found)


def itself(operator: Any) -> Any:
    return operator


def in_place(operator: Any) -> Any:
    return operator.inplace_variant


@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize(
    ("variant", "dtype", "which"),
    [(itself, torch.float32, 0), (in_place, torch.float32, 1), (itself, torch.bfloat16, 2)],
    ids=["float32", "in place", "bfloat16"],
)
@pytest.mark.filterwarnings("ignore")
def test_every_operator_gives_in_a_constructor_what_it_gives_eagerly(
    variant: Callable[[Any], Any], dtype: torch.dtype, which: int, part: int
) -> None:
    wrong, tried = {}, 0
    for operator in part_of(operators(), which, 3)[part::_PARTS]:
        name, function = named(operator), variant(operator)
        known = name in _UNINITIALISED
        if function is None or known or dtype not in operator.supported_dtypes("cpu"):
            continue
        torch.manual_seed(part)
        samples = operator.sample_inputs("cpu", dtype, requires_grad=False)
        for number, sample in zip(range(_SAMPLES), samples, strict=False):
            tried += 1
            found = compared(function, sample, name)
            if found is not None:
                wrong[f"{name}, sample {number}"] = found
    assert tried > 50
    assert wrong == {}


# -- kernels ---------------------------------------------------------------------------------------

# What makes, moves or shows elements computes nothing.
_NO_KERNELS = {
    *("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "full", "arange"),
    *("new_empty", "new_zeros", "new_ones", "scalar_tensor", "lift", "lift_fresh", "copy", "clone"),
    *("_to_copy", "fill", "zero", "detach", "alias", "as_strided", "_reshape_alias", "view"),
    *("resolve_conj", "resolve_neg", "_conj", "_neg_view", "set", "resize"),
    *("uniform", "normal", "random", "exponential", "bernoulli"),
}
_OTHER_KERNELS = {
    "nn.functional.ctc_loss": "lengths are a tensor to one overload, a list to another",
    "linalg.eigvalsh": "of no matrices, nothing is computed",
}


@functools.cache
def overloads() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        found.setdefault(name.split(".")[0], []).append(name)
    return found


@functools.cache
def is_composite(name: str) -> bool:
    has_kernel, key = torch._C._dispatch_has_kernel_for_dispatch_key, "CompositeImplicitAutograd"
    found = overloads().get(name)
    return not found or any(has_kernel(overload, key) for overload in found)


def kernels(call: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """The outermost ops with a kernel of their own, and the shapes they were given."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        call()
    found: Counter[tuple[str, str]] = Counter()
    events = [event for event in profile.function_events if event.cpu_parent is None]
    while events:
        event = events.pop()
        name = event.name.rstrip("_")
        if is_composite(event.name):
            events += event.cpu_children
        elif name.removeprefix("aten::") not in _NO_KERNELS:
            found[name, str(event.input_shapes)] += 1
    return found


def replayed(made: list[Tensor]) -> None:
    where = [Deferred.of(tensor) for tensor in made if is_deferred_tensor(tensor)]
    for first in where[:1]:
        execution_of(first.program).values(dict.fromkeys(found.ref.storage for found in where))


@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.filterwarnings("ignore")
def test_no_kernel_runs_in_a_replay_of_a_composite_op_that_does_not_run_eagerly(part: int) -> None:
    """Torch takes composite ops apart by what the tensors are, which a recording must not show."""
    wrong = {}
    for operator in part_of(operators(), 0, 2)[part::_PARTS]:
        name = named(operator)
        known = name in _UNINITIALISED or name in _OTHER_KERNELS or name in _REFUSED
        composite = is_composite(f"aten::{operator.aten_name}")
        if known or not composite or torch.float32 not in operator.supported_dtypes("cpu"):
            continue
        torch.manual_seed(part)
        samples = operator.sample_inputs("cpu", torch.float32, requires_grad=False)
        for sample in itertools.islice(samples, 2):
            found = added(calling(operator, sample))
            if found:
                wrong[name] = found
    assert wrong == {}


def added(call: Callable[[], list[Tensor]]) -> Counter[tuple[str, str]]:
    """The kernels that only a replay runs."""
    torch.manual_seed(0)
    try:
        eager = kernels(call)
    except Exception:  # noqa: BLE001 - a sample that asks for what this build has not
        return Counter()
    torch.manual_seed(0)
    made = lateinit.deferred_init(call)
    return kernels(lambda: replayed(made)) - eager


# -- forward passes --------------------------------------------------------------------------------


class Passed(nn.Module):
    """Keeps what a part of it gave in the constructor."""

    def __init__(self, part: nn.Module, *inputs: Tensor, grad: bool, train: bool) -> None:
        super().__init__()
        self.part = part.train(train)
        with torch.set_grad_enabled(grad):
            found = self.part(*inputs)
        leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
        self.shapes = [tuple(leaf.shape) for leaf in leaves]
        self.found = [leaf.detach() for leaf in leaves]


def attending(**options: Any) -> nn.Module:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, **options)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x, x, x, need_weights=False)

    return Attending()


class Packed(nn.Module):
    """A recurrent layer that is given sequences of several lengths."""

    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 5, 1]))
        found, state = self.inner(packed)
        return found.data, state


PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (attending, (9, 2, 32)),
    "attention, batch first": (lambda: attending(batch_first=True), (2, 9, 32)),
    "attention, dropout": (lambda: attending(dropout=0.3), (9, 2, 32)),
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 9, 32)),
    "batch norm": (lambda: nn.BatchNorm1d(16), (7, 16)),
    "convolution": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 17, 17)),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
        (7, 16),
    ),
    "lstm, projected": (lambda: nn.LSTM(17, 33, proj_size=9), (7, 3, 17)),
    "rnn, relu": (lambda: nn.RNN(17, 33, nonlinearity="relu"), (7, 3, 17)),
    "rnn cell": (lambda: nn.RNNCell(17, 33), (3, 17)),
    "gru cell": (lambda: nn.GRUCell(17, 33), (3, 17)),
    "lstm cell": (lambda: nn.LSTMCell(17, 33), (3, 17)),
}
for kind in (nn.LSTM, nn.GRU, nn.RNN):
    PARTS |= {
        f"{kind.__name__.lower()}{option}": (functools.partial(kind, 17, 33, **options), shape)
        for option, options, shape in (
            ("", {"num_layers": 2}, (7, 3, 17)),
            (", no bias", {"bias": False}, (7, 3, 17)),
            (", batch first", {"bidirectional": True, "batch_first": True}, (3, 7, 17)),
            (", dropout", {"num_layers": 2, "dropout": 0.5}, (7, 3, 17)),
        )
    } | {
        f"{kind.__name__.lower()}, packed": (
            lambda kind=kind: Packed(kind(17, 33, 2, bidirectional=True)),
            (7, 3, 17),
        )
    }
# Eagerly they take a way of their own, which is told and not followed.
REFUSED = {
    *((f"{kind}, dropout", True, True) for kind in ("lstm", "gru", "rnn")),
    *((f"{kind}, dropout", False, True) for kind in ("lstm", "gru", "rnn")),
    ("attention, batch first", False, False),
    ("encoder", False, False),
}


def passed(name: str, grad: bool, train: bool) -> tuple[Passed, Passed]:
    """A pass in a constructor that is run, and one that is recorded."""
    part, shape = PARTS[name]

    def build() -> Passed:
        return Passed(part(), torch.randn(shape), grad=grad, train=train)

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    return eager, lateinit.deferred_init(build)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", PARTS)
def test_a_forward_pass_in_a_constructor_gives_its_bits_or_is_refused(
    name: str, grad: bool, train: bool
) -> None:
    eager, model = passed(name, grad, train)
    assert model.shapes == eager.shapes
    if (name, grad, train) in REFUSED:
        with pytest.raises(LateinitError, match="was computed in the constructor by"):
            lateinit.materialize(model)
        lateinit.materialize(model, only="part.*")
        assert all(map(is_deferred_tensor, model.found))
    else:
        lateinit.materialize(model)
        assert differs(eager.found, model.found) is None
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("name", [name for name in PARTS if "dropout" not in name])
def test_a_forward_pass_in_a_constructor_takes_real_data_from_outside(name: str) -> None:
    part, shape = PARTS[name]
    x = torch.randn(shape)
    torch.manual_seed(0)
    eager = Passed(part(), x, grad=True, train=True)
    torch.manual_seed(0)
    model = lateinit.deferred_init(lambda: Passed(part(), x, grad=True, train=True))
    lateinit.materialize(model)
    assert differs(eager.found, model.found) is None


def test_a_forward_pass_gives_its_bits_where_a_kernel_rounds_by_the_number_of_rows() -> None:
    """A product of seven steps at once has other bits than seven products, with this of MKL."""
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            __file__,
            "-k",
            "a_forward_pass_in and (rnn or gru or lstm)",
        ],
        env=os.environ | {"MKL_CBWR": "COMPATIBLE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


def causal(size: int) -> Tensor:
    return torch.triu(torch.ones(size, size), 1).bool()


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "padding": lambda: {"src_key_padding_mask": torch.arange(5).expand(3, 5) > 3},
    "bool": lambda: {"mask": causal(5)},
    "float": lambda: {"mask": torch.zeros(5, 5).masked_fill(causal(5), -torch.inf)},
    "causal": lambda: {"mask": causal(5), "is_causal": True},
    "both": lambda: {
        "mask": causal(5),
        "src_key_padding_mask": torch.arange(5).expand(3, 5) > 3,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_an_encoder_s_fused_kernel_is_refused_whatever_its_masks(
    masks: str, norm_first: bool, layers: int
) -> None:
    def build() -> nn.Module:
        with torch.no_grad():
            layer = nn.TransformerEncoderLayer(12, 2, 19, batch_first=True, norm_first=norm_first)
            module = nn.Module()
            module.part = (nn.TransformerEncoder(layer, layers) if layers else layer).eval()
            given = MASKS[masks]()
            if not layers and "mask" in given:
                given["src_mask"] = given.pop("mask")
            module.found = module.part(torch.randn(3, 5, 12), **given)
            return module

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    model = lateinit.deferred_init(build)
    try:
        lateinit.materialize(model)
    except MaterializeError:
        return
    assert torch.equal(eager.found, model.found)
