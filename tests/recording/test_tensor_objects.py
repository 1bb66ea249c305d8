"""Objects that C++ makes or exchanges in a constructor: subclasses, swapped tensors, generators."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lateinit
from lateinit.errors import RecordingError
from tests.support.snapshots import assert_same
from tests.support.twins import deferred, eager, run_alone, twins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Plain(Tensor):
    """Without anything of its own."""


class WithInit(Tensor):
    """With a ``__new__`` and an ``__init__``."""

    def __new__(cls, data: Any, extra: int = 0) -> WithInit:
        del extra
        return super().__new__(cls, data)

    def __init__(self, data: Any, extra: int = 0) -> None:
        del data
        self.extra = extra


class Hearing(Tensor):
    """Hears functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class OwnParameter(nn.Parameter):
    """A parameter that is made as a tensor, and not as a parameter."""

    def __new__(cls, data: Any) -> OwnParameter:
        return Tensor.__new__(cls, data)


MADE: dict[str, Callable[[], Tensor]] = {
    "nothing": Plain,
    "a list": lambda: Plain([1.0, 2.0]),
    "a scalar size": lambda: Plain(3).fill_(2),
    "sizes": lambda: Plain(2, 3).normal_(),
    "a torch.Size": lambda: Plain(torch.Size([2, 3])).fill_(1),
    "an array": lambda: Plain(np.ones(3, dtype=np.float32)),
    "a tensor": lambda: Plain(torch.randn(3)),
    "a tensor of another dtype": lambda: Plain(torch.arange(3)),
    "a column": lambda: Plain(torch.randn(3, 4)[:, 1]),
    "a storage": lambda: Plain(torch.randn(3).untyped_storage()),
    "a keyword": lambda: Plain(data=[1.0]),
    "a device": lambda: Plain([1.0], device="cpu"),
    "an __init__": lambda: WithInit([1.0, 2.0], extra=4),
    "an __init__ of a tensor": lambda: WithInit(torch.randn(2), 5),
    "a class that hears": lambda: Hearing(torch.randn(2)) * 2,
    "a parameter": lambda: OwnParameter(torch.randn(2)),
    "the base": lambda: Tensor(torch.randn(2)),
    "the base's __new__": lambda: Tensor.__new__(Plain, torch.randn(2)),
    "through a class": lambda: Plain.__new__(Plain, [1.0]),
}


class Holder(nn.Module):
    """Has a tensor, and another on its memory."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.made = make()
        self.alias = self.made.detach()[..., :1] if self.made.numel() else self.made
        self.next = torch.randn(2)


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_tensor_of_a_subclass_is_made_in_a_constructor_as_eagerly(name: str) -> None:
    made, found = twins(lambda: Holder(MADE[name]))
    assert_same(made, lateinit.materialize(found))


def test_a_subclass_of_a_deferred_tensor_shows_its_memory() -> None:
    with lateinit.deferred():
        base = torch.zeros(3)
        shown = Plain(base)
        base.fill_(2)
    assert shown.tolist() == [2, 2, 2]


def test_a_class_of_tensors_is_made_after_a_block_as_before() -> None:
    before = Tensor.__new__
    with lateinit.deferred():
        assert Tensor.__new__ is not before
    assert Tensor.__new__ is before
    assert "__new__" not in vars(Tensor)
    assert (type(Plain([1.0])), Plain([1.0]).tolist()) == (Plain, [1.0])


def test_the_compiler_may_be_imported_for_the_first_time_in_a_block() -> None:
    """torch/_dynamo/polyfills/tensor.py compares signatures with that of ``Tensor.__new__``."""
    script = """
        import torch, lateinit
        with lateinit.deferred():
            import torch._dynamo
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
    """
    run_alone(script)


@pytest.mark.parametrize("kind", ["FloatTensor", "LongTensor"])
def test_a_legacy_type_that_is_given_a_deferred_tensor_is_refused(kind: str) -> None:
    with pytest.raises(RecordingError, match="legacy tensor type"), lateinit.deferred():
        getattr(torch, kind)(torch.zeros(3).type(getattr(torch, kind)))


# -- exchanged tensors -----------------------------------------------------------------------------


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


def with_swapped(other: Callable[[], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = layers()
        model.other = other()
        torch.utils.swap_tensors(model[0].weight, model.other)
        nn.init.normal_(model.other)
        model.register_buffer("after", model[0].weight.detach() + 1)
        return model

    return build


REAL = torch.arange(15.0).view(5, 3)


@pytest.mark.parametrize("other", ["deferred", "real", "a plain tensor"])
def test_swapped_tensors_are_those_of_eager_construction(other: str) -> None:
    makes: dict[str, Callable[[], Tensor]] = {
        "deferred": lambda: nn.Parameter(torch.randn(5, 3)),
        "real": lambda: nn.Parameter(REAL),
        "a plain tensor": lambda: torch.zeros(5, 3),
    }
    expected, found = twins(with_swapped(makes[other]))
    assert_same(expected, lateinit.materialize(found))


def loaded(assign: bool) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        model.load_state_dict(layers().state_dict(), assign=assign)
        return model

    return load


CONVERTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "to a dtype": lambda model: model.to(torch.float64),
    "to a device": lambda model: model.to("cpu"),
    "doubled": lambda model: model._apply(lambda t: t * 2),
    "loaded": loaded(assign=False),
    "loaded by assigning": loaded(assign=True),
}


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("name", sorted(CONVERTED))
def test_a_module_is_converted_in_a_constructor_by_swapping_as_eagerly(name: str) -> None:
    expected, found = twins(lambda: CONVERTED[name](layers()))
    assert lateinit.is_deferred(found)
    assert_same(expected, lateinit.materialize(found))


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("name", sorted(CONVERTED))
def test_a_deferred_module_is_converted_by_swapping_as_eagerly(name: str) -> None:
    expected, found = eager(layers), deferred(layers)
    weights = [expected[0].weight, found[0].weight]
    torch.manual_seed(1)
    expected = CONVERTED[name](expected)
    torch.manual_seed(1)
    found = CONVERTED[name](found)
    assert (found[0].weight is weights[1]) == (expected[0].weight is weights[0])
    assert_same(expected, lateinit.materialize(found))


@pytest.mark.usefixtures("swapping")
def test_a_deferred_module_that_was_unpickled_is_converted_by_swapping() -> None:
    expected, found = eager(layers), pickle.loads(pickle.dumps(deferred(layers)))
    found = pickle.loads(pickle.dumps(found.half()))
    assert_same(expected.half(), lateinit.materialize(found))


def test_a_user_s_weak_reference_still_forbids_to_swap() -> None:
    def build() -> None:
        a, b = torch.zeros(3), torch.ones(3)
        held = {torch.utils.weak.WeakIdRef(a): 1}
        torch.utils.swap_tensors(a, b)
        del held

    with pytest.raises(RuntimeError, match="it has weakref"), lateinit.deferred():
        build()


# -- generators ------------------------------------------------------------------------------------


def saved(value: Any) -> Any:
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return torch.load(data, weights_only=False)


STORED = pickle.dumps(torch.Generator().manual_seed(9))
COPIED: dict[str, Callable[[torch.Generator], Any]] = {
    "pickled": lambda g: pickle.loads(pickle.dumps(g)),
    "copied": copy.deepcopy,
    "saved": saved,
    "saved within others": lambda g: saved({"g": [g, torch.ones(3)]})["g"][0],
    "stored before": lambda _: pickle.loads(STORED),
    "cloned": lambda g: g.clone_state(),
    "state saved": lambda g: torch.Generator().set_state(saved(g.get_state())),
    "state pickled": lambda g: torch.Generator().set_state(
        pickle.loads(pickle.dumps(g.get_state()))
    ),
    "the default one": lambda _: pickle.loads(pickle.dumps(torch.default_generator)),
}


@pytest.mark.parametrize("name", sorted(COPIED))
def test_a_generator_is_loaded_in_a_constructor_as_eagerly(name: str) -> None:
    def build() -> nn.Module:
        own = torch.Generator().manual_seed(3)
        model = nn.Module()
        torch.randn(5), torch.randn(5, generator=own)
        other = COPIED[name](own)
        for number, generator in enumerate((own, other, own, other, None)):
            model.register_buffer(f"b{number}", torch.randn(4, generator=generator))
        model.states = [own.get_state().tolist(), other.get_state().tolist()]
        return model

    expected, found = twins(build)
    if name != "the default one":  # whose copy shows a token in a block
        assert found.states == expected.states
    expected.states = found.states = None
    assert_same(expected, lateinit.materialize(found))


def test_bytes_that_are_no_state_are_deferred_when_they_are_loaded() -> None:
    with lateinit.deferred():
        model = nn.Module()
        model.register_buffer("bytes", saved(torch.ones(40, dtype=torch.uint8)))
    assert lateinit.is_deferred(model.bytes)
