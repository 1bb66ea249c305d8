"""What is answered before the dispatcher is what the dispatcher would have answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lateinit

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "sizes": lambda: torch.zeros(2, 3),
    "a tuple": lambda: torch.ones((2, 3)),
    "by name": lambda: torch.ones(size=(2, 3)),
    "no dims": lambda: torch.zeros(()),
    "no elements": lambda: torch.ones(0, 3),
    "integers": lambda: torch.ones(3, dtype=torch.int32),
    "booleans": lambda: torch.ones(3, dtype=torch.bool),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "half": lambda: torch.zeros(3, dtype=torch.float16),
    "a device by name": lambda: torch.ones(3, device="cpu"),
    "a device": lambda: torch.zeros(3, device=torch.device("cpu")),
    "gradient": lambda: torch.ones(3, requires_grad=True),
    "strided": lambda: torch.ones(3, layout=torch.strided),
    "out": lambda: torch.ones(3, out=torch.empty(3)),
    "full": lambda: torch.full((2, 2), 7),
    "full, a dtype": lambda: torch.full((2, 2), 2.7, dtype=torch.int64),
    "new": lambda: torch.empty(3, dtype=torch.float64).new_ones(2, 2),
    "new, full": lambda: torch.empty(3).new_full((2,), 3, dtype=torch.int16),
    "kaiming": lambda: nn.init.kaiming_uniform_(torch.empty(4, 3, 2), a=0.5, mode="fan_out"),
    "kaiming by name": lambda: nn.init.kaiming_uniform_(tensor=torch.empty(4, 3), a=0.5),
    "kaiming of doubles": lambda: nn.init.kaiming_uniform_(torch.empty(4, 3).double()),
    "kaiming of a view": lambda: nn.init.kaiming_uniform_(torch.zeros(4, 6)[:, ::2]),
    "kaiming, normal": lambda: nn.init.kaiming_normal_(torch.empty(40, 30)),
    "xavier": lambda: nn.init.xavier_uniform_(torch.empty(4, 3), gain=2.0),
    "data": lambda: nn.Parameter(torch.empty(20)).data.normal_(1.0, 2.0),
    "data of a view": lambda: torch.zeros(4, 6)[:, 1].data.fill_(3),
    "normal, the second by name": lambda: torch.empty(20).normal_(std=0.02),
    "normal, both the other way round": lambda: torch.empty(20).normal_(std=0.02, mean=3.0),
    "uniform, the second by name": lambda: torch.empty(20).uniform_(to=0.5),
    "zeros by an initialiser": lambda: nn.init.zeros_(torch.empty(3)),
    "ones by an initialiser": lambda: nn.init.ones_(torch.empty(3, dtype=torch.int16)),
    "another generator": lambda: nn.init.xavier_normal_(
        torch.empty(20, 3), generator=torch.Generator().manual_seed(3)
    ),
    "zero, integers": lambda: torch.ones(3, dtype=torch.int64).zero_(),
    "zero, booleans": lambda: torch.ones(3, dtype=torch.bool)[1:].zero_() + 0,
    "zero, complex": lambda: torch.ones(3, dtype=torch.complex64).zero_(),
    "an integer": lambda: torch.tensor(7, dtype=torch.long, device=None),
    "a float": lambda: torch.tensor(0.3, dtype=torch.float16, device="cpu"),
    "a truth value": lambda: torch.tensor(True, dtype=None),
    "a number with a gradient": lambda: torch.tensor(0.3, requires_grad=True),
    "uniform by name": lambda: nn.init.uniform_(tensor=torch.empty(4, 3), a=1.0, b=2.0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_call_gives_what_it_gives_eagerly(call: Callable[[], torch.Tensor]) -> None:
    torch.manual_seed(0)
    expected = call()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    found = lateinit.deferred_init(call)
    assert torch.equal(torch.get_rng_state(), after)
    assert lateinit.is_deferred(found)
    lateinit.materialize(found)
    assert torch.equal(found, expected)
    for get in ("dtype", "requires_grad", "is_leaf", "device", "layout"):
        assert getattr(found, get) == getattr(expected, get), get
    assert found.stride() == expected.stride()


WRONG: dict[str, Callable[[], torch.Tensor]] = {
    "negative": lambda: torch.zeros(-1),
    "not a size": lambda: torch.ones("three"),  # type: ignore[call-overload]
    "no size": torch.zeros,
    "an unknown option": lambda: torch.ones(3, dtypes=torch.int32),  # type: ignore[call-overload]
    "not a dtype": lambda: torch.zeros(3, dtype="float"),  # type: ignore[call-overload]
    "not a device": lambda: torch.zeros(3, device="nowhere"),
    "integers with a gradient": lambda: torch.ones(3, dtype=torch.int32, requires_grad=True),
    "a number out of range": lambda: torch.tensor(300, dtype=torch.uint8),
    "ones that need a number": lambda: nn.init._no_grad_fill_(torch.empty(3)),  # type: ignore[call-arg]
    "kaiming of a vector": lambda: nn.init.kaiming_uniform_(torch.empty(3)),
    "kaiming of integers": lambda: nn.init.kaiming_uniform_(torch.ones(3, 3, dtype=torch.int64)),
    "uniform, upside down": lambda: torch.empty(3).uniform_(2, 1),
    "uniform, from beyond the default": lambda: nn.init.uniform_(torch.empty(3), a=2.0),
    "uniform, too far": lambda: torch.empty(3, dtype=torch.float16).uniform_(0, 7e4),
    "uniform, of no number": lambda: torch.empty(3).uniform_(float("nan"), 1),
    "normal, negative": lambda: nn.init.normal_(torch.empty(3), std=-1.0),
    "normal, of no number": lambda: torch.empty(3).normal_(0, float("nan")),
    "exponential, negative": lambda: torch.empty(3).exponential_(-1),
    "geometric": lambda: torch.empty(3).geometric_(1.5),
    "log-normal": lambda: torch.empty(3).log_normal_(0, -1),
    "bernoulli": lambda: torch.empty(3).bernoulli_(2.0),
    "complex factor": lambda: torch.ones(3).mul_(1j),
    "a bound beyond float16": lambda: torch.ones(3, dtype=torch.float16).clamp_(max=1e30),
    "a complex multiple": lambda: torch.ones(3).add_(2, alpha=1j),  # type: ignore[arg-type]
    "no bounds": lambda: torch.ones(3).clamp_(),
    "no such rounding": lambda: torch.ones(3).div_(2, rounding_mode="up"),
    "no such dim": lambda: torch.ones(3).cumsum_(5),
    "a triangle of a vector": lambda: torch.ones(3).tril_(),
    "an unknown mode": lambda: nn.init.kaiming_uniform_(torch.empty(3, 3), mode="fan"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", WRONG.values(), ids=list(WRONG))
def test_wrong_call_raises_what_it_raises_eagerly(call: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(Exception) as eager:  # noqa: PT011 - whatever it is
        call()
    with pytest.raises(type(eager.value)) as found, lateinit.deferred():
        call()
    assert str(found.value).splitlines()[0] == str(eager.value).splitlines()[0]


def test_kaiming_of_no_elements_warns_as_it_does_eagerly() -> None:
    with lateinit.deferred(), pytest.warns(UserWarning, match="zero-element"):
        tensor = nn.init.kaiming_uniform_(torch.empty(0, 3))
    assert tensor.shape == (0, 3)


class Seen(TorchDispatchMode):
    """Another mode, that must see what is done below it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Likewise above the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_other_modes_see_the_factories() -> None:
    for mode, name in ((Seen(), "aten::zeros"), (Called(), "zeros")):
        with mode, lateinit.deferred():
            tensor = torch.zeros(3)
        assert name in mode.names
        mode.names.clear()
        with lateinit.deferred(), mode:
            torch.zeros(3)
        assert name in mode.names
        assert torch.equal(lateinit.materialize(tensor), torch.zeros(3))


def test_default_device_and_a_device_context_are_heeded() -> None:
    with torch.device("meta"), lateinit.deferred():
        assert not lateinit.is_deferred(torch.zeros(3))
        assert lateinit.is_deferred(torch.zeros(3, device="cpu"))
    with lateinit.deferred(), torch.device("meta"):
        assert not lateinit.is_deferred(torch.ones(3))
    with lateinit.deferred():
        assert not lateinit.is_deferred(torch.empty(3, device="meta"))


@pytest.mark.usefixtures("fresh_memory_of_nan")
def test_empty_memory_that_is_filled_deterministically_is_so_when_materialised() -> None:
    with lateinit.deferred():
        tensors = [torch.empty(3), torch.empty_like(torch.zeros(2, 2))]
    torch.use_deterministic_algorithms(mode=False)
    assert all(lateinit.materialize(tensor).isnan().all() for tensor in tensors)


LIKES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty_like": torch.empty_like,
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda t: torch.full_like(t, 3),
    "contiguous": lambda t: torch.zeros_like(t, memory_format=torch.contiguous_format),
    "new_zeros": lambda t: t.new_zeros(t.shape),
    "new_empty": lambda t: t.new_empty(2, 3),
    "new_empty_strided": lambda t: t.new_empty_strided((2, 3), (1, 2)),
    "empty_strided": lambda t: torch.empty_strided(t.shape, t.stride()),
}
SOURCES: dict[str, Callable[[], torch.Tensor]] = {
    "rows": lambda: torch.randn(2, 3),
    "columns": lambda: torch.randn(2, 3).t(),
    "a gap": lambda: torch.randn(4, 6)[:, ::2],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "length one": lambda: torch.randn(4, 1, 3).transpose(0, 2)[:, :1],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a scalar": lambda: torch.randn(()),
    "no elements": lambda: torch.randn(0, 3),
}


@pytest.mark.parametrize("like", LIKES.values(), ids=list(LIKES))
@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
def test_what_is_made_like_a_tensor_is_laid_out_like_it(
    like: Callable[[torch.Tensor], torch.Tensor], source: Callable[[], torch.Tensor]
) -> None:
    expected = like(source())
    found = lateinit.materialize(lateinit.deferred_init(lambda: like(source())))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride()
    assert found.storage_offset() == expected.storage_offset()


def test_what_is_made_like_a_tensor_does_not_need_its_values() -> None:
    def make() -> dict[str, torch.Tensor]:
        drawn = torch.randn(3, 4)
        return {name: like(drawn) for name, like in LIKES.items()}

    made = lateinit.deferred_init(make)
    assert "normal_" not in str(lateinit.plan(made))
    lateinit.materialize(made)
    assert torch.equal(made["full_like"], torch.full((3, 4), 3.0))
    assert torch.equal(made["zeros_like"], torch.zeros(3, 4))


OWN = {
    name: getattr(nn.init, name) for name in ("normal_", "uniform_", "constant_", "xavier_normal_")
}


def guarding(name: str) -> Callable[..., torch.Tensor]:
    """What a library puts in the place of an initialiser, to leave alone what has values."""

    def guarded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if getattr(tensor, "has_values", False):
            return tensor
        return OWN[name](tensor, *args, **kwargs)

    guarded.__name__ = name
    return guarded


def test_initialisers_that_a_library_replaced_are_recorded_as_torchs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def initialised() -> list[torch.Tensor]:
        left_alone = torch.zeros(3)
        left_alone.has_values = True  # type: ignore[attr-defined]
        return [
            nn.init.normal_(torch.empty(4, 5), std=0.02),
            nn.init.uniform_(torch.empty(20), 1.0, 2.0),
            nn.init.constant_(torch.empty(2), 3.0),
            nn.init.normal_(left_alone),
            nn.init.normal_(torch.zeros(4, 6)[:, ::2]),
        ]

    torch.manual_seed(0)
    for name in OWN:
        monkeypatch.setattr(nn.init, name, guarding(name))
    expected = initialised()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    with lateinit.deferred() as program:
        found = initialised()
    assert torch.equal(torch.get_rng_state(), after)
    labels = [op.label for op in program.ops if op.label is not None]
    assert labels[:3] == ["normal_(std=0.02)", "uniform_(1, 2)", "fill(3)"]
    assert all(map(torch.equal, lateinit.materialize(found), expected))


@pytest.mark.parametrize("name", OWN)
def test_what_an_initialiser_in_torchs_place_does_besides_is_done_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return OWN[name](tensor, *args, **kwargs).mul_(2)

    def initialised() -> torch.Tensor:
        given = (3.0,) if name == "constant_" else ()
        filled: torch.Tensor = getattr(nn.init, name)(torch.empty(4, 5), *given)
        return filled

    doubled.__name__ = name
    torch.manual_seed(0)
    monkeypatch.setattr(nn.init, name, doubled)
    expected = initialised()
    torch.manual_seed(0)
    found = lateinit.deferred_init(initialised)
    assert torch.equal(lateinit.materialize(found), expected)


NUMBERS = [0, 1, -1, 2.5, 300, 70000, 1e30, 1e300, 2**40, True, 1j, float("nan"), float("inf")]
DTYPES = [torch.half, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
DTYPES += [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_number_that_a_dtype_cannot_hold_is_refused_where_it_is_eagerly(
    number: Any, dtype: torch.dtype
) -> None:
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "fill_": lambda: torch.empty(2, dtype=dtype).fill_(number),
        "constant_": lambda: nn.init.constant_(torch.empty(2, dtype=dtype), number),
        "full": lambda: torch.full((2,), number, dtype=dtype),
        "full_like": lambda: torch.full_like(torch.zeros(2, dtype=dtype), number),
        "new_full": lambda: torch.zeros(1, dtype=dtype).new_full((2,), number),
        "add_": lambda: torch.zeros(2, dtype=dtype).add_(number),
        "an item": lambda: _with_item(torch.zeros(2, dtype=dtype), number),
    }
    for name, make in makers.items():
        try:
            expected = make()
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            with pytest.raises(type(error)):
                lateinit.deferred_init(make)
            continue
        found = lateinit.materialize(lateinit.deferred_init(make))
        assert torch.equal(expected.view(torch.uint8), found.view(torch.uint8)), name


def _with_item(tensor: torch.Tensor, number: Any) -> torch.Tensor:
    tensor[0] = number
    return tensor
