"""Facts about torch's operators: what each writes, draws and returns.

They come from schemas and tags, looked up once per overload, and from the tables below where a
schema does not tell. Ops of lateinit's own are registered here too.
"""

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
"""The op that makes a tensor of real data: ``constant(data) -> Tensor``."""

TRUNCATED = "lateinit::trunc_normal_"
"""``nn.init.trunc_normal_`` on torch versions that redraw: see ``_recording.trunc_normal``."""

REFUSED = "lateinit::refused"
"""An op that raises when it is replayed: ``refused(self!, reason)``."""

# Ops that write ``self`` wholly without reading it. Schemas mark that it is written, and no more.
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


# aten/src/ATen/native/native_functions.yaml: these update running statistics, the arguments with
# the given positions, which their schemas do not mark as written.
_WRITES_UNSAID = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm_update_stats": (1, 2),
    "aten::batch_norm_gather_stats": (3, 4),
    "aten::batch_norm_gather_stats_with_counts": (3, 4),
}

# The namespaces of collectives. Schemas do not say what a c10d op writes
# (torch/csrc/distributed/c10d/Ops.cpp).
_COLLECTIVES = frozenset(
    {"c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "_dtensor"}
)

# The namespaces of torch's own operators: an op of any other may draw without its schema or tags
# saying so.
_TORCHS = frozenset(
    {
        *("aten", "prims", "quantized", "_quantized", "quantization", "sparse"),
        *("mkl", "mkldnn", "mkldnn_prepacked", "onednn", "inductor", "inductor_prims"),
        *("static_runtime", "profiler", "export"),
        *_COLLECTIVES,
    }
)


@dataclass(frozen=True, slots=True)
class OpInfo:
    """Facts about one operator overload.

    Attributes:
        func: the overload, or the Python function of an op of lateinit's own.
        name: its qualified name, such as ``aten::add.Tensor``.
        mutates: the positions of the positional arguments that it writes.
        mutates_kw: the keyword arguments that it writes, such as ``out``.
        random: whether it draws or, if ``foreign``, may draw.
        takes_generator: whether it has an argument ``generator``.
        takes_device: whether it has an argument ``device``.
        returns_tensor: whether any result is a tensor.
        overwrites: whether it writes all of ``self`` without reading it.
        scalar_inplace: whether it only changes the values of ``self`` if given no other tensor: the
            result is then known without a kernel.
        from_sizes: whether it makes a tensor like another one, of which it reads no values.
        metadata_only: whether it changes the layout of ``self`` in place, such as ``t_``.
        writes_unsaid: whether ``mutates`` comes from ``_WRITES_UNSAID``.
        foreign: whether it is neither torch's nor marked as random by its schema or tags.
        collective: whether it exchanges values with other ranks.
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
    collective: bool = False


_KNOWN: dict[OpOverload, OpInfo] = {}
_BY_NAME: dict[str, OpInfo] = {}


def op_info(func: OpOverload) -> OpInfo:
    """The facts about ``func``."""
    info = _KNOWN.get(func)
    if info is None:
        info = _KNOWN[func] = _BY_NAME[func.name()] = _examine(func)
    return info


def overload_for(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpInfo:
    """The facts about the overload that an op, such as ``aten::lstm``, has for some arguments."""
    overload = torch._C._jit_resolve_packet(name, *args, **kwargs)
    return by_name(f"{name}.{overload}".removesuffix(".default"))


def parse_to(*args: Any, **kwargs: Any) -> tuple[Any, Any, bool, Any]:
    """The device, dtype, ``non_blocking`` and memory format among arguments of ``x.to(...)``.

    torch's own parser, the one of ``nn.Module.to``; it does not take ``copy=``.
    """
    parsed: tuple[Any, Any, bool, Any] = torch._C._nn._parse_to(*args, **kwargs)
    return parsed


to_copy = torch.ops.aten._to_copy.default
"""The op that ``x.to(...)`` dispatches if it copies."""


TRUNC_NORMAL = torch.nn.init._no_grad_trunc_normal_
"""The function behind ``nn.init.trunc_normal_``: ``(tensor, mean, std, a, b, generator=None)``."""


def register(name: str, func: Callable[..., Any], *, draws: bool = True) -> OpInfo:
    """Register a Python function as an op that fills its first argument.

    Args:
        name: its qualified name.
        func: the function.
        draws: whether it draws from an argument ``generator``.
    """
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
    """The facts about the overload with a qualified name such as ``aten::add.Tensor``."""
    info = _BY_NAME.get(name)
    if info is None:
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), base)
        info = op_info(getattr(packet, overload or "default"))
    return info


def spoken(name: str) -> str:
    """The name of an operator in messages."""
    return _SPOKEN.get(name) or name.removeprefix("aten::")


_SPOKEN = {"aten::_local_scalar_dense": "item"}


def _examine(func: OpOverload) -> OpInfo:
    """Derive the facts about an overload from its schema, its tags and the tables above."""
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
        collective=namespace in _COLLECTIVES,
    )


register(REFUSED, _refused, draws=False)
