"""Random programs of tensor operations, for the tests that compare replay with eager.

A program is plain data, a list of `Step`s; `run` carries it out on a pool of tensors. Whether a
step applies is decided from shapes, strides and dtypes alone, so that a program does the same
under every way of running it, except where it reads values and those differ.
"""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = ((), (1,), (3,), (15,), (16,), (17,), (40,), (4, 5), (2, 3, 4), (6, 6), (0,), (1, 33))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST_POOL = 10


@dataclass(frozen=True, slots=True)
class Step:
    """An operation of `OPS`, the two tensors of the pool it is about, and a number it uses."""

    op: str
    first: int
    second: int
    number: int


@dataclass(slots=True)
class Run:
    """The tensors that a program has made, and the values that it has read."""

    pool: list[torch.Tensor] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)


def shape(number: int) -> tuple[int, ...]:
    return SHAPES[number % len(SHAPES)]


def dtype(number: int) -> torch.dtype:
    return DTYPES[number % len(DTYPES)]


def writable(t: torch.Tensor) -> bool:
    """No two elements in one place, and nothing that autograd guards."""
    apart = all(size < 2 or stride > 0 for size, stride in zip(t.shape, t.stride(), strict=True))
    return apart and not t.requires_grad


def real(t: torch.Tensor) -> bool:
    return t.is_floating_point()


def real_and_writable(t: torch.Tensor) -> bool:
    return real(t) and writable(t)


def always(_: torch.Tensor) -> bool:
    return True


# Each takes (t, u, n): two tensors of the pool and a number.

FACTORIES = {
    "zeros": lambda t, u, n: torch.zeros(shape(n), dtype=dtype(n // 12)),
    "full": lambda t, u, n: torch.full(shape(n), n / 3),
    "empty_filled": lambda t, u, n: torch.empty(shape(n), dtype=dtype(n // 12)).fill_(n),
    "arange": lambda t, u, n: torch.arange(n % 21),
    "linspace": lambda t, u, n: torch.linspace(-1, n, n % 18),
    "eye": lambda t, u, n: torch.eye(n % 5 + 1),
    "tensor": lambda t, u, n: torch.tensor([[n, 2.5], [0.1, -1]]),
    "from_numpy": lambda t, u, n: torch.from_numpy(np.arange(n % 7, dtype=np.float32)),
    "rand": lambda t, u, n: torch.rand(shape(n), dtype=dtype(n // 12)),
    "randn": lambda t, u, n: torch.randn(shape(n), dtype=dtype(n // 12)),
    "complex": lambda t, u, n: torch.randn(shape(n), dtype=torch.complex64),
    "randint": lambda t, u, n: torch.randint(-n - 1, n + 1, shape(n)),
    "randperm": lambda t, u, n: torch.randperm(n % 19),
    "channels_last": lambda t, u, n: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "laid_out": lambda t, u, n: torch.empty_strided((3, 4), (1, 3 + n % 2)).normal_(),
    "copied_generator": lambda t, u, n: torch.randn(shape(n), generator=copied_generator(n)),
    "own_generator": lambda t, u, n: torch.randn(
        shape(n), generator=torch.Generator().manual_seed(n)
    ),
}
IN_PLACE = {
    "zero_": lambda t, u, n: t.zero_(),
    "fill_": lambda t, u, n: t.fill_(n % 3),
    "set_first": lambda t, u, n: t.view(-1)[:1].fill_(1) if t.is_contiguous() else t.zero_(),
    "copy_": lambda t, u, n: t.copy_(u.detach().clone()) if t.shape == u.shape and real(u) else 0,
    "masked_fill_": lambda t, u, n: t.masked_fill_(t == n % 3, 1),
    "index_fill_": lambda t, u, n: t.index_fill_(0, torch.tensor([0]), 1) if t.numel() else 0,
    "last_set": lambda t, u, n: t.__setitem__(..., 0) if t.dim() == 0 else t[-1:].fill_(1),
}
REAL_IN_PLACE = {
    "uniform_": lambda t, u, n: t.uniform_(-n, 1),
    "normal_": lambda t, u, n: t.normal_(n, 0.5),
    "exponential_": lambda t, u, n: t.exponential_(),
    "bernoulli_": lambda t, u, n: t.bernoulli_(0.4),
    "trunc_normal_": lambda t, u, n: nn.init.trunc_normal_(t, std=0.02),
    "trunc_normal_redrawn": lambda t, u, n: nn.init.trunc_normal_(t, a=-1.5, b=1.2),
    "mul_": lambda t, u, n: t.mul_(n / 4),
    "add_": lambda t, u, n: t.add_(0.3, alpha=n),
    "clamp_": lambda t, u, n: t.clamp_(-1, 1),
    "tanh_": lambda t, u, n: t.tanh_(),
    "add_mean": lambda t, u, n: t.add_(t.mean()),
    "div_by_read": lambda t, u, n: t.div_(1 + abs(t.detach().double().sum().item())),
    "data_normal_": lambda t, u, n: t.data.normal_(),
    "half_redrawn": lambda t, u, n: t.chunk(2)[0].uniform_() if t.dim() else t.uniform_(),
}
VIEWS = {
    "transpose": lambda t, u, n: t.transpose(0, -1) if t.dim() else t.view(1),
    "every_second": lambda t, u, n: t[::2] if t.dim() else t[None],
    "tail": lambda t, u, n: t[n % 3 :] if t.dim() else t,
    "select": lambda t, u, n: t[0] if t.dim() and len(t) else t[None],
    "flat": lambda t, u, n: t.reshape(-1),
    "diagonal": lambda t, u, n: t.diagonal() if t.dim() > 1 else t.unsqueeze(0),
    "permuted": lambda t, u, n: t.permute([*range(t.dim())][::-1]),
    "moved": lambda t, u, n: t.movedim(0, -1) if t.dim() else t,
    "as_strided": lambda t, u, n: as_rows(t),
    "of_class": lambda t, u, n: t.detach().as_subclass(Marked),
    "made_of_class": lambda t, u, n: Marked(t.detach()),
    "by_numpy": lambda t, u, n: torch.from_numpy(t.detach().numpy()) if plain(t) else t,
    "by_dlpack": lambda t, u, n: torch.from_dlpack(t.detach()) if plain(t) else t,
    "detach": lambda t, u, n: t.detach(),
    "data": lambda t, u, n: t.data,
    "expand": lambda t, u, n: t.expand(2, *t.shape),
    "conj": lambda t, u, n: t.conj(),
    "as_bits": lambda t, u, n: t.view(torch.int16) if t.dtype == torch.bfloat16 else t.view_as(t),
    "parameter": lambda t, u, n: nn.Parameter(t, requires_grad=real(t)),
    "from_storage": lambda t, u, n: torch.empty(0, dtype=t.dtype).set_(
        t.untyped_storage(), t.storage_offset(), (t.numel() and 1,), (1,)
    ),
}
PURE = {
    "clone": lambda t, u, n: t.clone(),
    "deepcopy": lambda t, u, n: copy.deepcopy(unmarked(t)),
    "pickled": lambda t, u, n: pickle.loads(pickle.dumps(t.detach().resolve_conj())),
    "saved": lambda t, u, n: saved(t.detach().resolve_conj()),
    "contiguous": lambda t, u, n: t.contiguous(),
    "cast": lambda t, u, n: t.to(dtype(n)) if not t.is_complex() else t.to(torch.complex128),
    "stacked": lambda t, u, n: torch.stack([t, t]),
    "joined": lambda t, u, n: torch.cat([t.flatten(), u.flatten()]),
    "zeros_like": lambda t, u, n: torch.zeros_like(t),
    "new_full": lambda t, u, n: t.new_full((3,), 1),
    "flipped": lambda t, u, n: t.flip(list(range(t.dim()))),
}
REAL_PURE = {
    "rand_like": lambda t, u, n: torch.rand_like(t),
    "randn_like": lambda t, u, n: torch.randn_like(t),
    "bernoulli": lambda t, u, n: torch.bernoulli(t.sigmoid()),
    "poisson": lambda t, u, n: torch.poisson(t.double().abs().nan_to_num().clamp(max=40)),
    "dropout": lambda t, u, n: nn.functional.dropout(t, 0.3),
    "normal_around": lambda t, u, n: torch.normal(t, 0.1),
    "scaled": lambda t, u, n: t * (n / 5) + 1,
    "outer": lambda t, u, n: torch.outer(t.flatten()[:4], t.flatten()[:3]),
    "summed": lambda t, u, n: t.sum(dtype=torch.float64),
    "ordered": lambda t, u, n: t.flatten().sort().values,
    "right_vectors": lambda t, u, n: torch.linalg.svd(square(t))[2],
    "half_spectrum": lambda t, u, n: torch.fft.rfftn(square(t).expand(3, 4, 4)),
    "hessian": lambda t, u, n: torch.func.hessian(lambda x: (x**3).sum())(square(t)[0]),
    "multiplied_cast": lambda t, u, n: multiplied_cast(square(t), square(t).T, n),
    "gradient": lambda t, u, n: gradient(square(t), n),
    "convolved": lambda t, u, n: nn.functional.conv2d(
        square(t).expand(2, 3, 4, 4).contiguous(memory_format=LAYOUTS[n % 2]),
        torch.ones(2, 3, 2, 2),
    ),
    "tried": lambda t, u, n: tried(t.detach()),
    "positive": lambda t, u, n: t[t > 0],
    "where": lambda t, u, n: torch.where(t > 0, t, -1),
}
READS = {
    "tolist": lambda t, u, n: t.tolist(),
    "item": lambda t, u, n: t.flatten()[0].item() if t.numel() else None,
    "numpy": lambda t, u, n: (
        t.detach().resolve_conj().float().numpy().tobytes() if not t.is_complex() else None
    ),
    "any": lambda t, u, n: bool((t.detach() == 1).any()),
    "text": lambda t, u, n: repr(t),
    "length": lambda t, u, n: (t.shape, t.stride(), t.device, t.dtype, t.is_meta),
    "equal": lambda t, u, n: torch.equal(t, u) if t.dtype == u.dtype else None,
    "tied": lambda t, u, n: t.data_ptr() == u.data_ptr() if t.numel() and u.numel() else None,
}
STREAM = {
    "manual_seed": lambda t, u, n: torch.manual_seed(n),
    "drawn_away": lambda t, u, n: torch.randn(shape(n)),
    "forked": lambda t, u, n: forked(n),
    "rewound": lambda t, u, n: rewound(n),
}
REBINDS = {"swap_data": lambda t, u, n: swap_data(t, u)}


class Marked(torch.Tensor):
    """A class of tensors."""


LAYOUTS = (torch.contiguous_format, torch.channels_last)


def plain(t: torch.Tensor) -> bool:
    """Whether numpy has its dtype and layout, and its class is torch's."""
    return t.dtype in (torch.float32, torch.float64, torch.int64) and type(t) is torch.Tensor


def unmarked(t: torch.Tensor) -> torch.Tensor:
    """Of a plain class: torch copies views of other classes in some layouts only."""
    return t.as_subclass(torch.Tensor) if type(t) is Marked else t


def as_rows(t: torch.Tensor) -> torch.Tensor:
    few = t.numel() < 4 or not t.is_contiguous()
    return t if few else t.as_strided((2, 2), (2, 1), t.storage_offset())


def saved(t: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_generator(number: int) -> torch.Generator:
    own = torch.Generator().manual_seed(number)
    torch.rand(shape(number), generator=own)
    return pickle.loads(pickle.dumps(own)) if number % 2 else copy.deepcopy(own)


def multiplied_cast(a: torch.Tensor, b: torch.Tensor, number: int) -> torch.Tensor:
    with torch.autocast("cpu", dtype=(torch.bfloat16, torch.float16)[number % 2]):
        return (a @ b.T).T + a[1:2]


def gradient(t: torch.Tensor, number: int) -> torch.Tensor:
    with torch.enable_grad():
        x = t.requires_grad_()
        made = nn.functional.gelu(x @ x.T) if number % 2 else x.softmax(0).prod(1)
        made.tanh().sum().backward()
    assert x.grad is not None
    return x.grad


def tried(t: torch.Tensor) -> torch.Tensor:
    """A draw that is refused if a value is no probability; it may have drawn by then."""
    try:
        return torch.bernoulli(t)
    except RuntimeError:
        return t.clone()


def square(t: torch.Tensor) -> torch.Tensor:
    """A matrix of some of the values."""
    matrix, values = torch.eye(4), t.detach().float().flatten()[:4].nan_to_num().clamp(-9, 9)
    matrix[0, : len(values)] += values
    return matrix


def forked(number: int) -> None:
    with torch.random.fork_rng(devices=[]):
        if number % 2:
            torch.manual_seed(number)
        torch.rand(shape(number))


def rewound(number: int) -> None:
    state = torch.get_rng_state()
    torch.randn(shape(number))
    torch.set_rng_state(state)


def swap_data(t: torch.Tensor, u: torch.Tensor) -> None:
    if t.dtype == u.dtype and not t.requires_grad and not u.requires_grad:
        t.data = u.data


@dataclass(frozen=True, slots=True)
class Kind:
    """A table of operations, when they apply, and whether they make a tensor or a value."""

    table: dict[str, Callable[..., Any]]
    applies: Callable[[torch.Tensor], bool] = always
    makes: bool = False
    reads: bool = False


KINDS = (
    Kind(FACTORIES, makes=True),
    Kind(IN_PLACE, writable),
    Kind(REAL_IN_PLACE, real_and_writable),
    Kind(VIEWS, makes=True),
    Kind(PURE, makes=True),
    Kind(REAL_PURE, real, makes=True),
    Kind(READS, reads=True),
    Kind(STREAM),
    Kind(REBINDS),
)
OPS = {name: kind for kind in KINDS for name in kind.table}


def run(program: list[Step]) -> Run:
    """Carry out a program on a pool that starts with one drawn and one plain tensor."""
    done = Run([torch.randn(4, 5), torch.zeros(17)])
    for step in program:
        carry_out(step, done)
    return done


def carry_out(step: Step, done: Run) -> None:
    kind = OPS[step.op]
    t, u = (done.pool[index % len(done.pool)] for index in (step.first, step.second))
    if not kind.applies(t):
        return
    if kind.makes:  # a view that autograd tracks is not to be read once its base has changed
        t, u = (x.detach() if x.requires_grad else x for x in (t, u))
    with torch.no_grad():
        made = kind.table[step.op](t, u, step.number)
    if kind.reads:
        done.seen.append(made)
    elif kind.makes and len(done.pool) < LARGEST_POOL:
        done.pool.append(made)
