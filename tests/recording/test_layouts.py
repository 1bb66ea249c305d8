"""The layout of what ops compute in a constructor is that of the real kernel."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lateinit
from lateinit._recording.layouts import LayoutUnknownError, as_kernel_lays_out
from lateinit._torch import (
    META,
    DispatchMode,
    flat,
    is_plain,
    kwargs_to_meta,
    map_tensors,
    op_info,
    storage_key,
    tensors_in,
)
from tests.support.op_calls import operators
from tests.support.sweep import part_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lateinit._torch import Args, Kwargs, OpInfo, OpOverload

    Build = Callable[[], Any]

_SAMPLES = 2  # of each operator
_CPU = torch.device("cpu")


# -- how arguments lie in memory -------------------------------------------------------------------


def in_columns(tensor: Tensor) -> Tensor:
    """The first dim innermost in memory."""
    dims = tuple(reversed(range(tensor.dim())))
    return tensor.permute(dims).contiguous().permute(dims)


def channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


LAID = {"columns": in_columns, "channels last": channels_last}


# -- kernels ---------------------------------------------------------------------------------------


class Told(DispatchMode):
    """Holds the layouts that recording tells of each op's results against those of the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: dict[str, str] = {}
        self.calls = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        info, kwargs = op_info(func), kwargs or {}
        told = layouts_told(info, args, kwargs)
        result = func(*args, **kwargs)
        found = [layout(leaf) for leaf in flat(result)]
        if told is not None:
            self.calls += 1
            if told != found:
                given = [(tuple(t.size()), t.stride()) for t in tensors_in(args, kwargs)]
                self.wrong[info.name] = f"{told}, and is {found}, given {given}"
        return result


def layouts_told(info: OpInfo, args: Args, kwargs: Kwargs) -> list[Any] | None:
    """What recording tells before the op is run; None if it has to run it."""
    known: dict[int, tuple[Any, Any]] = {}

    def on_meta(tensor: Tensor) -> Tensor:
        if not is_plain(tensor) or tensor.is_meta:
            return tensor
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        made = torch.empty(size, dtype=torch.uint8, device=META).untyped_storage()
        _, made = known.setdefault(storage_key(storage), (storage, made))
        window = torch.empty(0, dtype=tensor.dtype, device=META)
        window.set_(made, tensor.storage_offset(), tensor.size(), tensor.stride())
        return window.conj() if tensor.is_conj() else window

    given, named = map_tensors(args, on_meta), map_tensors(kwargs, on_meta)
    try:
        result = info.func(*given, **kwargs_to_meta(info, named))
        if info.layout is not None:
            result = as_kernel_lays_out(info, given, named, result, _CPU)
    except (LayoutUnknownError, RuntimeError, NotImplementedError, ValueError):
        return None
    return [layout(leaf) for leaf in flat(result)]


def layout(leaf: Any) -> Any:
    """Dtype, size and the strides that say anything of one result."""
    if not isinstance(leaf, Tensor) or not is_plain(leaf):
        return None
    strides = [s for n, s in zip(leaf.size(), leaf.stride(), strict=True) if n > 1]
    return leaf.dtype, tuple(leaf.size()), strides if leaf.numel() else []


@pytest.mark.parametrize(
    ("laid", "dtype", "which"),
    [
        ("columns", torch.float32, 0),
        ("columns", torch.bfloat16, 1),
        ("channels last", torch.float32, 2),
    ],
    ids=["columns", "columns of half precision", "channels last"],
)
@pytest.mark.filterwarnings("ignore")
def test_every_operator_is_told_to_lay_its_results_out_as_its_kernel_does(
    laid: str, dtype: torch.dtype, which: int
) -> None:
    told = Told()

    def made(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_plain(value):
            return value
        return LAID[laid](value.detach())

    for operator in part_of(operators(), which, 3):
        if dtype not in operator.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        samples = operator.sample_inputs("cpu", dtype, requires_grad=False)
        for sample in itertools.islice(samples, _SAMPLES):
            args, kwargs = pytree.tree_map(made, ((sample.input, *sample.args), sample.kwargs))
            if all(t.is_contiguous() for t in tensors_in(args, kwargs) if is_plain(t)):
                continue  # as in test_operators
            try:
                with told:
                    operator(*args, **kwargs)
            except Exception:  # noqa: BLE001 - what this build has not
                continue
    assert told.calls > 30
    assert told.wrong == {}


# -- constructors ----------------------------------------------------------------------------------


def matrix(size: int) -> Tensor:
    return torch.randn(size, size + 1)


def permuted(*size: int) -> Tensor:
    return torch.randn(*reversed(size)).permute(*range(len(size) - 1, -1, -1))


def convolved(kind: type[nn.Module], *size: int, last: torch.memory_format) -> Tensor:
    layer = kind(size[1], 4, 3).to(memory_format=last)
    found: Tensor = layer(torch.randn(size)).detach()
    return found


MADE: dict[str, Build] = {
    "right singular vectors": lambda: torch.linalg.svd(matrix(4))[2],
    "right singular vectors of a large matrix": lambda: torch.linalg.svd(matrix(40))[2],
    "reduced singular vectors": lambda: torch.linalg.svd(matrix(40), full_matrices=False)[2],
    "eigenvectors": lambda: torch.linalg.eig(torch.randn(21, 21))[1],
    "orthonormal basis": lambda: torch.linalg.qr(torch.randn(25, 23))[0],
    "half spectrum": lambda: torch.fft.rfftn(torch.randn(4, 36, 28)),
    "half spectrum, other dims": lambda: torch.fft.rfftn(torch.randn(20, 6, 28), dim=(0, 1)),
    "from half spectrum": lambda: torch.fft.irfftn(torch.randn(4, 36, 15, dtype=torch.cfloat)),
    "from permuted half spectrum": lambda: torch.fft.irfft(permuted(19, 6, 7), n=37, dim=0),
    "convolution": lambda: convolved(nn.Conv2d, 2, 3, 31, 32, last=torch.channels_last),
    "transposed convolution": lambda: convolved(
        nn.ConvTranspose2d, 2, 3, 9, 8, last=torch.channels_last
    ),
    "convolution in space": lambda: convolved(
        nn.Conv3d, 1, 3, 5, 6, 7, last=torch.channels_last_3d
    ),
    "padding": lambda: nn.functional.pad(
        torch.randn(2, 3, 19, 18).to(memory_format=torch.channels_last), (1, 1, 2, 2), "reflect"
    ),
    "poisson": lambda: torch.poisson(permuted(5, 4).abs()),
    "gamma": lambda: torch.distributions.Gamma(permuted(5, 4).abs() + 1, torch.ones(5, 4)).sample(),
    "normal with a deviation for each": lambda: torch.normal(0.0, permuted(5, 4).abs()),
    "product with what is expanded": lambda: (
        torch.randn(1).half().expand(3, 50) * permuted(3, 50).half()
    ),
}


def first_row_cleared(made: Tensor) -> Tensor:
    copy = made.contiguous()
    copy[0] = 0
    return copy


USED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": first_row_cleared,
    "like": torch.randn_like,
    "initialised": lambda made: nn.init.normal_(nn.Parameter(made)),
    "reshaped": lambda made: made.reshape(-1).mul_(2),
    "flattened in place": lambda made: made.flatten().zero_(),
}


@pytest.mark.parametrize("use", sorted(USED))
@pytest.mark.parametrize("name", sorted(MADE))
def test_what_is_made_of_a_computed_tensor_has_the_values_that_its_layout_gives(
    name: str, use: str
) -> None:
    def build() -> list[Tensor]:
        made = MADE[name]()
        return [made, USED[use](made)]

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    model = lateinit.deferred_init(build)
    assert [t.stride() for t in model] == [t.stride() for t in eager]
    lateinit.materialize(model)
    assert all(map(torch.equal, model, eager))


def test_a_kernel_is_asked_about_a_large_tensor_by_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    full = torch.full

    def noted(size: Any, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(size)
        return full(size, *args, **kwargs)

    monkeypatch.setattr(
        torch, "full", lambda size, *a, **k: asked.append(size) or full(size, *a, **k)
    )
    with lateinit.deferred():
        torch.linalg.svd(torch.randn(3001, 500), full_matrices=False)
        torch.fft.irfftn(torch.randn(8, 3000, 401, dtype=torch.cfloat))
    assert asked
    assert max(size for (size,) in asked) < 10_000
