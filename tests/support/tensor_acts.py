"""Calls of what Python, numpy, optimizers, autograd and collectives do with a tensor."""

from __future__ import annotations

import copy
import io
import itertools
import multiprocessing.reduction
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional

from tests.support.deferred_kinds import Call
from tests.support.op_calls import shown
from tests.support.tensor_calls import CRASHES_ON_DTENSOR, NOT_DISTRIBUTED, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def put(name: str) -> Callable[[Tensor, Tensor], None]:
    return lambda t, x: setattr(t, name, x)


def saved(t: Any) -> Any:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stepped(kind: Any) -> Callable[[Tensor, Tensor], Any]:
    def step(t: Tensor, x: Tensor) -> Any:
        t = t if t.is_leaf and t.requires_grad else t.detach().requires_grad_()
        t.grad = x
        kind([t], lr=0.1).step()
        return t

    return step


def nothing(_: Any) -> None:
    """For a call of which only what it leaves behind is asked."""


def added_below(real: Tensor, t: Tensor) -> Tensor:
    real.untyped_storage().copy_(t.untyped_storage())
    return real


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def autocast(t: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return t @ x


def inference(t: Tensor, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return t * x


ACTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "data = real": put("data"),
    "data = itself doubled": lambda t, x: setattr(t, "data", t.data * 2),
    "data of real = it": lambda t, x: setattr(x, "data", t.data),
    "grad = real": put("grad"),
    "grad = None": lambda t, x: setattr(t, "grad", None),
    "del grad": lambda t, x: delattr(t, "grad"),
    "requires_grad = True": lambda t, x: setattr(t, "requires_grad", True),
    "requires_grad = False": lambda t, x: setattr(t, "requires_grad", False),
    "real = real": put("real"),
    "attribute": lambda t, x: (setattr(t, "mark", 3), t.mark),
    "attribute of a tensor": lambda t, x: (setattr(t, "mark", x), t.mark)[1],
    "item = number": lambda t, x: t.__setitem__(0, 1.0),
    "items = real": lambda t, x: t.__setitem__(..., x),
    "masked items = real": lambda t, x: t.__setitem__(x > 1, 0.0),
    "item of real = it": lambda t, x: x.__setitem__(0, t[0]),
    "index by real": lambda t, x: t[x.long() % 3],
    "index of real": lambda t, x: x[t.long() % 3],
    "mask of real": lambda t, x: x[t > 1],
    "+= real": lambda t, x: t.__iadd__(x),
    "real += it": lambda t, x: x.__iadd__(t),
    "copy_ of real": lambda t, x: t.copy_(x),
    "data.copy_ of real": lambda t, x: t.data.copy_(x),
    "row copy_ of real": lambda t, x: t[0].copy_(x[0]),
    "real copy_ of it": lambda t, x: x.copy_(t),
    "row of real copy_": lambda t, x: x[0].copy_(t[0]),
    "data.fill_": lambda t, x: t.data.fill_(2.0),
    "detach().zero_": lambda t, x: t.detach().zero_(),
    "set_ of real": lambda t, x: t.set_(x),
    "data.set_ of real": lambda t, x: t.data.set_(x),
    "data.set_ of a real storage": lambda t, x: t.data.set_(x.untyped_storage(), 0, (3, 3)),
    "real set_ of it": lambda t, x: x.set_(t.detach()),
    "real set_ of its storage": lambda t, x: x.set_(t.untyped_storage(), 0, (3,), (1,)),
    "set_ to nothing": lambda t, x: t.data.set_(),
    "resize_": lambda t, x: t.data.resize_(2, 2),
    "resize_as_": lambda t, x: t.data.resize_as_(x[0]),
    "swap_tensors with real": torch.utils.swap_tensors,
    "storage": lambda t, x: t.untyped_storage(),
    "typed storage": lambda t, x: t.storage(),
    "storage fill_": lambda t, x: nothing(t.untyped_storage().fill_(0)),
    "storage copy_ of real": lambda t, x: nothing(t.untyped_storage().copy_(x.untyped_storage())),
    "real storage copy_": lambda t, x: added_below(x, t),
    "storage resize_": lambda t, x: nothing(t.untyped_storage().resize_(0)),
    "storage tolist": lambda t, x: t.untyped_storage().tolist(),
    "storage clone": lambda t, x: t.untyped_storage().clone(),
    "storage cpu": lambda t, x: t.untyped_storage().cpu(),
    "storage item": lambda t, x: t.untyped_storage()[0],
    "storage nbytes": lambda t, x: t.untyped_storage().nbytes(),
    "tensor on its storage": lambda t, x: torch.empty(0).set_(t.untyped_storage()),
    "typed storage item": lambda t, x: t.storage()[0],
    "data_ptr used": lambda t, x: t.data_ptr() != 0,
    "const_data_ptr used": lambda t, x: t.const_data_ptr() != 0,
    "numpy": lambda t, x: t.detach().numpy(),
    "asarray": lambda t, x: np.asarray(t.detach()),
    "np.add": lambda t, x: np.add(t.detach(), 1),
    "array * it": lambda t, x: np.ones((3, 3), np.float32) * t.detach(),
    "array = it": lambda t, x: np.zeros((3, 3)).__setitem__(..., t.detach()),
    "from_numpy": lambda t, x: torch.from_numpy(t.detach().numpy()),
    "list": lambda t, x: list(t),
    "unpacked": lambda t, x: [*t.unbind()],
    "reversed": lambda t, x: reversed(t),
    "len": lambda t, x: len(t),
    "in": lambda t, x: x[0, 0] in t,
    "float": lambda t, x: float(t[0, 0]),
    "bool": lambda t, x: bool(t[0, 0]),
    "if equal": torch.equal,
    "str": lambda t, x: len(str(t)) > 0,
    "round": lambda t, x: round(t[0, 0].item()),
    "comparison": lambda t, x: t == x,
    "copy.copy": lambda t, x: copy.copy(t),
    "deepcopy": lambda t, x: copy.deepcopy(t),
    "pickle": lambda t, x: pickle.loads(pickle.dumps(t)),
    "torch.save": lambda t, x: saved(t),
    "torch.save of a view": lambda t, x: saved([t.detach(), t.detach()[0]]),
    "forking pickler": lambda t, x: len(multiprocessing.reduction.ForkingPickler.dumps(t)) > 0,
    "dlpack": lambda t, x: torch.from_dlpack(t.detach()),
    "as_tensor": lambda t, x: torch.as_tensor(t),
    "as_tensor double": lambda t, x: torch.as_tensor(t, dtype=torch.float64),
    "asarray of torch": lambda t, x: torch.asarray(t),
    "asarray copy": lambda t, x: torch.asarray(t, copy=True),
    "torch.tensor": lambda t, x: torch.tensor(t.detach()),
    "torch.tensor of a list": lambda t, x: torch.tensor([t[0, 0].detach(), 1.0]),
    "new_tensor": lambda t, x: t.new_tensor([1.0]),
    "new_tensor of it": lambda t, x: x.new_tensor(t.detach()),
    "new_zeros": lambda t, x: t.new_zeros(2),
    "torch.Tensor": lambda t, x: torch.Tensor(t.detach()),
    "Parameter": lambda t, x: nn.Parameter(t),
    "Buffer": lambda t, x: nn.Buffer(t),
    "as_subclass": lambda t, x: t.as_subclass(Tensor),
    "to cpu": lambda t, x: t.to("cpu"),
    "to cpu, copy": lambda t, x: t.to("cpu", copy=True),
    "to cpu, double": lambda t, x: t.to("cpu", torch.float64),
    "cpu": lambda t, x: t.cpu(),
    "to real": lambda t, x: t.to(x),
    "to device of real": lambda t, x: t.to(x.device),
    "real to it": lambda t, x: x.to(t),
    "type_as real": lambda t, x: t.type_as(x),
    "real type_as it": lambda t, x: x.type_as(t),
    "to its own device": lambda t, x: t.to(t.device),
    "zeros on its device": lambda t, x: torch.zeros(3, device=t.device) + t,
    "empty_like, on cpu": lambda t, x: torch.zeros_like(t, device="cpu"),
    "type string": lambda t, x: t.type("torch.DoubleTensor"),
    "type asked": lambda t, x: t.type(),
    "parameters_to_vector": lambda t, x: nn.utils.parameters_to_vector([t, t]),
    "vector_to_parameters": lambda t, x: nn.utils.vector_to_parameters(x.view(-1), [t]),
    "clip_grad_norm_": lambda t, x: nn.utils.clip_grad_norm_([t], 1.0),
    "foreach add_": lambda t, x: torch._foreach_add_([t.detach()], [x]),
    "foreach into real": lambda t, x: torch._foreach_add_([x], [t.detach()]),
    "foreach copy_": lambda t, x: torch._foreach_copy_([x], [t.detach()]),
    "SGD": stepped(torch.optim.SGD),
    "AdamW": stepped(torch.optim.AdamW),
    "autograd.grad": lambda t, x: torch.autograd.grad((t.detach().requires_grad_() * x).sum(), t),
    "backward": lambda t, x: (t * 2).sum().backward(),
    "backward of real": lambda t, x: (x.detach().requires_grad_() * t).sum().backward(),
    "autograd.Function": lambda t, x: Doubled.apply(t),
    "hook": lambda t, x: t.requires_grad_().register_hook(print) is None,
    "retain_grad": lambda t, x: (t.requires_grad_() * 2).retain_grad(),
    "autocast": autocast,
    "inference mode": inference,
    "vmap": torch.vmap(torch.mul),
    "vmap of it": lambda t, x: torch.vmap(torch.neg)(t),
    "func.grad": lambda t, x: torch.func.grad(lambda w: (w * w).sum())(t),
    "func.jvp": lambda t, x: torch.func.jvp(torch.sin, (t,), (x,)),
    "aten op": torch.ops.aten.add.Tensor,
    "aten op on it": lambda t, x: torch.ops.aten.mul.Tensor(t, t),
    "random like it": lambda t, x: torch.rand_like(t),
    "dropout": lambda t, x: nn.functional.dropout(t),
    "einsum": lambda t, x: torch.einsum("ij,jk", t, x),
    "block_diag": torch.block_diag,
    "cat": lambda t, x: torch.cat([t, x]),
    "where": lambda t, x: torch.where(x > 1, t, x),
    "number of no dims": lambda t, x: t * torch.tensor(2.0),
    "Python number": lambda t, x: 2 * t + 1,
    "real ** it": lambda t, x: x**t,
    "real @ it": lambda t, x: x @ t,
    "share_memory_": lambda t, x: t.share_memory_(),
    "numel and sizes": lambda t, x: (t.numel(), t.size(), t.stride(), t.is_contiguous()),
    "normal_": lambda t, x: nn.init.normal_(t),
    "distributions": lambda t, x: torch.distributions.Normal(t, 1.0).mean,
    "Normal.sample": lambda t, x: torch.distributions.Normal(t, 1.0).sample(),
    "linear": lambda t, x: nn.functional.linear(x, t),
    "all_reduce": lambda t, x: dist.all_reduce(t.detach()),
    "broadcast": lambda t, x: dist.broadcast(t.detach(), 0),
    "all_gather into real": lambda t, x: dist.all_gather([x], t.detach()),
    "all_gather into it": lambda t, x: dist.all_gather([t.detach()], x),
    "all_gather_coalesced": lambda t, x: dist.all_gather_coalesced([[x]], [t.detach()]),
    "all_gather_coalesced into it": lambda t, x: dist.all_gather_coalesced([[t.detach()]], [x]),
    "gather into it": lambda t, x: dist.gather(x, [t.detach()]),
    "reduce_scatter": lambda t, x: dist.reduce_scatter(x, [t.detach()]),
    "reduce_scatter into it": lambda t, x: dist.reduce_scatter(t.detach(), [x]),
    "all_to_all": lambda t, x: dist.all_to_all([x], [t.detach()]),
    "all_to_all into it": lambda t, x: dist.all_to_all([t.detach()], [x]),
    "gather": lambda t, x: dist.gather(t.detach(), [x]),
    "scatter": lambda t, x: dist.scatter(t.detach(), [x]),
    "scatter into real": lambda t, x: dist.scatter(x, [t.detach()]),
    "reduce": lambda t, x: dist.reduce(t.detach(), 0),
    "all_gather_object": lambda t, x: (dist.all_gather_object(got := [None], t), got)[1],
    "broadcast_object_list": lambda t, x: dist.broadcast_object_list([t]),
    "functional all_reduce": lambda t, x: functional.all_reduce(
        t.detach(), "sum", dist.group.WORLD
    ),
}

# What replaces a tensor does so with a meta or a fake one, too.
REPLACE = (
    "swap_tensors",
    "set_ of real",
    "data.set_",
    "data = real",
    "grad = real",
    "data of real",
)
# A collective over a fake tensor crashes, or waits for ever.
COLLECTIVES = ("all_", "broadcast", "gather", "scatter", "reduce", "functional all_reduce")
WITHOUT_BITS = {"resize_", "empty_like"}


def act_calls() -> Iterator[Call]:
    matrix = values()["matrix"]
    for name, act in ACTS.items():
        for grad, late in itertools.product((False, True), ((0,), (0, 1))):
            words = f"{name}{', recording gradients' if grad else ''} {shown(late, late)}"
            unsaid = frozenset({"bits"} if name in WITHOUT_BITS else ())
            yield Call(
                words,
                (matrix, matrix * 0.5),
                lambda given, f=act: f(*given),
                late,
                grad,
                unsaid,
                kinds=NOT_DISTRIBUTED if name in CRASHES_ON_DTENSOR else (),
                mixes=not name.startswith(REPLACE + COLLECTIVES),
                asks_device=name == "type asked",
            )
