"""Facts about torch's operators: what each writes, draws and returns.

They come from schemas and tags, looked up once per overload, and from the rows of ``op_table`` for
facts that a schema does not state. lateinit's own ops are registered here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import _ops

from lateinit._torch.op_table import OP_TABLE, UNINITIALISED, VALUE_CHECKS, OpTraits
from lateinit.errors import MaterializeError

OpOverload = _ops.OpOverload
"""One overload of an operator, such as ``torch.ops.aten.add.Tensor``."""

CONSTANT = "lateinit::constant"
"""The op that makes a tensor of real data: ``constant(data) -> Tensor``."""

TRUNCATED = "lateinit::trunc_normal_"
"""``nn.init.trunc_normal_`` on torch versions that redraw: see ``_recording.trunc_normal``."""

REFUSED = "lateinit::refused"
"""An op that raises when it is replayed: ``refused(self!, reason)``."""

# The namespaces of collectives. Schemas do not mark the arguments that a c10d op writes
# (torch/csrc/distributed/c10d/Ops.cpp).
_COLLECTIVES = frozenset(
    {"c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "_dtensor"}
)

# The namespaces of torch's own operators. An op of any other namespace may draw although neither
# its schema nor its tags state it.
_TORCHS = frozenset(
    {
        *("aten", "prims", "quantized", "_quantized", "quantization", "sparse"),
        *("mkl", "mkldnn", "mkldnn_prepacked", "onednn", "inductor", "inductor_prims"),
        *("static_runtime", "profiler", "export"),
        *_COLLECTIVES,
    }
)


# The layouts of the results of such ops depend on the values of their arguments.
_BY_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

FillOp = tuple[str, tuple[Any, ...]]
"""The name of an in-place fill and its numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpInfo(OpTraits):
    """Facts about one operator overload: from its row, its schema and its tags.

    Attributes:
        func: the overload, or the Python function of an op of lateinit's own.
        call: ``func``, or the method of ``Tensor`` that does the same in less time.
        name: its qualified name, such as ``aten::add.Tensor``.
        arguments: the names of its positional arguments.
        mutates: the positions of the positional arguments that it writes.
        mutates_kw: the keyword arguments that it writes, such as ``out``.
        random: whether it draws or, if ``foreign``, may draw.
        takes_generator: whether it has an argument ``generator``.
        takes_device: whether it has an argument ``device``.
        takes_alpha: whether it has an argument ``alpha``, a multiple.
        takes_text: whether it has an argument that is a string or several, such as a path.
        returns_tensor: whether any result is a tensor.
        scalar_inplace: whether it only changes the values of ``self`` if given no other tensor: the
            result is then known without a kernel.
        from_sizes: whether it makes a tensor like another one, of which it reads no values.
        is_empty: whether it leaves new memory uninitialised.
        is_factory: whether it draws nothing and equals an allocation and the fill ``filled_by``.
        metadata_only: whether it changes the layout of ``self`` in place, such as ``t_``.
        foreign: whether it is neither torch's nor marked as random by its schema or tags.
        collective: whether it exchanges values with other ranks.
        pointwise: whether each element of its result depends on those at the same place, broadcast.
        checks_values: whether its kernel refuses some values of tensors.
        layout_by_run: whether it makes new tensors alone, whose layouts do not depend on values.
    """

    func: Callable[..., Any]
    call: Callable[..., Any]
    name: str
    arguments: tuple[str, ...]
    mutates: tuple[int, ...]
    mutates_kw: tuple[str, ...] = ()
    random: bool
    takes_generator: bool
    takes_device: bool = False
    takes_alpha: bool = False
    takes_text: bool = False
    returns_tensor: bool
    scalar_inplace: bool
    from_sizes: bool = False
    is_empty: bool = False
    is_factory: bool = False
    metadata_only: bool = False
    foreign: bool = False
    collective: bool = False
    pointwise: bool = False
    checks_values: bool = False
    layout_by_run: bool = False

    @property
    def only_reads(self) -> bool:
        """Whether it neither makes nor writes a tensor, and gives Python a value."""
        return not (self.returns_tensor or self.mutates or self.mutates_kw)

    def fill_for(self, args: tuple[Any, ...]) -> FillOp | None:
        """The fill that a factory's arguments call for; None for uninitialised memory."""
        name, numbers = self.filled_by or UNINITIALISED
        at = self.arguments.index
        given = tuple([args[at(n)] if isinstance(n, str) else n for n in numbers])
        return (name, given) if name else None


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


def op_behind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpInfo | None:
    """The facts about the op of ATen that a function of torch calls; None if it has views."""
    try:
        info = overload_for(f"aten::{func.__name__}", args, kwargs)
    except (AttributeError, RuntimeError):  # there is none, or the call is wrong
        return None
    returned = [r.alias_info for r in info.func._schema.returns]  # type: ignore[attr-defined]
    return None if any(a is not None and not a.is_write for a in returned) else info


parse_to: Callable[..., tuple[Any, Any, bool, Any]] = torch._C._nn._parse_to
"""The device, dtype, ``non_blocking`` and memory format among arguments of ``x.to(...)``.

torch's own parser, a torch function that ``nn.Module.to`` calls; it does not take ``copy=``.
"""


to_copy = torch.ops.aten._to_copy.default
"""The op that ``x.to(...)`` dispatches if it copies."""

to_dlpack = torch._C._to_dlpack
"""The function of ``torch.utils.dlpack``, from before there was ``Tensor.__dlpack__``."""

copy_into = torch.ops.aten.copy_.default
"""The op that ``x.copy_(y)`` dispatches."""


TRUNC_NORMAL = torch.nn.init._no_grad_trunc_normal_
"""The function behind ``nn.init.trunc_normal_``: ``(tensor, mean, std, a, b, generator=None)``."""


def register(name: str, func: Callable[..., Any], traits: OpTraits) -> OpInfo:
    """Register a Python function as an op.

    Args:
        name: its qualified name.
        func: the function. It writes its first argument if ``traits.fills``, and draws from an
            argument ``generator`` if ``traits.draws``.
        traits: the facts about it.
    """
    info = _BY_NAME[name] = OpInfo(
        **_fields(traits),
        func=func,
        call=func,
        name=name,
        arguments=(),
        mutates=(0,) if traits.fills else (),
        random=traits.draws is not None,
        takes_generator=traits.draws is not None,
        returns_tensor=True,
        scalar_inplace=traits.fills,
    )
    return info


def _fields(traits: OpTraits) -> dict[str, Any]:
    return {field.name: getattr(traits, field.name) for field in fields(OpTraits)}


def _constant(data: torch.Tensor) -> torch.Tensor:
    # The program keeps its constant, so each replay gets memory of its own.
    return data.clone(memory_format=torch.preserve_format)


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
    traits = OP_TABLE.get(name)
    return (traits and traits.spoken) or name.removeprefix("aten::")


def _examine(func: OpOverload) -> OpInfo:
    """Join the row of an overload, if it has one, with its schema and its tags."""
    schema = func._schema
    arguments = schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    name = func.name()
    traits = OP_TABLE.get(name) or OpTraits()
    mutates = traits.writes_unsaid or tuple(
        i for i, a in enumerate(arguments) if written[i] and not a.kwarg_only
    )
    namespace, base = name.split(".")[0].split("::")
    inplace_view = torch.Tag.inplace_view in func.tags
    names = {a.name for a in arguments}
    random = torch.Tag.nondeterministic_seeded in func.tags or "generator" in names
    foreign = namespace not in _TORCHS and not random
    return OpInfo(
        **_fields(traits),
        func=func,
        call=getattr(torch.Tensor, base) if traits.method else func,
        name=name,
        arguments=tuple(a.name for a in arguments if not a.kwarg_only),
        mutates=mutates,
        mutates_kw=tuple(a.name for i, a in enumerate(arguments) if written[i] and a.kwarg_only),
        random=random or foreign,
        takes_generator="generator" in names,
        takes_device="device" in names,
        takes_alpha="alpha" in names,
        takes_text=any("str" in str(a.type) for a in arguments),
        returns_tensor=any("Tensor" in str(r.type) for r in schema.returns),
        scalar_inplace=(
            mutates == (0,) and base.endswith("_") and not inplace_view and len(schema.returns) == 1
        ),
        from_sizes=traits.allocates in ("like", "new"),
        is_empty=traits.filled_by == UNINITIALISED,
        is_factory=None not in (traits.allocates, traits.filled_by) and not random,
        metadata_only=inplace_view,
        foreign=foreign,
        collective=namespace in _COLLECTIVES,
        pointwise=torch.Tag.pointwise in func.tags,
        checks_values=namespace == "aten" and base.removesuffix("_") in VALUE_CHECKS,
        layout_by_run=(
            namespace == "aten"
            and not random
            and traits.allocates != "size"
            and all(a.alias_info is None for a in (*arguments, *schema.returns))
            and bool(schema.returns)
            and all(str(r.type) == "Tensor" for r in schema.returns)
            and not _BY_VALUES.intersection(func.tags)
        ),
    )


register(CONSTANT, _constant, OpTraits(copies=0))
register(REFUSED, _refused, OpTraits(fills=True))
