"""Every public method of ``nn.Module``, called on a module whose tensors are deferred."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tests.support.deferred_kinds import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Small(nn.Module):
    """Two layers with a tie, statistics, an integer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.tied = nn.Linear(3, 5, bias=False)
        self.tied.weight = self.enc.weight
        self.register_buffer("table", torch.arange(5.0).sqrt(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.enc(x)) * self.table


NAMES = ("enc.", "norm.", "table", "tied.")


def loaded(model: nn.Module, **options: Any) -> Any:
    state = {key: torch.full_like(value, 3, device="cpu") for key, value in real_state().items()}
    return model.load_state_dict(state, **options)


def real_state() -> dict[str, Tensor]:
    return Small().state_dict()


def real_module() -> Small:
    with torch.random.fork_rng():
        return Small()


def partly_loaded(model: nn.Module, **options: Any) -> Any:
    return model.load_state_dict({"enc.bias": torch.full((5,), 3.0)}, strict=False, **options)


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def hooked(register: str) -> Callable[[Any], Any]:
    return lambda m: (getattr(m, register)(lambda *a, **k: None) is None, m)[1]


def trained(model: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()


ACTS: dict[str, Callable[[Any], Any]] = {
    "add_module": lambda m: (m.add_module("more", nn.Linear(2, 2, bias=False).zero_grad()), 0)[1],
    "append to": lambda m: nn.Sequential(m, nn.ReLU()),
    "apply": lambda m: m.apply(lambda child: None),
    "apply a reset": lambda m: m.enc.apply(lambda child: child.reset_parameters()),
    "apply zeros": lambda m: m.enc.apply(lambda child: nn.init.zeros_(child.weight)),
    "_apply": lambda m: m._apply(lambda t: t),
    "_apply a clone": lambda m: m._apply(lambda t: t.clone()),
    "bfloat16": lambda m: m.bfloat16(),
    "buffers": lambda m: list(m.buffers()),
    "call": lambda m: m(torch.ones(4, 3)),
    "call eval": lambda m: m.eval()(torch.ones(4, 3)),
    "call_super_init": lambda m: m.call_super_init,
    "children": lambda m: list(m.children()),
    "cpu": lambda m: m.cpu(),
    "cuda": lambda m: m.cuda(),
    "double": lambda m: m.double(),
    "dump_patches": lambda m: m.dump_patches,
    "eval": lambda m: m.eval(),
    "extra_repr": lambda m: m.enc.extra_repr(),
    "float": lambda m: m.float(),
    "forward": lambda m: m.forward(torch.ones(4, 3)),
    "get_buffer": lambda m: m.get_buffer("table"),
    "get_extra_state": lambda m: m.get_extra_state(),
    "get_parameter": lambda m: m.get_parameter("enc.weight"),
    "get_submodule": lambda m: m.get_submodule("enc"),
    "half": lambda m: m.half(),
    "ipu": lambda m: m.ipu(),
    "load_state_dict": loaded,
    "load_state_dict assign": lambda m: loaded(m, assign=True),
    "load_state_dict of a part": partly_loaded,
    "load_state_dict of a part, assign": lambda m: partly_loaded(m, assign=True),
    "load_state_dict of its own": lambda m: m.load_state_dict(m.state_dict()),
    "load_state_dict of its own, assign": lambda m: m.load_state_dict(m.state_dict(), assign=True),
    "load_state_dict with one too many": lambda m: m.load_state_dict({**m.state_dict(), "a": 1}),
    "load_state_dict of another shape": lambda m: m.load_state_dict({"enc.bias": torch.ones(4)}),
    "load_state_dict into double": lambda m: loaded(m.double()),
    "load_state_dict into a real module": lambda m: (
        r := real_module(),
        r.load_state_dict(m.state_dict()),
    ),
    "assign into a real module": lambda m: real_module().load_state_dict(
        m.state_dict(), assign=True
    ),
    "modules": lambda m: len(list(m.modules())),
    "mtia": lambda m: m.mtia(),
    "named_buffers": lambda m: dict(m.named_buffers()),
    "named_children": lambda m: [name for name, _ in m.named_children()],
    "named_modules": lambda m: [name for name, _ in m.named_modules()],
    "named_parameters": lambda m: dict(m.named_parameters(remove_duplicate=False)),
    "parameters": lambda m: list(m.parameters()),
    "register_backward_hook": hooked("register_backward_hook"),
    "register_buffer": lambda m: m.register_buffer("more", torch.ones(2)),
    "register_buffer of its own": lambda m: m.register_buffer("more", m.table * 2),
    "register_buffer again": lambda m: m.register_buffer("table", torch.ones(5)),
    "register_forward_hook": hooked("register_forward_hook"),
    "register_forward_pre_hook": hooked("register_forward_pre_hook"),
    "register_full_backward_hook": hooked("register_full_backward_hook"),
    "register_full_backward_pre_hook": hooked("register_full_backward_pre_hook"),
    "register_load_state_dict_post_hook": hooked("register_load_state_dict_post_hook"),
    "register_load_state_dict_pre_hook": hooked("register_load_state_dict_pre_hook"),
    "register_module": lambda m: m.register_module("more", nn.ReLU()),
    "register_parameter": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(2))),
    "register_parameter of its own": lambda m: m.register_parameter("more", m.enc.bias),
    "register_state_dict_post_hook": hooked("register_state_dict_post_hook"),
    "register_state_dict_pre_hook": hooked("register_state_dict_pre_hook"),
    "requires_grad_": lambda m: m.requires_grad_(requires_grad=False),
    "set_extra_state": lambda m: m.set_extra_state({}),
    "set_submodule": lambda m: m.set_submodule("norm", nn.ReLU()),
    "share_memory": lambda m: m.share_memory(),
    "state_dict": lambda m: m.state_dict(),
    "state_dict keep_vars": lambda m: m.state_dict(keep_vars=True),
    "to cpu": lambda m: m.to("cpu"),
    "to double": lambda m: m.to(torch.float64),
    "to cpu and half": lambda m: m.to("cpu", torch.float16),
    "to a real tensor": lambda m: m.to(torch.ones(1)),
    "to meta": lambda m: m.to("meta"),
    "to channels_last": lambda m: m.to(memory_format=torch.preserve_format),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to_empty, then loaded": lambda m: loaded(m.to_empty(device="cpu")),
    "to_empty on meta": lambda m: m.to_empty(device="meta"),
    "train": lambda m: m.train(mode=False),
    "type": lambda m: m.type(torch.float64),
    "type string": lambda m: m.type("torch.DoubleTensor"),
    "xpu": lambda m: m.xpu(),
    "zero_grad": lambda m: m.zero_grad(),
    "zero_grad to zeros": lambda m: m.zero_grad(set_to_none=False),
    "setattr of a parameter": lambda m: setattr(m.enc, "bias", nn.Parameter(torch.ones(5))),
    "setattr of a buffer": lambda m: setattr(m, "table", torch.ones(5)),
    "data of a parameter": lambda m: setattr(m.enc.bias, "data", torch.ones(5)),
    "delattr": lambda m: delattr(m, "table"),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a part": lambda m: copy.deepcopy(m.enc),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "torch.save of its state": lambda m: saved(m.state_dict()),
    "repr": repr,
    "a step of training": trained,
    "functional_call": lambda m: torch.func.functional_call(m, {}, (torch.ones(4, 3),)),
    "functional_call, all real": lambda m: torch.func.functional_call(
        m,
        {**dict(Small().named_parameters()), **dict(Small().named_buffers())},
        (torch.ones(4, 3),),
    ),
    "stack_module_state": lambda m: torch.func.stack_module_state([m, m]),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.enc),
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m.enc),
    "orthogonal": lambda m: nn.utils.parametrizations.orthogonal(m.enc),
    "prune": lambda m: nn.utils.prune.l1_unstructured(m.enc, "weight", 0.5),
    "prune at random": lambda m: nn.utils.prune.random_unstructured(m.enc, "weight", 0.5),
    "fuse": lambda m: nn.utils.fuse_linear_bn_eval(m.enc.eval(), m.norm.eval()),
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
    "reset_running_stats": lambda m: m.norm.reset_running_stats(),
    "reset_parameters": lambda m: m.enc.reset_parameters(),
}
NOT_CALLED = {
    "compile": "compiles at the first call, which test_guard has traced",
    "T_destination": "a type",
    "smart_apply": "of transformers, which leaves it there",
}
WITHOUT_BITS = {"to_empty": frozenset({"bits"})}


def public() -> set[str]:
    return {name for name in dir(nn.Module) if not name.startswith("_")}


def called() -> set[str]:
    return {name.split(" ")[0].rstrip(",") for name in ACTS}


def module_calls() -> Iterator[Call]:
    for name, act in ACTS.items():
        yield Call(
            f"Module: {name}",
            (),
            lambda given, f=act: f(given[0]),
            (),
            unsaid=WITHOUT_BITS.get(name, frozenset()),
            make=Small,
            names=NAMES,
            kinds=("module",),
        )
