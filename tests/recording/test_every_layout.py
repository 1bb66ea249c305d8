"""Every operator of torch's own test list in a constructor, on every layout, with its gradients.

By default a third of the operators are tried, each with one sample; in a sweep all of both.
"""

from __future__ import annotations

import itertools
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lateinit
from lateinit._torch.storage import as_bytes
from lateinit.errors import LateinitError, RecordingError
from tests.support.deferred_kinds import can_be_late, differentiable
from tests.support.op_calls import UNINITIALISED, named, operators
from tests.support.snapshots import assert_same
from tests.support.sweep import EVERYTHING, part_of
from tests.support.twins import twins

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[[], list[Tensor]]

SAMPLES = 10_000 if EVERYTHING else 6  # torch's first samples are the plainest
REFUSED = {
    "native_group_norm": "reads what is not contiguous as if it were",
    "addbmm": "in place, it resizes what it writes to",
    "sgn": "the gradient is a zero tensor, which has no memory",
    "to_sparse": "its gradient is sparse",
}


# -- how arguments lie in memory -------------------------------------------------------------------


def in_columns(tensor: Tensor) -> Tensor:
    """The first dim innermost in memory."""
    dims = tuple(reversed(range(tensor.dim())))
    return tensor.permute(dims).contiguous().permute(dims)


def channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


def expanded(tensor: Tensor) -> Tensor:
    many = tensor.dim() > 0 and tensor.size(0) > 1
    return tensor[:1].clone().expand(tensor.size()) if many else tensor


def with_gaps(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor


LAID = {
    "channels last": channels_last,
    "columns": in_columns,
    "expanded": expanded,
    "gaps": with_gaps,
    "plain": torch.Tensor.contiguous,
}


def made_here(laid: Tensor) -> Tensor:
    """A tensor that a block makes, with the values and the layout of one from outside."""
    steps = list(zip(laid.size(), laid.stride(), strict=True))
    whole = tuple(slice(None) if step or n < 2 else slice(1) for n, step in steps)
    part = laid[whole]
    span = 1 + sum((n - 1) * step for n, step in zip(part.size(), part.stride(), strict=True))
    memory = torch.zeros(span if part.numel() else 0, dtype=part.dtype)
    return memory.as_strided(part.size(), part.stride()).copy_(part).expand(laid.size())


# -- one call, eagerly and recorded ----------------------------------------------------------------


def strides(tensor: Tensor) -> list[int]:
    pairs = zip(tensor.size(), tensor.stride(), strict=True)
    return [s for n, s in pairs if n > 1] if tensor.numel() > 1 else []


def differ(found: list[Tensor], eager: list[Tensor]) -> str | None:
    for ours, theirs in zip(found, eager, strict=True):
        if (ours.dtype, ours.shape, strides(ours)) != (theirs.dtype, theirs.shape, strides(theirs)):
            return "dtype, shape or strides"
        if not torch.equal(as_bytes(ours), as_bytes(theirs)):
            return "bits"
    return None


def compared(call: Build) -> str | None:
    """What differs between an eager call and a recorded one, if anything."""

    def build() -> tuple[list[Tensor], list[list[int]]]:
        made = call()
        floating = [t for t in made if t.is_floating_point()]
        # What is drawn like a tensor shows what a constructor sees of its layout.
        return [*made, *map(torch.randn_like, floating)], list(map(strides, made))

    torch.manual_seed(0)
    try:
        again = build()[0]
        torch.manual_seed(0)
        eager, laid = build()
    except Exception:  # noqa: BLE001 - a sample that asks for what this build has not
        return None
    if differ(again, eager):
        return None  # what was in memory, or a median of equal numbers
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        found, seen = lateinit.deferred_init(build)
        ended = torch.get_rng_state()
        found = lateinit.materialize(found)
    except (LateinitError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    if seen != laid:
        return f"strides: {seen}, and are {laid}"
    if not torch.equal(state, ended):
        return "random state"
    return differ(found, eager)


def tensors(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and can_be_late(leaf)]


def plain_call(function: Callable[..., Any], make: Callable[[], Any]) -> list[Tensor]:
    args, kwargs = make()
    result = function(*args, **kwargs)
    return tensors((result, args, kwargs))


def gradients(function: Callable[..., Any], make: Callable[[], Any]) -> list[Tensor]:
    args, kwargs = make()
    leaves = list(filter(differentiable, tensors((args, kwargs))))
    for leaf in leaves:
        leaf.requires_grad_()
    made = [t for t in tensors(function(*args, **kwargs)) if t.requires_grad]
    loss = sum((t.abs() if t.is_complex() else t.float()).square().sum() for t in made)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*(t.detach() for t in made), *(t.clone() for t in found if t is not None)]


def wrong(
    of: Callable[..., list[Tensor]], layouts: list[str], dtype: torch.dtype, some: list[Any]
) -> dict[str, str]:
    """What differs of which operators; each is tried on one of the layouts."""
    found, tried = {}, 0
    for operator in some:
        name = named(operator)
        laid = layouts[zlib.crc32(name.encode()) % len(layouts)]
        skipped = name in UNINITIALISED or name in REFUSED or name.startswith("sparse")
        if skipped or dtype not in operator.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        samples = operator.sample_inputs("cpu", dtype, requires_grad=False)
        taken = list(enumerate(itertools.islice(samples, SAMPLES)))
        for number, sample in taken if EVERYTHING else taken[-1:]:
            given = (sample.input, *sample.args), sample.kwargs
            ready = {id(t): LAID[laid](t.detach()) for t in tensors(given)}

            def make(given: Any = given, ready: dict[int, Tensor] = ready) -> Any:
                return pytree.tree_map(
                    lambda v: made_here(ready[id(v)]) if id(v) in ready else v, given
                )

            tried += 1
            said = compared(lambda make=make, operator=operator: of(operator, make))
            if said is not None:
                found[f"{name}, sample {number}"] = said
    assert tried > 100
    return found


HALF_THEN_SINGLE = [torch.bfloat16, torch.float32]
# By default each operator is tried on one layout, the same in every run.
LAYOUTS = [[laid] for laid in sorted(LAID)] if EVERYTHING else [sorted(LAID)]


@pytest.mark.parametrize("dtype", HALF_THEN_SINGLE, ids=["half", "single"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids=", ".join)
@pytest.mark.filterwarnings("ignore")
def test_every_operator_gives_its_layout_and_bits_in_a_constructor(
    layouts: list[str], dtype: torch.dtype
) -> None:
    some = part_of(operators(), HALF_THEN_SINGLE.index(dtype), 3)
    assert wrong(plain_call, layouts, dtype, some) == {}


@pytest.mark.parametrize("layouts", LAYOUTS, ids=", ".join)
@pytest.mark.filterwarnings("ignore")
def test_every_operator_has_its_gradients_in_a_constructor(layouts: list[str]) -> None:
    assert wrong(gradients, layouts, torch.float32, part_of(operators(), 2, 3)) == {}


# -- models that a constructor fits ----------------------------------------------------------------


class Fitted(nn.Module):
    """Takes two steps of training in its constructor."""

    autocast = False

    def __init__(self, part: nn.Module, given: Tensor) -> None:
        super().__init__()
        self.part = part
        optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                made = tensors(part(given))[0]
            made.square().mean().backward()
            optimizer.step()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 72)

    def forward(self, x: Tensor) -> Tensor:
        heads = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in self.inner(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(*heads, is_causal=True)


def image(*size: int) -> Tensor:
    return torch.randn(size).to(memory_format=torch.channels_last)


def last(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


FITTED: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Fitted(Attending(), torch.randn(2, 9, 24)),
    "encoder": lambda: Fitted(
        nn.TransformerEncoderLayer(24, 3, 31, dropout=0.0, batch_first=True), torch.randn(2, 9, 24)
    ),
    "gru": lambda: Fitted(nn.GRU(7, 11, 2), torch.randn(5, 3, 7)),
    "group norm, channels last": lambda: Fitted(
        last(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6)), image(2, 3, 7, 9)
    ),
    "lstm": lambda: Fitted(nn.LSTM(7, 11, 2, bidirectional=True), torch.randn(5, 3, 7)),
    "mish": lambda: Fitted(
        nn.Sequential(nn.Linear(7, 11), nn.Mish(), nn.Mish(inplace=True)), torch.randn(19, 7)
    ),
    "pooling in one dim": lambda: Fitted(
        nn.Sequential(nn.Conv1d(3, 6, 3), nn.MaxPool1d(2)), torch.randn(2, 3, 11)
    ),
    "residual": lambda: Fitted(last(nn.Conv2d(3, 3, 1), nn.PReLU(3)), image(2, 3, 7, 9)),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", sorted(FITTED))
@pytest.mark.filterwarnings("ignore")
def test_what_a_constructor_fits_is_what_it_fits_eagerly(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fitted, "autocast", autocast)
    torch.manual_seed(0)
    eager = FITTED[name]()
    torch.manual_seed(0)
    model = lateinit.materialize(lateinit.deferred_init(FITTED[name]))
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    assert all(map(torch.equal, *zip(*pairs, strict=True)))


GIVEN: dict[str, Callable[[], Tensor]] = {
    "group norm": lambda: nn.functional.group_norm(image(2, 6, 5, 7), 3),
    "group norm of many": lambda: nn.GroupNorm(3, 48)(image(2, 48, 25, 37)).detach(),
    "shuffled channels": lambda: torch.native_channel_shuffle(image(2, 6, 5, 7), 3),
    "pooled in one dim": lambda: nn.functional.max_pool1d(torch.randn(2, 9, 6).transpose(1, 2), 2),
    "attention": lambda: nn.functional.scaled_dot_product_attention(
        *(torch.randn(2, 9, 4, 8).transpose(1, 2) for _ in range(3))
    ),
}


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_a_composite_function_has_the_layout_of_its_kernel(name: str) -> None:
    assert compared(lambda: [GIVEN[name]()]) is None


def test_a_gradient_can_be_read_by_an_op_that_gives_a_value() -> None:
    def build() -> nn.Module:
        x = torch.randn(5, requires_grad=True)
        model = nn.Module()
        model.grad = torch.autograd.grad(x.prod(), x)[0]
        model.large = bool((model.grad > 0.1).any())
        return model

    expected, found = twins(build)
    assert_same(expected, lateinit.materialize(found))


def test_gradients_of_gradients_of_a_composite_function_are_refused_at_their_line() -> None:
    def build() -> Tensor:
        x = torch.randn(5, requires_grad=True)
        return torch.autograd.grad(x.prod(), x, create_graph=True)[0]

    with pytest.raises(RecordingError, match=r"a graph of the gradients of Tensor\.prod"):
        lateinit.deferred_init(build)


def test_a_composite_function_that_takes_a_cast_of_before_is_refused_at_its_line() -> None:
    def build() -> None:
        layer = nn.LSTM(3, 4)
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.randn(5, 2, 3))
            layer.weight_ih_l0.data.zero_()
            layer(torch.randn(5, 2, 3))

    with pytest.raises(RecordingError, match="enter autocast anew for each call"):
        lateinit.deferred_init(build)


class Clipped(nn.Module):
    """Gradients of deferred and real tensors together, clipped in a constructor."""

    def __init__(self, clip: Callable[[list[nn.Parameter]], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.real = nn.Parameter(torch.from_numpy(np.arange(3.0, dtype=np.float32)))
        self.wide = nn.Parameter(torch.ones(2).double())
        self.layer(torch.randn(7, 5)).square().sum().backward()
        self.real.grad = torch.from_numpy(np.arange(2, 5.0, dtype=np.float32))
        self.wide.grad = torch.full((2,), 3.0).double()
        norm = clip([self.real, *self.layer.parameters(), self.wide])
        self.found = [norm, *(p.grad for p in self.parameters())]


CLIPS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "norm": lambda given: nn.utils.clip_grad_norm_(given, 0.5),
    "norm, one by one": lambda given: nn.utils.clip_grad_norm_(given, 0.5, foreach=False),
    "norm, together": lambda given: nn.utils.clip_grad_norm_(given, 0.5, foreach=True),
    "largest": lambda given: nn.utils.clip_grad_norm_(given, 0.5, norm_type=torch.inf),
    "total": lambda given: nn.utils.get_total_norm([p.grad for p in given]),
    "value": lambda given: nn.utils.clip_grad_value_(given, 0.1),
}


@pytest.mark.parametrize("name", sorted(CLIPS))
def test_gradients_are_clipped_in_a_constructor_as_eagerly(name: str) -> None:
    torch.manual_seed(0)
    eager = Clipped(CLIPS[name])
    torch.manual_seed(0)
    model = lateinit.materialize(lateinit.deferred_init(Clipped, CLIPS[name]))
    pairs = zip(tensors(eager.found), tensors(model.found), strict=True)
    assert all(map(torch.equal, *zip(*pairs, strict=True)))


# -- data from outside -----------------------------------------------------------------------------

DATA = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


def attended(x: Tensor, **options: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], **options)


ON_DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: attended(x, is_causal=True),
    "attention with dropout": lambda x: attended(x, dropout_p=0.5, is_causal=True),
    "condition": torch.linalg.cond,
    "covariance": lambda x: torch.cov(x.T),
    "distribution": lambda x: torch.distributions.MultivariateNormal(
        x.mean(0), torch.corrcoef(x.T)
    ).sample(),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "quantile": lambda x: torch.quantile(x, torch.tensor([0.1, 0.5]), dim=0),
    "rank": torch.linalg.matrix_rank,
    "short-time spectrum": lambda x: torch.stft(
        x[:, 0], 8, window=torch.hann_window(8), return_complex=True
    ).abs(),
    "singular values": torch.linalg.svdvals,
}


@pytest.mark.parametrize("name", sorted(ON_DATA))
@pytest.mark.parametrize("enters", [torch.from_numpy, torch.tensor], ids=["shared", "copied"])
@pytest.mark.filterwarnings("ignore:stft:UserWarning")
def test_a_composite_function_of_data_gives_in_a_constructor_what_it_gives_eagerly(
    enters: Callable[[Any], Tensor], name: str
) -> None:
    assert compared(lambda: [ON_DATA[name](enters(DATA)), torch.randn(3)]) is None


def test_a_composite_function_on_meta_by_request_stays_there() -> None:
    with lateinit.deferred():
        made = nn.functional.group_norm(torch.ones(1, 4, 3, device="meta"), 2)
    assert made.is_meta
    assert not lateinit.is_deferred(made)


def test_a_composite_function_writes_into_the_tensor_that_it_is_given() -> None:
    def build() -> list[Tensor]:
        out = torch.zeros(4)
        assert torch.linalg.svdvals(torch.randn(4, 5), out=out) is out
        return [out, out * 2]

    assert compared(build) is None
