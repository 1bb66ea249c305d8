"""Lazy modules of other libraries, called, loaded or filled by hand, in a block and after it."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

import lateinit
from lateinit.errors import DeferredTensorError, RecordingError, UninitializedError
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


def pfn() -> Any:
    return pytest.importorskip("pytorch_pfn_extras").nn


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "our linear": (lambda: lateinit.nn.LazyLinear(3), lambda: nn.Linear(5, 3), (2, 5)),
    "pfn-extras batch norm": (
        lambda: pfn().LazyBatchNorm1d(None),
        lambda: nn.BatchNorm1d(5),
        (2, 5),
    ),
    "pfn-extras convolution": (
        lambda: pfn().LazyConv1d(None, 3, 2),
        lambda: nn.Conv1d(5, 3, 2),
        (2, 5, 6),
    ),
    "pfn-extras linear": (lambda: pfn().LazyLinear(None, 3), lambda: nn.Linear(5, 3), (2, 5)),
    "torch convolution": (lambda: nn.LazyConv1d(3, 2), lambda: nn.Conv1d(5, 3, 2), (2, 5, 6)),
    "torch linear": (lambda: nn.LazyLinear(3), lambda: nn.Linear(5, 3), (2, 5)),
}
BY_LAYER = pytest.mark.parametrize("name", sorted(LAYERS))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def assert_values(model: nn.Module, twin: nn.Module) -> None:
    found, expected = values(model), values(twin)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def build(layer: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(2, 2), layer(), nn.Linear(2, 2)])


def both(name: str) -> tuple[nn.ModuleList, nn.ModuleList, torch.Tensor]:
    lazy, eager, shape = LAYERS[name]
    torch.manual_seed(0)
    twin = build(eager)
    torch.manual_seed(0)
    return lateinit.deferred_init(build, lazy), twin, torch.ones(shape)


@pytest.mark.parametrize("training", [True, False])
@BY_LAYER
def test_a_layer_that_is_called_in_a_block_is_initialised_at_its_place(
    name: str, training: bool
) -> None:
    lazy, eager, shape = LAYERS[name]
    torch.manual_seed(0)
    twin = build(eager).train(training)
    twin[1](torch.ones(shape))
    last = nn.Linear(3, 3)
    torch.manual_seed(0)
    with lateinit.deferred():
        model = build(lazy).train(training)
        model[1](torch.ones(shape))
        assert model[1].training is training
        after = nn.Linear(3, 3)
    assert lateinit.infer_shapes(model) == []
    assert_values(lateinit.materialize(model), twin)
    assert_values(lateinit.materialize(after), last)


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@BY_LAYER
def test_a_layer_that_is_called_after_its_block_is_initialised_at_its_place(
    name: str, copied: Any
) -> None:
    model, twin, example = both(name)
    if copied is not None:
        model = copied(model)
    for each in (model, twin):
        each.eval()  # in training a batch norm counts the refused call, as eagerly one that fails
    with pytest.raises(DeferredTensorError, match=r"(weight|bias)'.*call lateinit\.materialize"):
        model[1](example)
    assert_values(lateinit.materialize(model), twin)
    assert torch.equal(model[1](example), twin[1](example))
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize("block", [True, False])
def test_a_first_call_that_fails_leaves_a_layer_of_pfn_extras_lazy(block: bool) -> None:
    name, wrong = "pfn-extras convolution", torch.ones(2, 5, 1)
    torch.manual_seed(0)
    with lateinit.deferred():
        model = build(LAYERS[name][0])
        if block:
            with pytest.raises(RuntimeError, match="Kernel size"):
                model[1](wrong)
    if not block:
        with pytest.raises(RuntimeError, match="Kernel size"):
            model[1](wrong)
    _, twin, example = both(name)
    assert lateinit.infer_shapes(model[1], example) == []
    assert_values(lateinit.materialize(model), twin)


class WithHook(nn.Module):
    """As graph libraries do it: the shape comes in a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = UninitializedParameter()
        self._hook = self.register_forward_pre_hook(self.first)

    def first(self, module: nn.Module, args: Any) -> None:
        if isinstance(self.weight, UninitializedParameter):
            self.weight.materialize((3, args[0].shape[-1]))
            nn.init.normal_(self.weight)
        self._hook.remove()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class InForward(lateinit.pfn_extras.LazyInitializationMixin, nn.Module):
    lazy_parameter_names = ("weight",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.lazy_parameters_determined:
            self.weight = nn.Parameter(self.weight.new_empty(3, x.shape[-1]))
            nn.init.normal_(self.weight)
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("kind", [InForward, WithHook])
def test_what_initialises_itself_by_its_own_code_is_not_called_before_infer_shapes(
    kind: Any,
) -> None:
    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

    torch.manual_seed(0)
    twin = build(Eager)
    torch.manual_seed(0)
    with lateinit.deferred():
        model = build(kind)
        with pytest.raises(UninitializedError, match=f"{kind.__name__}.*lateinit.infer_shapes"):
            model[1](torch.ones(2, 5))
    for each in (copy.deepcopy(model), model):
        with pytest.raises(UninitializedError, match=f"{kind.__name__}.*lateinit.infer_shapes"):
            each[1](torch.ones(2, 5))
        lateinit.infer_shapes(each[1], torch.ones(2, 5))
        assert_values(lateinit.materialize(each), twin)
        assert each[1](torch.ones(2, 5)).shape == (2, 3)


def test_infer_shapes_in_the_block_lets_it_be_called_there() -> None:
    with lateinit.deferred():
        model = build(WithHook)
        lateinit.infer_shapes(model[1], torch.ones(2, 5))
        assert model[1](torch.ones(2, 5)).shape == (2, 3)
    lateinit.materialize(model)


@pytest.mark.parametrize("where", ["in the block", "after it"])
def test_later_random_values_do_not_wait_for_what_was_given_its_shape_by_hand(where: str) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = UninitializedParameter()

    def shaped(module: Any) -> None:
        module.weight.materialize((3, 5))

    torch.manual_seed(0)
    twin = build(nn.Identity)
    torch.manual_seed(0)
    with lateinit.deferred():
        model = build(Bare)
        if where == "in the block":
            shaped(model[1])
    if where == "after it":
        shaped(model[1])
        with pytest.raises(RecordingError, match=r"call lateinit\.infer_shapes"):
            lateinit.materialize(model)
        assert lateinit.infer_shapes(model) == []
    lateinit.materialize(model)
    assert_same(twin[2], model[2])


@pytest.mark.parametrize("way", ["discard", "infer_shapes"])
@BY_LAYER
def test_a_layer_that_a_checkpoint_gave_its_shape_draws_as_the_twin_all_the_same(
    name: str, way: str
) -> None:
    model, twin, example = both(name)
    loaded = {key: value + 1 for key, value in twin[1].state_dict().items()}
    model[1].load_state_dict(loaded)
    if way == "infer_shapes":
        lateinit.infer_shapes(model[1], example)
    elif name.startswith("torch"):
        model[1](example)  # lazy to its first call
    else:
        lateinit.discard(model)
    twin[1].load_state_dict(loaded)
    assert_values(lateinit.materialize(model), twin)


def test_a_lazy_layer_of_another_thread_is_left_alone() -> None:
    from threading import Thread

    made: list[nn.Module] = []
    with lateinit.deferred():
        other = Thread(target=lambda: made.append(WithHook()))
        other.start()
        other.join()
    assert len(made[0]._forward_pre_hooks) == 1
    assert made[0](torch.ones(2, 5)).shape == (2, 3)
