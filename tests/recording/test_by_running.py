"""What no meta kernel can tell is run on the values in a constructor, or refused in one error."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import rnn
from torch.utils import dlpack

import lateinit
from lateinit.errors import LateinitError, MaterializeError, NotRecordedError, RecordingError

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[[], Any]


def from_file(path: str) -> Tensor:
    return torch.from_numpy(np.fromfile(path))


LIBRARY = torch.library.Library("lateinit_running", "DEF")
LIBRARY.define("filled_(Tensor(a!) x) -> ()")
LIBRARY.impl("filled_", lambda x: [x.fill_(3), None][1], "CPU")
LIBRARY.define("grown_(Tensor(a!) x) -> ()")
LIBRARY.impl("grown_", lambda x: [x.resize_(9).fill_(3), None][1], "CPU")
LIBRARY.impl("grown_", lambda x: None, "Meta")
LIBRARY.define("grown_kw_(*, Tensor(a!) x) -> ()")
LIBRARY.impl("grown_kw_", lambda *, x: [x.resize_(9).fill_(3), None][1], "CPU")
LIBRARY.impl("grown_kw_", lambda *, x: None, "Meta")
LIBRARY.define("grown_all_(Tensor(a!)[] x) -> ()")
LIBRARY.impl("grown_all_", lambda x: [[t.resize_(9) for t in x], None][1], "CPU")
LIBRARY.impl("grown_all_", lambda x: None, "Meta")
LIBRARY.define("file_by_name(*, str path) -> Tensor")
LIBRARY.impl("file_by_name", from_file, "CompositeExplicitAutograd")
LIBRARY.define("files_of(str[] paths) -> Tensor")
LIBRARY.impl(
    "files_of", lambda paths: torch.cat([*map(from_file, paths)]), "CompositeExplicitAutograd"
)
LIBRARY.define("file_of(str path) -> Tensor")
LIBRARY.impl("file_of", from_file, "CompositeExplicitAutograd")
LIBRARY.define("filled_kw_(*, Tensor(a!) x) -> ()")
LIBRARY.impl("filled_kw_", lambda *, x: [x.fill_(3), None][1], "CPU")
LIBRARY.define("both_(Tensor(a!) x, *, Tensor(b!) y) -> ()")
LIBRARY.impl("both_", lambda x, *, y: [x.fill_(3), y.mul_(2), None][2], "CPU")


def sobol(**options: Any) -> list[Tensor]:
    engine = torch.quasirandom.SobolEngine(3, **options)
    return [engine.draw(4), engine.fast_forward(2).draw(3), engine.sobolstate]


def factory_into(size: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
    out = torch.empty(size)
    with torch.device("cpu"):
        function(*args, out=out)
    return out


def row_set_to_itself() -> Tensor:
    rows = torch.randn(3, 2)
    rows[0:1] = rows[0]
    return rows


def to_dlpack(tensor: Tensor) -> Any:
    return dlpack.to_dlpack(tensor)  # by its name in the block


def written_by_one() -> Tensor:
    x = torch.randn(3)
    assert torch.ops.lateinit_running.filled_(x) is None
    return x


def written_by_keyword() -> list[Tensor]:
    x, y = torch.randn(3), torch.randn(3)
    torch.ops.lateinit_running.both_(x, y=y)
    return [x, y]


def written_by_keyword_alone() -> Tensor:
    x = torch.randn(3)
    assert torch.ops.lateinit_running.filled_kw_(x=x) is None
    return x + 1


def drawn_into_real(draw: Callable[[Tensor], Any]) -> list[Tensor]:
    real = torch.from_numpy(np.zeros(5))
    draw(real)
    return [real.clone(), torch.randn(3)]


def cubes(x: Tensor) -> Tensor:
    return (x**3).sum()


def set_to_real() -> list[Tensor]:
    real = torch.from_numpy(np.arange(6.0))
    first = torch.empty(0, dtype=torch.float64).set_(real)
    second = torch.empty(0, dtype=torch.float64).set_(real[2:])
    first.mul_(2)
    return [first, second]


def shared_by_dlpack(pack: Callable[[Tensor], Any]) -> list[Tensor]:
    first = torch.randn(3)
    second = dlpack.from_dlpack(pack(first))
    second.mul_(2)
    return [first, second]


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)


def quantised_by_row() -> Tensor:
    scales, zeros = torch.rand(4) + 0.1, torch.zeros(4, dtype=torch.int32)
    return torch.quantize_per_channel(torch.randn(4, 3), scales, zeros, 0, torch.qint8)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])


def file_read(read: Callable[[str], Tensor]) -> list[Tensor]:
    """Tensors read from a file: before it is written again and removed, and after."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/numbers"
        np.arange(4.0).tofile(path)
        before = read(path).clone()
        np.ones(4).tofile(path)
        after = read(path).clone()
    return [before, after, before + after]


def written_to_file() -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/numbers"
        shared = torch.from_file(path, shared=True, size=4).fill_(2)
        return [shared, torch.from_file(path, size=4).clone()]


def padded_from_packed(lengths: list[int]) -> list[Tensor]:
    packed = rnn.pack_sequence([torch.randn(n, 2) for n in lengths], enforce_sorted=False)
    with torch.no_grad():
        packed, last = nn.GRU(2, 3)(packed)
    return [last, *rnn.pad_packed_sequence(packed), *rnn.pad_packed_sequence(packed, True, -1.0)]


def observed(dim: int, by_channel: bool, rounds: int) -> list[Tensor]:
    start = [torch.empty(0), torch.empty(0)] if by_channel else [torch.zeros(()), torch.zeros(())]
    state = [*start, torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    on = torch.ones(1, dtype=torch.int64)
    options = (0.01, -128, 127, 0, by_channel, False)
    made = [
        torch.fused_moving_avg_obs_fake_quant(
            torch.randn(3, 4, 5, 2)[(0,) * (4 - dim)], on, on, *state, *options
        )
        for _ in range(rounds)
    ]
    return [*made, *state]


HONOURED: dict[str, Build] = {
    "read from a file": lambda: file_read(
        lambda path: torch.from_file(path, size=4, dtype=torch.float64)
    ),
    "read from a file by a foreign op": lambda: file_read(torch.ops.lateinit_running.file_of),
    "read from a file by keyword": lambda: file_read(
        lambda path: torch.ops.lateinit_running.file_by_name(path=path)
    ),
    "read from several files": lambda: file_read(
        lambda path: torch.ops.lateinit_running.files_of([path, path])
    ),
    "written to a file": written_to_file,
    "padded from packed": lambda: padded_from_packed([3, 2]),
    "padded from packed, not sorted": lambda: padded_from_packed([1, 4, 2]),
    **{
        f"observed, {dim} dims, {'by channel' if by_channel else 'whole'}": partial(
            observed, dim, by_channel, rounds
        )
        for dim, by_channel, rounds in [
            (2, True, 1),
            (2, False, 2),
            (4, True, 2),
            (3, True, 3),
        ]
    },
    "sobol": sobol,
    "sobol, scrambled": lambda: sobol(scramble=True, seed=1),
    "sobol, scrambled by the default generator": lambda: sobol(scramble=True),
    "factory into out": lambda: factory_into(3, torch.randn, 3),
    "factory into out, of a fast path": lambda: factory_into(3, torch.ones, 3),
    "factory into out, a range": lambda: factory_into(4, torch.arange, 4.0),
    "a row set to itself": row_set_to_itself,
    "set to real": set_to_real,
    "writes its argument": written_by_one,
    "writes a keyword": written_by_keyword,
    "writes a keyword alone": written_by_keyword_alone,
    "draws by deferred probabilities": lambda: drawn_into_real(
        lambda real: real.bernoulli_(torch.rand(5).double())
    ),
    "hessian": lambda: torch.func.hessian(cubes)(torch.randn(3)),
    "hessians": lambda: torch.func.vmap(torch.func.hessian(cubes))(torch.randn(2, 3)),
    "forward over forward": lambda: torch.func.jacfwd(torch.func.jacfwd(cubes))(torch.randn(3)),
    "reverse over forward": lambda: torch.func.jacrev(torch.func.jacfwd(torch.sin))(torch.randn(3)),
    "both ways": lambda: list(torch.func.jvp(torch.sin, (torch.randn(3),), (torch.ones(3),))),
    "to_dlpack": lambda: shared_by_dlpack(to_dlpack),
    "from_dlpack": lambda: shared_by_dlpack(lambda t: t),
    "split at deferred indices": lambda: list(
        torch.tensor_split(torch.randn(6), torch.tensor([2, 4]))
    ),
    "dequantised": lambda: quantised().dequantize(),
    "quantised": lambda: quantised().int_repr(),
    "quantised by row": lambda: quantised_by_row().dequantize(),
    "nested": lambda: nested().to_padded_tensor(0.0),
}


def leaves(made: Any) -> list[Tensor]:
    return made if isinstance(made, list) else [made]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(HONOURED))
def test_it_gives_in_a_constructor_what_it_gives_eagerly(name: str) -> None:
    def build() -> list[Tensor]:
        return [torch.randn(2), *leaves(HONOURED[name]()), torch.randn(2)]

    torch.manual_seed(0)
    eager = build()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    made = lateinit.materialize(lateinit.deferred_init(build))
    assert torch.equal(state, torch.get_rng_state())
    assert [(t.dtype, t.device, t.stride()) for t in made] == [
        (t.dtype, t.device, t.stride()) for t in eager
    ]
    assert all(map(torch.equal, made, eager))


def test_a_draw_into_a_real_tensor_by_deferred_probabilities_binds_the_seed() -> None:
    def build() -> list[Tensor]:
        return drawn_into_real(lambda real: real.bernoulli_(torch.rand(5).double()))

    made = lateinit.deferred_init(build)
    with pytest.raises(LateinitError, match="drew into a real tensor"):
        lateinit.materialize(made, seed=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [quantised, nested], ids=["quantised", "nested"])
def test_a_tensor_without_a_plain_layout_is_made_at_once(build: Build) -> None:
    made = lateinit.deferred_init(build)
    assert made.device.type == "cpu"
    assert not made.is_meta


# -- refused ---------------------------------------------------------------------------------------


def exported() -> None:
    torch.export.export(nn.Linear(3, 3), (torch.zeros(2, 3),))


def faked() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)


def padded_with_gradient() -> list[Tensor]:
    packed, _ = nn.GRU(2, 3)(rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]))
    return list(rnn.pad_packed_sequence(packed))


GROWN: dict[str, Callable[[Tensor], object]] = {
    "grown_": torch.ops.lateinit_running.grown_,
    "grown_all_": lambda made: torch.ops.lateinit_running.grown_all_([torch.zeros(9), made]),
    "grown_kw_": lambda made: torch.ops.lateinit_running.grown_kw_(x=made),
}


@pytest.mark.parametrize("name", sorted(GROWN))
def test_an_argument_that_only_the_kernel_resizes_is_refused(name: str) -> None:
    def build() -> Tensor:
        made = torch.zeros(2)
        GROWN[name](made)
        return made

    with pytest.raises(MaterializeError, match=f"{name} resized an argument when it was replayed"):
        lateinit.materialize(lateinit.deferred_init(build))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (exported, "FakeTensorMode was entered in a deferred constructor"),
        (faked, "FakeTensorMode was entered in a deferred constructor"),
        (jagged, "consists of other tensors and cannot be recorded"),
        (padded_with_gradient, "works on memory, so that its gradient cannot be recorded"),
    ],
    ids=["exported", "faked", "jagged", "padded with a gradient"],
)
def test_it_is_refused_at_its_line_and_leaves_nothing_behind(build: Build, reason: str) -> None:
    with pytest.raises(RecordingError, match=reason):
        lateinit.deferred_init(build)
    build()  # eagerly, as ever
    assert torch.equal(lateinit.materialize(lateinit.deferred_init(torch.ones, 3)), torch.ones(3))


class Scaled(Tensor):
    """A wrapper of two tensors, as quantised weights are."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Scaled:
        return Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scale.dtype, device=values.device
        )

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self) -> Any:
        return ["values_", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        return func(*(a.values_ * a.scale if isinstance(a, Scaled) else a for a in args))


def test_a_parameter_made_of_other_tensors_is_refused_with_its_name() -> None:
    def build() -> nn.Module:
        module = nn.Module()
        weight = Scaled(torch.randn(3, 4).round(), torch.full((3, 1), 0.1))
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    model = lateinit.deferred_init(build)
    with pytest.raises(NotRecordedError, match=r"made of other tensors, .* weight"):
        lateinit.materialize(model)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_a_sparse_product_whose_kernel_asks_for_gradients_is_refused(
    which: int, reduce: str
) -> None:
    def build() -> None:
        given = torch.eye(3).to_sparse_csr(), torch.randn(3, 2)
        given[which].requires_grad_()
        torch.sparse.mm(*given, reduce).sum().backward()

    with pytest.raises(RecordingError, match=f"{reduce}.*require a gradient"):
        lateinit.deferred_init(build)


def test_a_gradient_of_a_real_and_a_deferred_tensor_is_refused_at_its_line() -> None:
    outside = torch.nn.Parameter(torch.ones(3))

    def build() -> torch.Tensor:
        weight = torch.nn.Parameter(torch.randn(3))
        with pytest.raises(RecordingError, match="made outside the block"):
            (outside * weight).sum().backward()
        return torch.ones(2)

    assert lateinit.materialize(lateinit.deferred_init(build)).tolist() == [1, 1]
    assert outside.grad is None
