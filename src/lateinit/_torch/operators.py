"""Facts about torch's operators that recording and planning need, looked up once per operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import _ops

from lateinit.errors import MaterializeError

OpOverload = _ops.OpOverload
"""One overload of an operator, such as ``torch.ops.aten.add.Tensor``."""

CONSTANT = "lateinit::constant"
"""The op that brings real data into a program: ``constant(data) -> Tensor``."""

TRUNCATED = "lateinit::trunc_normal_"
"""``nn.init.trunc_normal_`` where it may redraw: see ``truncated``."""

REFUSED = "lateinit::refused"
"""What gives no value: ``refused(self!, reason)``."""

_READS_SELF_NOT = frozenset(
    f"aten::{name}"
    for name in (
        "zero_",
        "fill_.Scalar",
        "fill_.Tensor",
        "uniform_",
        "normal_",
        "random_",
        "random_.from",
        "random_.to",
        "bernoulli_.float",
        "bernoulli_.Tensor",
        "exponential_",
        "cauchy_",
        "log_normal_",
        "geometric_",
        "copy_",
    )
)


# Running statistics that kernels update without their schemas saying so.
_WRITES_UNSAID = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm_update_stats": (1, 2),
    "aten::batch_norm_gather_stats": (3, 4),
    "aten::batch_norm_gather_stats_with_counts": (3, 4),
}

# The namespaces of torch's own operators, whose schemas say which of them draw.
_TORCHS = frozenset(
    {
        *("aten", "prims", "quantized", "_quantized", "quantization", "sparse"),
        *("mkl", "mkldnn", "mkldnn_prepacked", "onednn", "inductor", "inductor_prims"),
        *("static_runtime", "profiler", "export", "symm_mem", "_dtensor"),
        *("c10d", "_c10d_functional", "_c10d_functional_autograd"),
    }
)


@dataclass(frozen=True, slots=True)
class OpInfo:
    """What is known of one operator overload.

    ``mutates`` and ``mutates_kw`` are the positional and keyword arguments that it writes;
    ``overwrites`` says that it writes ``self`` wholly and without reading it; ``scalar_inplace``
    that it changes values in place and, given no other tensor, can change nothing else, so that
    no kernel is needed to know its output; ``foreign`` that it is not torch's, so that its schema
    may keep from us that it draws: ``random`` says that it could.
    """

    func: Callable[..., Any]
    name: str
    mutates: tuple[int, ...]
    mutates_kw: tuple[str, ...]
    random: bool
    takes_generator: bool
    takes_device: bool
    returns_tensor: bool
    overwrites: bool
    scalar_inplace: bool
    from_sizes: bool
    metadata_only: bool
    writes_unsaid: bool = False
    foreign: bool = False


_KNOWN: dict[OpOverload, OpInfo] = {}
_BY_NAME: dict[str, OpInfo] = {}


def op_info(func: OpOverload) -> OpInfo:
    """The facts about ``func``."""
    info = _KNOWN.get(func)
    if info is None:
        info = _KNOWN[func] = _BY_NAME[func.name()] = _examine(func)
    return info


def overload_for(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpInfo:
    """The facts about the overload of an op, such as ``aten::lstm``, that takes these arguments."""
    overload = torch._C._jit_resolve_packet(name, *args, **kwargs)
    return by_name(f"{name}.{overload}".removesuffix(".default"))


def parse_to(*args: Any, **kwargs: Any) -> tuple[Any, Any, bool, Any]:
    """The device, dtype, ``non_blocking`` and memory format that ``x.to(...)`` was given."""
    parsed: tuple[Any, Any, bool, Any] = torch._C._nn._parse_to(*args, **kwargs)
    return parsed


to_copy = torch.ops.aten._to_copy.default
"""What ``x.to(...)`` is to the dispatcher where it copies."""


TRUNC_NORMAL = torch.nn.init._no_grad_trunc_normal_
"""What ``nn.init.trunc_normal_`` calls: ``(tensor, mean, std, a, b, generator=None)``."""


def register(name: str, func: Callable[..., Any], *, draws: bool = True) -> OpInfo:
    """Make a Python function that fills its first argument, from ``generator=``, an op."""
    info = _BY_NAME[name] = OpInfo(
        func=func,
        name=name,
        mutates=(0,),
        mutates_kw=(),
        random=draws,
        takes_generator=draws,
        takes_device=False,
        returns_tensor=True,
        overwrites=True,
        scalar_inplace=True,
        from_sizes=False,
        metadata_only=False,
    )
    return info


def _refused(tensor: Any, what: str) -> None:
    del tensor
    raise MaterializeError(
        f"it was computed in the constructor by {what}, which a recording cannot follow bit for "
        "bit: compute it after materialising"
    )


def by_name(name: str) -> OpInfo:
    """The facts about the operator with a qualified name such as ``aten::add.Tensor``."""
    info = _BY_NAME.get(name)
    if info is None:
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), base)
        info = op_info(getattr(packet, overload or "default"))
    return info


def spoken(name: str) -> str:
    """An operator's name as a message says it."""
    return _SPOKEN.get(name) or name.removeprefix("aten::")


_SPOKEN = {"aten::_local_scalar_dense": "item"}


def _examine(func: OpOverload) -> OpInfo:
    schema = func._schema
    arguments = schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    name = func.name()
    mutates = _WRITES_UNSAID.get(name) or tuple(
        i for i, a in enumerate(arguments) if written[i] and not a.kwarg_only
    )
    namespace, base = name.split(".")[0].split("::")
    inplace_view = torch.Tag.inplace_view in func.tags
    names = {a.name for a in arguments}
    random = torch.Tag.nondeterministic_seeded in func.tags or "generator" in names
    foreign = namespace not in _TORCHS and not random
    return OpInfo(
        func=func,
        name=name,
        mutates=mutates,
        mutates_kw=tuple(a.name for i, a in enumerate(arguments) if written[i] and a.kwarg_only),
        random=random or foreign,
        takes_generator="generator" in names,
        takes_device="device" in names,
        returns_tensor=any("Tensor" in str(r.type) for r in schema.returns),
        overwrites=name in _READS_SELF_NOT,
        scalar_inplace=(
            mutates == (0,) and base.endswith("_") and not inplace_view and len(schema.returns) == 1
        ),
        from_sizes="_like" in base or base.startswith("new_"),
        metadata_only=inplace_view,
        writes_unsaid=name in _WRITES_UNSAID,
        foreign=foreign,
    )


register(REFUSED, _refused, draws=False)
