"""What eager code does with a small tensor that it finds in a cache, and what can be seen of it.

Each use takes a tensor of shape (3, 4) in float32, which is no parameter. Some write to it.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import pickle
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributions as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.weak import WeakTensorKeyDictionary

import lateinit

with warnings.catch_warnings():
    # It scripts functions when it is imported. After torch.compile that may fail: torch.jit knows
    # wrappers by the ids that they had (torch/jit/_builtins.py).
    warnings.simplefilter("ignore")
    import torch._decomp.decompositions_for_jvp

if TYPE_CHECKING:
    from collections.abc import Callable

Use = "Callable[[Tensor], Any]"
X = torch.arange(12.0).view(3, 4)


def followed() -> Tensor:
    """Real data that autograd follows."""
    return X.clone().requires_grad_()


class Scaled(nn.Module):
    """Scales by a tensor that it has as a buffer, or as an attribute."""

    def __init__(self, t: Tensor, *, buffer: bool = True) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("t", t)
        else:
            self.t = t

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.t).relu() + 1


class Learning(nn.Module):
    """An eager constructor that makes parameters of a table."""

    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(t.clone())
        self.bias = nn.Parameter(t[0])
        self.more = nn.ParameterList([t * 2, nn.Parameter(torch.empty_like(t))])
        nn.init.normal_(self.more[1])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Special(nn.Parameter):
    pass


class Labelled(Tensor):
    pass


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(x, t)
        return x * x * t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, t = ctx.saved_tensors
        return 2 * x * t * grad, None


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0] * grad


# -- autograd -------------------------------------------------------------------------------------


def gradient(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Any]:
    """The gradient of the sum of a function at real data."""

    def use(t: Tensor) -> Any:
        x = followed()
        f(x, t).sum().backward()
        return x.grad

    return use


def own_gradient(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    """The gradient at the tensor itself."""

    def use(t: Tensor) -> Any:
        y = t.detach().requires_grad_()
        f(y).sum().backward()
        return y.grad, y

    return use


def twice(t: Tensor) -> Any:
    x = followed()
    (first,) = torch.autograd.grad((x**3 * t).sum(), x, create_graph=True)
    return torch.autograd.grad((first * t).sum(), x)


def hooked(t: Tensor) -> Any:
    seen: list[Tensor] = []
    y = t.detach().requires_grad_()
    z = y * 3
    y.register_hook(seen.append)
    z.register_hook(seen.append)
    z.retain_grad()
    (z * X).sum().backward()
    return seen, z.grad, y.grad


def tangent(t: Tensor) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, t)
        return forward_ad.unpack_dual(dual * dual).tangent


AUTOGRAD: dict[str, Any] = {
    "backward": gradient(lambda x, t: x * t),
    "double backward": twice,
    "checkpoint": gradient(
        lambda x, t: checkpoint(lambda y: (y * t).sin(), x, use_reentrant=False)
    ),
    "checkpoint of an argument": gradient(
        lambda x, t: checkpoint(lambda y, t: (y * t).sin(), x, t, use_reentrant=True)
    ),
    "function": gradient(Square.apply),
    "function of it": own_gradient(lambda t: Double.apply(t) * X),
    "own": own_gradient(lambda t: t * t),
    "own, with a number": own_gradient(lambda t: (t * torch.tensor(2.0)) ** 2),
    "own, with data": own_gradient(lambda t: (t * t) * X),
    "hooks": hooked,
    "tangent": tangent,
    "graph": lambda t: (y := t.requires_grad_() * 2, type(y.grad_fn).__name__, y.is_leaf),
    "number that learns": lambda t: torch.autograd.grad(
        (t * (n := torch.tensor(2.0, requires_grad=True))).sum(), n
    ),
}


def through_a_view(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """What a view gives that was taken before the tensor was used."""

    def use(t: Tensor) -> Any:
        view = t[1:]
        return t * X, f(view), view

    return use


TRANSFORMS: dict[str, Any] = {
    "grad with a view": through_a_view(
        lambda v: torch.func.grad(lambda y: (y * v).square().sum())(X[1:])
    ),
    "vmap with a view": through_a_view(lambda v: torch.vmap(lambda row: row * v[0])(X)),
    "jvp with a view": through_a_view(
        lambda v: torch.func.jvp(lambda y: y * v, (X[1:],), (X[1:],))
    ),
    "functionalize with a view": through_a_view(
        lambda v: torch.func.functionalize(lambda y: (y * v).add_(1))(X[1:])
    ),
    "vmap over data": lambda t: torch.vmap(lambda row: row * t[0])(X),
    "vmap over it": torch.vmap(lambda row: row * X[0]),
    "vmap over both": lambda t: torch.vmap(torch.dot)(t, X),
    "vmap over columns": torch.vmap(lambda c: c * X[:, 0], in_dims=1),
    "vmap that reads": lambda t: torch.vmap(lambda row: row * float(t.sum()))(X),
    "grad": lambda t: torch.func.grad(lambda y: (y * y * t).sum())(X),
    "grad of a row": lambda t: torch.func.grad(lambda y: (y * t[0]).sum())(X),
    "jvp": lambda t: torch.func.jvp(lambda y: y * y * t, (X,), (X + 1,)),
    "jacrev": lambda t: torch.func.jacrev(lambda y: (y * t).sum(0))(X),
    "hessian": lambda t: torch.func.hessian(lambda y: (y**3 * t).sum())(X),
    "grad at it": torch.func.grad(lambda y: (y * y * X).sum()),
    "grad beside it": lambda t: torch.func.grad(lambda y, t: (y * t).sum())(X, t=t),
    "vjp at it": lambda t: torch.func.vjp(lambda y: y * y * X, t)[1](X),
    "jvp at it": lambda t: torch.func.jvp(lambda y: y * y * X, (t,), (t,)),
    "jacobians at it": lambda t: (
        torch.func.jacrev(lambda y: (y * y * X).sum(0))(t),
        torch.func.jacfwd(lambda y: (y * y * X).sum(0))(t),
    ),
    "hessian at it": torch.func.hessian(lambda y: (y**3 * X).sum()),
    "linearized at it": lambda t: torch.func.linearize(lambda y: y * y * X, t)[1](X),
    "functionalize at it": torch.func.functionalize(lambda y: (y * X).add_(1)),
    "vmap of grad at it": torch.vmap(torch.func.grad(lambda y: (y * y * X[0]).sum())),
    "vmap of grad": lambda t: torch.vmap(torch.func.grad(lambda y: (y * y * t[0]).sum()))(X),
    "functionalize": lambda t: torch.func.functionalize(lambda y: (y * t).add_(1))(X),
    "functional_call": lambda t: torch.func.functional_call(Scaled(X), {"t": t}, (X,)),
}


# -- the compilers --------------------------------------------------------------------------------


def compiled(f: Any, *args: Any, backend: str = "eager") -> Any:
    torch._dynamo.reset()
    run = torch.compile(f, backend=backend)
    return run(X, *args), run(X + 1, *args)


def trained(t: Tensor) -> Any:
    torch._dynamo.reset()
    x = followed()
    torch.compile(Scaled(t), backend="aot_eager")(x).sum().backward()
    return x.grad


def at(t: Tensor) -> Any:
    return torch.func.grad(lambda y: (y * y).sum())(t)


def script(a: Tensor, b: Tensor) -> Tensor:
    return a * b


COMPILERS: dict[str, Any] = {
    "compiled closure": lambda t: compiled(lambda x: (x * t).relu() + 1),
    "compiled argument": lambda t: compiled(lambda x, t: (x * t).relu() + 1, t),
    "compiled attribute": lambda t: compiled(Scaled(t, buffer=False)),
    "compiled buffer": lambda t: compiled(Scaled(t), backend="aot_eager"),
    "compiled grad at it": lambda t: compiled(lambda x, t: at(t) * x, t),
    "compiled training": trained,
    "exported": lambda t: torch.export.export(Scaled(t), (X,), strict=False).module()(X),
    "exported attribute": lambda t: torch.export.export(
        Scaled(t, buffer=False), (X,), strict=False
    ).module()(X),
    "traced": lambda t: torch.fx.experimental.proxy_tensor.make_fx(lambda x: x * t)(X)(X),
    "scripted": lambda t: torch.jit.script(script)(X, t),
}


# -- copies and files -----------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    """Saved, and loaded as a file that nobody trusts."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@dataclasses.dataclass
class Record:
    t: Tensor


COPIES: dict[str, Any] = {
    "deepcopy": lambda t: copy.deepcopy(t) * X,
    "deepcopy of a module": lambda t: copy.deepcopy(Scaled(t))(X),
    "copy": lambda t: copy.copy(t) * X,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)) * X,
    "saved": through_a_file,
    "saved state": lambda t: through_a_file(Scaled(t).state_dict()),
    "asdict": lambda t: dataclasses.asdict(Record(t))["t"] * X,
    "clone": lambda t: (t.clone() * X, t.detach().clone().requires_grad_()),
    "collated": lambda t: (default_collate([t, X]), default_collate([t, t]) * 1),
    "loaded in batches": lambda t: [b[0] * 1 for b in DataLoader(TensorDataset(t), 2)],
    "shared": lambda t: (t.share_memory_().is_shared(), t * 1),
    "averaged": lambda t: torch.optim.swa_utils.AveragedModel(Scaled(t))(X),
}


# -- contexts -------------------------------------------------------------------------------------


def under(context: Any, f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def use(t: Tensor) -> Any:
        with context():
            return f(t)

    return use


def among_fakes(t: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = t * mode.from_tensor(X)
        return type(made).__name__, made.shape, made.device, mode.from_tensor(t).device


def in_another_block(t: Tensor) -> Any:
    with lateinit.deferred():
        made = t * X
        model = Scaled(t * 2)
    return made + X, lateinit.materialize(model)(X)


def by_threads(t: Tensor) -> Any:
    made: list[Any] = [None] * 3

    def run(number: int) -> None:
        made[number] = t * X

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def in_a_fork(t: Tensor) -> Any:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads
        child = os.fork()
    if child == 0:
        try:
            os.write(writer, (t * X).numpy().tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        seen = pipe.read()
    os.waitpid(child, 0)
    return seen, t * X


CONTEXTS: dict[str, Any] = {
    "inference": under(torch.inference_mode, lambda t: (t * X).clone()),
    "no_grad": under(torch.no_grad, lambda t: t * X),
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16), lambda t: (t @ X.T).float()),
    "device": under(lambda: torch.device("cpu"), lambda t: t * torch.ones(4)),
    "meta device": under(lambda: torch.device("meta"), lambda t: t * X),
    "forked generator": under(
        lambda: torch.random.fork_rng(devices=[]), lambda t: t * torch.randn(3, 4)
    ),
    "fakes": among_fakes,
    "block": in_another_block,
    "threads": by_threads,
    "fork": in_a_fork,
}


# -- parameters, modules, optimizers --------------------------------------------------------------


def facts(p: Tensor) -> Any:
    return type(p).__name__, p.device, p.is_leaf, p.requires_grad, lateinit.is_deferred(p), p * X


def learning(t: Tensor) -> Any:
    model = Learning(t)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    assert not lateinit.is_deferred(model)
    return list(model.parameters()), [p.grad for p in model.parameters()], t * 1


def in_place_of(model: nn.Module, **options: Any) -> Any:
    model.load_state_dict({"t": X * 5}, **options)
    return model(X)


def optimized(t: Tensor) -> Any:
    y = t.detach().requires_grad_()
    optimizer = torch.optim.SGD([y], lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        (y * X).sum().backward()
        optimizer.step()
    return y


def onto(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Any]:
    """What a parameter is after a write of the tensor to it."""

    def use(t: Tensor) -> Any:
        p = nn.Parameter(X.clone())
        with torch.no_grad():
            write(p, t)
        return p

    return use


MODULES: dict[str, Any] = {
    "parameter": lambda t: facts(nn.Parameter(t)),
    "frozen parameter": lambda t: facts(nn.Parameter(t, requires_grad=False)),
    "parameter of a clone": lambda t: facts(nn.Parameter(t.clone())),
    "parameter of a row": lambda t: facts(nn.Parameter(t[0])),
    "parameter of a sum": lambda t: facts(nn.Parameter(t * 2 + 1)),
    "parameter of a subclass": lambda t: facts(Special(t)),
    "parameter that shares": lambda t: (nn.Parameter(t).data.add_(1), t * 1),
    "learning": learning,
    "embedding": lambda t: nn.Embedding.from_pretrained(t)(torch.tensor([0, 2])),
    "register_buffer": lambda t: (
        Scaled(t)(X),
        {k: v + 0 for k, v in Scaled(t).state_dict().items()},
    ),
    "loaded": lambda t: (in_place_of(Scaled(t)), t * 1),
    "loaded by assignment": lambda t: (in_place_of(Scaled(t), assign=True), t * 1),
    "loaded from": lambda t: (m := Scaled(X.clone()), m.load_state_dict({"t": t}), m(X))[2],
    "moved": lambda t: (Scaled(t).to("cpu").double()(X.double()), Scaled(t).half().t * 1),
    "statistics": lambda t: (m := nn.BatchNorm1d(4), setattr(m, "running_mean", t[0]), m(X))[2],
    "optimizer": optimized,
    "copied into a parameter": onto(lambda p, t: p.copy_(t)),
    "copied into .data": onto(lambda p, t: p.data.copy_(t)),
    "added to a parameter": onto(lambda p, t: p.add_(t)),
    "a row of a parameter": onto(lambda p, t: p.__setitem__(0, t[0])),
    "weight norm": lambda t: nn.utils.parametrizations.weight_norm(
        (m := nn.Linear(4, 3), setattr(m, "weight", nn.Parameter(t)))[0]
    )(X),
}


# -- values for Python ----------------------------------------------------------------------------


def count(t: Tensor) -> Tensor:
    return (t * 7).long()[2, 2].clamp(1, 3)


PYTHON: dict[str, Any] = {
    "asarray": np.asarray,
    "array": np.array,
    "array of doubles": lambda t: np.asarray(t, dtype=np.float64),
    "ufunc": lambda t: np.sqrt(np.abs(t)),
    "numpy": Tensor.numpy,
    "with arrays": lambda t: (np.ones((3, 4)) * t.numpy(), t * np.float32(2), t * np.float64(2)),
    "torch.tensor": lambda t: (torch.tensor([t[0, 0], 1.0]), torch.tensor(t.tolist())),
    "as_tensor": lambda t: (torch.as_tensor(t) * 1, torch.as_tensor([t[0, 1], t[0, 2]])),
    "numbers": lambda t: (float(t[0, 0]), int(t[2, 2]), bool(t[0, 0]), t[1, 1].item()),
    "branch": lambda t: ("yes" if t.any() else "no", "yes" if t[0, 0] > 0 else "no"),
    "f-string": lambda t: (f"{t}", f"{t[0, 0]:.3f}", f"{t[0, 1]}", format(t[0, 2], "8.2f")),
    "iteration": lambda t: ([row * 1 for row in t], [float(n) for n in t[0]], len(t)),
    "unpacking": lambda t: [a[0].item() + b[1] + c[2] + X for a, b, c in [t]],
    "zip": lambda t: ([a * b for a, b in zip(t, X, strict=True)], reversed(t)[0] + 0),
    "membership": lambda t: (5.0 in t, t[0, 0] in t, X[1, 1] in t),
    "range": lambda t: (list(range(count(t))), [7] * int(count(t)), [10, 20, 30, 40][count(t)]),
    "sizes": lambda t: (torch.zeros(count(t)), torch.arange(count(t)), X[: count(t)]),
    "built-ins": lambda t: (max(t[0]) + 0, sum(t) + 0, sorted(t.flatten().tolist())),
    "math": lambda t: (math.exp(t[2, 2]), round(float(t[2, 2]), 2), 2.0 * t[1, 1] + X),
    "equal": lambda t: (torch.equal(t, t), torch.equal(t, X), t.equal(t.clone()), X.equal(t)),
    "allclose": lambda t: (torch.allclose(t, t.clone()), bool((t == t.clone()).all()), (t > X)),
    "hash": lambda t: ({t: 1}[t], [t].index(t), (t * X)),
    "device": lambda t: (str(t.device), t.is_cpu, t.is_meta, t.is_cuda, t.get_device(), t.type()),
    "weak reference": lambda t: ((r := weakref.ref(t)), t * X, r() is t)[1:],
    "weak dictionary": lambda t: (d := WeakTensorKeyDictionary({t: 1}), t * X, d[t])[1:],
    "attribute": lambda t: (setattr(t, "label", 3), t * X, t.label),
    "dlpack": lambda t: (torch.from_dlpack(t) * 1, np.from_dlpack(t)),
}

# -- ops ------------------------------------------------------------------------------------------


def written(write: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """What a tensor, and a view of it taken before, are after a write."""

    def use(t: Tensor) -> Any:
        view = t[0]
        write(t)
        return view * 1, t * 1

    return use


def receiving(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Any]:
    """What real data is after a write of the tensor to it."""

    def use(t: Tensor) -> Any:
        x = X.clone()
        write(x, t)
        return x

    return use


def places(t: Tensor) -> Tensor:
    return (t * 7).long().clamp(0, 2)


INDICES: dict[str, Any] = {
    "data by it": lambda t: (X[places(t)], X[t > 0], X[:, t.argmax(1)], X[places(t)[0, 0]]),
    "it by data": lambda t: (t[torch.tensor([2, 0])], t[X > 3], t[:, torch.tensor([1])]),
    "gather": lambda t: (
        X.gather(0, places(t)),
        t.gather(0, torch.zeros(1, 4).long()),
        t.take(places(X)),
    ),
    "table": lambda t: (F.embedding(torch.tensor([0, 2]), t), t.index_select(0, torch.tensor([1]))),
    "set by data": written(lambda t: t.__setitem__(0, X[0])),
    "set where": written(lambda t: t.__setitem__(X > 5, -1.0)),
    "set by an index": written(lambda t: t.__setitem__(torch.tensor([1]), X[1])),
    "set a number": written(lambda t: t.__setitem__((0, 1), 5.0)),
    "set data": receiving(lambda x, t: x.__setitem__(0, t[0])),
    "set data where": receiving(lambda x, t: x.__setitem__(t > 0, 9.0)),
    "set data by it": receiving(lambda x, t: x.__setitem__(places(t)[0, :2], 4.0)),
}
WRITES: dict[str, Any] = {
    "add_": written(lambda t: t.add_(X)),
    "+=": written(lambda t: t.__iadd__(X)),
    "mul_": written(lambda t: t.mul_(2).add_(1)),
    "mul_ by a number of torch": written(lambda t: t.mul_(torch.tensor(2.0))),
    "zero_": written(lambda t: t.zero_()),
    "clamp_": written(lambda t: t.clamp_(max=0.1)),
    "normal_": written(lambda t: t.normal_()),
    "uniform_": written(nn.init.uniform_),
    "view": written(lambda t: t[0].add_(X[0])),
    "flat": written(lambda t: t.view(-1).mul_(3)),
    "copy_": written(lambda t: t.copy_(X)),
    "copy_ of a row": written(lambda t: t.copy_(X[0])),
    "copy_ into a row": written(lambda t: t[1].copy_(X[0])),
    "data": written(lambda t: setattr(t, "data", X.clone())),
    "set_": written(lambda t: t.set_(X.clone())),
    "out": written(lambda t: torch.add(X, X, out=t)),
    "foreach": written(lambda t: torch._foreach_add_([t], [X])),
    "no_grad": written(torch.no_grad()(lambda t: t.sub_(X))),
    "into out": receiving(lambda x, t: torch.mul(t, t, out=x)),
    "into out, with data": receiving(lambda x, t: torch.mul(t, X, out=x)),
    "into": receiving(lambda x, t: x.add_(t).mul_(t.sum()).addcmul_(t, t)),
    "into where": receiving(lambda x, t: x.masked_fill_(t > 0, 9.0)),
    "into places": receiving(lambda x, t: x.scatter_(1, places(t), 1.0)),
    "into rows": receiving(lambda x, t: x.index_add_(0, torch.tensor([0, 1, 2]), t)),
    "copied": receiving(lambda x, t: x.copy_(t)),
    "set from": receiving(lambda x, t: x.set_(t.clone())),
}
FUNCTIONS: dict[str, Any] = {
    "arithmetic": lambda t: (t + X, X - t, t / 2 + X, 2**t, X**t, -t + X, t // 1 * X),
    "products": lambda t: (X @ t.T, F.linear(X, t), torch.einsum("ij,kj->ik", X, t)),
    "choices": lambda t: (torch.where(t > 0, t, X), torch.lerp(X, X + 1, t)),
    "joined": lambda t: (torch.stack([t, X]), torch.cat([X, t]), torch.block_diag(t, X)),
    "shapes": lambda t: (
        t.repeat(2, 1) * 1,
        t.expand(2, 3, 4) + X,
        t.flip(0) * X,
        t.roll(1, 0) * X,
    ),
    "attributes": lambda t: (t.T @ X, X @ t.mT, t.data * X, t.real * X, t.shape, t.nbytes),
    "like": lambda t: (torch.ones_like(t) * X, t.new_zeros(4) * X, torch.randn_like(t) * X),
    "factories": lambda t: torch.arange(4.0, device=t.device) + X,
    "casts": lambda t: (t.to(X) * X, t.double() * X, X.to(t) * 1, t.cpu() * X, X.type_as(t) + 0),
    "reductions": lambda t: (t.sum() + X, t.unique() * 1, t.topk(2).indices, t.nonzero()),
    "linalg": lambda t: (
        torch.linalg.inv(t[:, :3] + 9 * torch.eye(3)),
        torch.linalg.svdvals(t) + 0,
    ),
    "fft": lambda t: torch.fft.fft(t) * 1,
    "layers": lambda t: (F.layer_norm(X, (4,), t[0], t[1]), F.conv1d(X.T[None], t[:, :, None])),
    "attention": lambda t: F.scaled_dot_product_attention(X, X, X, attn_mask=t[:, :3]),
    "grid": lambda t: F.grid_sample(X[None, None], t[:, :2][None, None], align_corners=False),
    "resized": lambda t: F.interpolate(t[None], 8) * 1,
    "losses": lambda t: (F.mse_loss(X, t), F.cross_entropy(X, t.softmax(-1))),
    "weighted": lambda t: nn.CrossEntropyLoss(weight=t[0].abs())(X, torch.tensor([0, 1, 2])),
    "complex": lambda t: (torch.complex(t, X), torch.polar(t.abs(), X).real * 1),
    "bits": lambda t: t.view(torch.int32) * 1,
    "subclass": lambda t: (
        (t.as_subclass(Labelled) * X).as_subclass(Tensor),
        t * X.as_subclass(Labelled),
    ),
    "sorted": lambda t: (torch.isin(X, t), torch.bucketize(X, t[0].sort().values)),
    "foreach": lambda t: torch._foreach_mul([X, X], [t, t]),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8).dequantize(),
    "sparse": lambda t: (t.to_sparse() * 2).to_dense() * X,
    "values of a sparse one": lambda t: torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 2, 0], [1, 0, 3, 2]]), t[0], (3, 4)
    ).to_dense(),
    "places of a sparse one": lambda t: torch.sparse_coo_tensor(
        places(t)[:2], X[0], (3, 3)
    ).to_dense(),
    "values of a compressed one": lambda t: torch.sparse_csr_tensor(
        torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1]), t[1], (2, 2)
    ).to_dense(),
    "nested": lambda t: torch.nested.nested_tensor([t.detach()[0], X[1, :2]]).to_padded_tensor(0),
}
DRAWS: dict[str, Any] = {
    "normal around": lambda t: (torch.normal(t, 1.0), torch.normal(t, t.abs())),
    "bernoulli": lambda t: torch.bernoulli(t.sigmoid()),
    "multinomial": lambda t: torch.multinomial(t.abs() + 0.1, 2),
    "dropout": lambda t: F.dropout(t, 0.5) * X,
    "like": torch.rand_like,
    "Normal": lambda t: seen_of(dist.Normal(t, t.abs() + 1), X),
    "Uniform": lambda t: seen_of(dist.Uniform(t, t + 20), t + 10),
    "MultivariateNormal": lambda t: seen_of(
        dist.MultivariateNormal(t[0], torch.eye(4) + t[0].outer(t[0])), X
    ),
    "Categorical": lambda t: seen_of(dist.Categorical(logits=t), torch.tensor([0, 1, 2])),
    "Bernoulli": lambda t: seen_of(dist.Bernoulli(t.sigmoid()), (X > 4).float()),
    "Independent": lambda t: seen_of(dist.Independent(dist.Normal(t, 1.0), 1), X),
    "Transformed": lambda t: dist.TransformedDistribution(
        dist.Normal(t, 1.0), dist.TanhTransform()
    ).rsample(),
    "Dirichlet": lambda t: dist.Dirichlet(t.softmax(-1)).rsample(),
    "divergence": lambda t: dist.kl_divergence(dist.Normal(t, 1.0), dist.Normal(X, 2.0)),
}


def seen_of(d: Any, value: Tensor) -> Any:
    return d.sample((2,)), d.log_prob(value), d.entropy() + 0, d.mean + 0, repr(d)


USES: dict[str, Callable[[Tensor], Any]] = {
    f"{theme}: {name}": use
    for theme, uses in {
        "autograd": AUTOGRAD,
        "func": TRANSFORMS,
        "compilers": COMPILERS,
        "copies": COPIES,
        "contexts": CONTEXTS,
        "modules": MODULES,
        "python": PYTHON,
        "indices": INDICES,
        "writes": WRITES,
        "functions": FUNCTIONS,
        "draws": DRAWS,
    }.items()
    for name, use in uses.items()
}


def seen(value: Any) -> Any:
    """What can be seen of a value, as plain data."""
    if isinstance(value, Tensor):
        lateinit.materialize(value)
        assert not value.is_meta
        of = value.detach().resolve_conj().resolve_neg().cpu()
        flags = value.dtype, value.shape, value.requires_grad, value.is_leaf, value.device
        return type(value).__name__, *flags, of.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return [seen(item) for item in value]
    if isinstance(value, dict):
        return {str(key): seen(item) for key, item in value.items()}
    return repr(value)
