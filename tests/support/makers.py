"""The ways in which torch hands out tensor objects, some of which no mode hears of."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint

from tests.support.uses import Double, Labelled


class Changed(torch.autograd.Function):
    """A function of autograd that returns its own input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@torch.jit.script
def scripted(x: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    y = x.view(2, 2)
    return y + 1, [x[0], x * 2], {"transposed": y.t()}


def table() -> Tensor:
    return torch.arange(4.0) / 3


def weight() -> Tensor:
    return nn.Parameter(table())


def saved_by_hooks() -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        weight().exp().mul(weight())
    return saved


def heard_by_hooks() -> list[Tensor]:
    heard: list[Tensor] = []
    leaf = weight()
    leaf.register_hook(heard.append)
    leaf.register_post_accumulate_grad_hook(lambda _: heard.append(leaf.grad))
    leaf.square().sum().backward()
    return heard


def of_an_optimizer() -> Any:
    leaf = weight()
    optimizer = torch.optim.Adam([leaf])
    leaf.grad = torch.ones(4)
    optimizer.step()
    return optimizer.state[leaf]


def dual() -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward_ad.make_dual(table(), table() + 1))


def reclassed() -> Tensor:
    made = table()
    made.__class__ = Labelled
    return made


def saved_and_loaded() -> Any:
    file = io.BytesIO()
    torch.save(table(), file)
    file.seek(0)
    return torch.load(file)


def labelled() -> Tensor:
    return table().as_subclass(Labelled)


def _averaged() -> Any:
    model = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    return model.n_averaged, model.module.weight


WAYS: dict[str, Callable[[], Any]] = {
    "as_subclass": labelled,
    "as_subclass of Tensor": lambda: labelled().as_subclass(Tensor),
    "_make_subclass": lambda: Tensor._make_subclass(Labelled, table()),
    "_make_subclass of a subclass": lambda: Labelled._make_subclass(Labelled, labelled()),
    "__class__": reclassed,
    "ops of a subclass": lambda: (labelled() * 2, labelled()[1:], labelled().view(2, 2).T),
    "copies of a subclass": lambda: (labelled().data, labelled().detach(), labelled().clone()),
    "mixed classes": lambda: (labelled() + table(), table() + labelled(), weight() * labelled()),
    "Parameter": lambda: (weight(), nn.Parameter(labelled()), nn.Parameter(weight())),
    "Buffer": lambda: (nn.Buffer(table()), nn.Buffer(labelled())),
    "Variable": lambda: torch.autograd.Variable(table()),
    "Tensor": lambda: (torch.Tensor(table()), torch.Tensor([1, 2]), table().new(table())),
    "views": lambda: (table().real, table().view(2, 2).mT, table()[1:], table().unbind()),
    "the base of a view": lambda: table()[1:]._base,
    "complex views": lambda: (
        torch.view_as_real(torch.complex(table(), table())),
        torch.complex(table(), table()).conj().imag,
    ),
    "iteration": lambda: tuple(table()),
    "ops by overload": lambda: (torch.ops.aten.alias(table()), torch.ops.aten.detach(table())),
    "copy": lambda: (copy.copy(table()), copy.deepcopy(table()), copy.copy(labelled())),
    "pickle": lambda: pickle.loads(pickle.dumps(table())),
    "torch.save": saved_and_loaded,
    "numpy": lambda: (torch.from_numpy(table().numpy()), torch.as_tensor(np.asarray(table()))),
    "dlpack": lambda: torch.from_dlpack(table()),
    "set_": lambda: (torch.tensor([]).set_(table()), torch.empty(0).set_(table().storage())),
    "attribute": lambda: setattr(made := table(), "kept", table()) or made.kept,
    "Function": lambda: (Double.apply(weight()), Changed.apply(table())),
    "saved by a graph": lambda: (
        (weight() * weight()).grad_fn._saved_self,
        weight().exp().grad_fn._saved_result,
        Double.apply(weight()).grad_fn.saved_tensors,
        (weight() * 2).grad_fn.next_functions[0][0].variable,
    ),
    "saved_tensors_hooks": saved_by_hooks,
    "hooks": heard_by_hooks,
    "grad": lambda: torch.autograd.grad((leaf := weight()).square().sum(), leaf),
    "checkpoint": lambda: checkpoint.checkpoint(torch.exp, weight(), use_reentrant=False),
    "script": lambda: scripted(table()),
    "vmap": lambda: torch.vmap(lambda x: (x * 2, x))(table()),
    "func.grad": lambda: torch.func.grad(lambda x: x.square().sum())(table()),
    "func.jvp": lambda: torch.func.jvp(torch.exp, (table(),), (table(),)),
    "func.hessian": lambda: torch.func.hessian(lambda x: x.pow(3).sum())(table()),
    "forward_ad": dual,
    "functional_call": lambda: torch.func.functional_call(
        nn.Linear(4, 4, bias=False), {"weight": table().repeat(4, 1)}, table()
    ),
    "parametrization": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).weight,
    "parameters_to_vector": lambda: nn.utils.parameters_to_vector([weight(), weight()]),
    "named results": lambda: torch.max(table(), 0),
    "optimizer": of_an_optimizer,
    "averaged model": _averaged,
    "sparse": lambda: (table().to_sparse().values(), table().to_sparse().indices()),
    "distribution": lambda: torch.distributions.Normal(table(), table() + 1).sample(),
}
