"""What is lazy is neither materialised nor saved: it is named, whoever's placeholder it is."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit
from lateinit._tensors.walk import is_placeholder
from lateinit.errors import CheckpointError, RecordingError, UninitializedError
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


def ours() -> nn.Module:
    return lateinit.nn.LazyLinear(3)


def torchs() -> nn.Module:
    return nn.LazyLinear(3)


def pfn_extras() -> nn.Module:
    return lateinit.pfn_extras.LazyLinear(None, 3)


def pfn_extras_itself() -> nn.Module:
    return pytest.importorskip("pytorch_pfn_extras").nn.LazyLinear(None, 3)


KINDS = pytest.mark.parametrize("make", [ours, torchs, pfn_extras, pfn_extras_itself])


def around(make: Any) -> nn.Module:
    torch.manual_seed(0)
    with lateinit.deferred():
        return nn.Sequential(nn.Linear(2, 2), make())


@KINDS
@pytest.mark.parametrize("block", [True, False])
def test_materialising_a_lazy_module_names_its_tensors(make: Any, block: bool) -> None:
    model = around(make) if block else nn.Sequential(nn.Linear(2, 2), make())
    first = next(n for n, p in model.named_parameters() if is_placeholder(p))
    with pytest.raises(
        UninitializedError, match=rf"shape is not known yet of {first}.*call lateinit\.infer_shapes"
    ):
        lateinit.materialize(model)
    assert lateinit.is_deferred(model) is block


@KINDS
def test_materialising_goes_on_once_the_shape_is_known(make: Any) -> None:
    model = around(make)
    with pytest.raises(UninitializedError, match=r"1\.weight"):
        lateinit.materialize(model)
    lateinit.infer_shapes(model, torch.empty(1, 2, device="meta"))
    lateinit.materialize(model)
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


@KINDS
def test_the_rest_of_a_model_can_be_materialised_before_the_lazy_part(make: Any) -> None:
    model = around(make)
    lateinit.materialize(model, only="0.*")
    torch.manual_seed(0)
    assert_same(nn.Linear(2, 2), model[0])
    with pytest.raises(UninitializedError, match=r"1\.weight"):
        lateinit.materialize(model, only="*.weight")


@KINDS
def test_what_is_drawn_after_a_lazy_module_waits_for_its_shape(make: Any) -> None:
    with lateinit.deferred():
        model = nn.Sequential(make(), nn.Linear(3, 2))
    with pytest.raises(RecordingError, match=r"lazy module.*call lateinit\.infer_shapes"):
        lateinit.materialize(model[1])


@KINDS
def test_what_waits_for_a_shape_keeps_back_what_is_asked_for_with_it(make: Any) -> None:
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 2), make(), nn.Linear(3, 2))
    with pytest.raises(RecordingError, match=r"'2\.weight'.*lazy module"):
        lateinit.materialize(model, only=["0.*", "2.*"])
    assert all(lateinit.is_deferred(p) for i in (0, 2) for p in model[i].parameters())


@KINDS
def test_pickle_of_a_lazy_model_knows_the_blocks_that_made_it(make: Any) -> None:
    def build(middle: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), middle(), nn.Linear(3, 2))

    torch.manual_seed(0)
    twin = build(lambda: nn.Linear(2, 3))
    torch.manual_seed(0)
    model = lateinit.deferred_init(build, make)
    lateinit.deferred_init(nn.init.ones_, model[0].weight)
    nn.init.ones_(twin[0].weight)
    model = pickle.loads(pickle.dumps(model))
    lateinit.infer_shapes(model, torch.empty(1, 2, device="meta"))
    lateinit.materialize(model)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


@KINDS
def test_a_checkpoint_of_a_lazy_model_is_refused_even_if_its_state_dict_is_silent(
    make: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"1\.weight is lazy: lateinit\.infer_shapes"):
        lateinit.save_checkpoint(around(make), tmp_path / "lazy.safetensors")
    assert list(tmp_path.iterdir()) == []


@KINDS
def test_skipping_the_initialisation_of_what_has_no_shape_is_refused(make: Any) -> None:
    with pytest.raises(UninitializedError, match="weight"):
        lateinit.skip_init(lambda_module(make))


def lambda_module(make: Any) -> type[nn.Module]:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make()

    return Holds


@KINDS
def test_a_lazy_model_is_not_deferred_and_its_summary_says_lazy(make: Any) -> None:
    with lateinit.deferred():
        model = make()
    rows = {row.name: row for row in lateinit.summary(model).rows}
    assert rows["weight"].state == "lazy"
    if make is not pfn_extras_itself:  # its bias is real from the start
        assert not lateinit.is_deferred(model)


def removed(model: nn.Module) -> None:
    model[1] = nn.Identity()


def deleted(model: nn.Module) -> None:
    del model[1]


@pytest.mark.parametrize("remove", [deleted, removed])
@KINDS
def test_a_lazy_module_that_was_removed_is_done_without_once_one_says_so(
    make: Any, remove: Any
) -> None:
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2))
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 2), make(), nn.Linear(3, 2))
    remove(model)
    with pytest.raises(RecordingError, match=r"lateinit\.discard\(model\) if that module was rem"):
        lateinit.materialize(model)
    lateinit.discard(model)
    lateinit.materialize(model)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


@KINDS
def test_a_lazy_module_is_given_up_alone(make: Any) -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.ModuleList([make(), nn.Linear(3, 2), make(), nn.Linear(3, 2)])
    lateinit.discard(model)  # nothing is gone
    with pytest.raises(RecordingError, match="lazy module"):
        lateinit.materialize(model[1])
    lateinit.discard(model[0])
    lateinit.materialize(model[1])
    torch.manual_seed(0)
    assert_same(nn.Linear(3, 2), model[1])
    with pytest.raises(RecordingError, match="lazy module"):
        lateinit.materialize(model[3])
    lateinit.infer_shapes(model[2], torch.empty(1, 2, device="meta"))
    lateinit.materialize(model[3])
    torch.manual_seed(0)
    twin = [nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 2)]
    assert_same(twin[2], model[3])
    with pytest.raises(TypeError, match="takes a module"):
        lateinit.discard(torch.ones(2))


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@KINDS
def test_the_random_state_of_the_eager_twin_can_be_had_once_shapes_are_known(
    make: Any, copied: bool, seeded: bool
) -> None:
    def build(lazy: bool) -> nn.Module:
        first = make() if lazy else nn.Linear(2, 3)
        if seeded:
            torch.manual_seed(5)
        return nn.Sequential(first, make() if lazy else nn.Linear(3, 3), nn.Linear(3, 2))

    torch.manual_seed(0)
    build(lazy=False)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    model = lateinit.deferred_init(build, True)
    if copied:
        model = pickle.loads(pickle.dumps(model))
    with pytest.raises(RecordingError, match=r"call lateinit\.infer_shapes"):
        lateinit.settle_rng(model)
    lateinit.infer_shapes(model, torch.randn(1, 2))
    lateinit.settle_rng(model)
    assert torch.equal(torch.get_rng_state(), expected)
    lateinit.materialize(model)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(9)
    lateinit.settle_rng(model)
    assert torch.equal(torch.get_rng_state(), expected)


GIVEN_VALUES: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "a list of its tensors": lambda model, twin: lateinit.materialize(list(model.parameters())),
    "all": lambda model, twin: lateinit.materialize(model),
    "by load_state_dict": lambda model, twin: model.load_state_dict(twin.state_dict(), assign=True),
    "part by part": lambda model, twin: [lateinit.materialize(part) for part in model],
    "some, then all": lambda model, twin: [
        lateinit.materialize(model, only=only) for only in ("1.*", None)
    ],
}


@pytest.mark.parametrize("way", sorted(GIVEN_VALUES))
@pytest.mark.parametrize("lazy", [True, False])
def test_the_random_state_of_the_eager_twin_can_be_had_when_values_are_real(
    way: str, lazy: bool
) -> None:
    def build(lazy: bool) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(2, 3), lateinit.nn.LazyLinear(3) if lazy else nn.Linear(3, 3), nn.Dropout()
        )

    torch.manual_seed(0)
    twin = build(lazy=False)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    model = lateinit.deferred_init(build, lazy)
    lateinit.infer_shapes(model, torch.empty(1, 2, device="meta"))
    GIVEN_VALUES[way](model, twin)
    assert not lateinit.is_deferred(model)
    torch.manual_seed(9)
    if not lazy and way in ("a list of its tensors", "by load_state_dict"):
        # Without a lazy module the state after the block is the eager twin's already.
        with pytest.raises(RecordingError, match=r"what lateinit\.materialize\(model\) has given"):
            lateinit.settle_rng(model)
        return
    lateinit.settle_rng(model)
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_random_state_is_that_of_the_seed_of_materialize() -> None:
    torch.manual_seed(4)
    nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    model = lateinit.deferred_init(
        lambda: nn.Sequential(lateinit.nn.LazyLinear(3), nn.Linear(3, 3))
    )
    lateinit.infer_shapes(model, torch.empty(1, 2, device="meta"))
    lateinit.settle_rng(lateinit.materialize(model, seed=4))
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_random_state_of_two_blocks_is_not_one() -> None:
    models = [lateinit.deferred_init(lambda: nn.Sequential(ours())) for _ in range(2)]
    both = nn.Sequential(*models)
    with pytest.raises(RecordingError, match=r"first|known"):
        lateinit.settle_rng(both)
    lateinit.infer_shapes(both, torch.empty(1, 2, device="meta"))
    lateinit.materialize(models[0])
    with pytest.raises(RecordingError, match="random states of 2 blocks are known"):
        lateinit.settle_rng(both)


def test_the_state_of_a_block_that_does_not_advance_it_is_not_to_be_had() -> None:
    with lateinit.deferred(advance_rng=False):
        model = nn.Linear(2, 2)
    with pytest.raises(RecordingError, match="advances the random state"):
        lateinit.settle_rng(model)
    with pytest.raises(TypeError, match="takes a module"):
        lateinit.settle_rng(torch.ones(2))
