"""What happens where a checkpoint and a model differ: in names, shapes, dtypes, ties."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parameter import is_lazy

import lateinit
from lateinit.errors import (
    DeferredTensorError,
    MismatchError,
    NotRecordedError,
    RecordingError,
)
from tests.support.call_sequences import cast_saved
from tests.support.cases import Bag
from tests.support.formats import FORMATS
from tests.support.snapshots import assert_same, snapshot
from tests.support.twins import Net, assert_untouched, run_alone, still_deferred, twins

if TYPE_CHECKING:
    pass

State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    torch.manual_seed(3)
    return {k: v + 1 if v.is_floating_point() else v + 5 for k, v in Net().state_dict().items()}


def write(state: State, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


def names(entries: Any) -> list[str]:
    return [entry.name for entry in entries]


# -- all problems in one error, and nothing changed ------------------------------------------------


def broken(state: State) -> State:
    state["enc.bias"] = torch.ones(9)
    state["dec.weight"] = torch.ones(4, 8, 1)
    state["dec.biass"] = state.pop("dec.bias")
    state["norm.num_batches_tracked"] = torch.tensor(1.5)
    state["norm.running_mean"] = torch.ones(4, dtype=torch.complex64)
    state["odd"] = torch.ones(1)
    return state


EVERY_PROBLEM = (
    r"enc\.bias: the checkpoint has the shape \(9\), the model \(8\)",
    r"dec\.weight: the checkpoint has the shape \(4, 8, 1\), the model \(4, 8\)",
    r"dec\.bias, \(4,\), is not in the checkpoint; near: dec\.biass",
    r"dec\.biass is not in the model; near: dec\.bias",
    r"num_batches_tracked: the checkpoint has the dtype torch\.float32, the model torch\.int64",
    r"running_mean: the checkpoint has the dtype torch\.complex64, the model torch\.float32",
    r"odd is not in the model",
    r"Net, which is left as it was; 7 problems",
)


def test_every_problem_is_in_one_error_and_a_deferred_model_is_untouched(
    state: State, tmp_path: Path
) -> None:
    eager, model = twins()
    path = write(broken(state), tmp_path)
    before = torch.get_rng_state()
    for problem in EVERY_PROBLEM:
        with pytest.raises(MismatchError, match=problem):
            lateinit.load_checkpoint(model, path)
    assert torch.equal(before, torch.get_rng_state())
    assert_untouched(eager, model)


def test_a_real_model_is_untouched_by_an_error(state: State, tmp_path: Path) -> None:
    model = Net()
    held = dict(model.named_parameters())
    before = snapshot(model)
    with pytest.raises(MismatchError, match="7 problems"):
        lateinit.load_checkpoint(model, write(broken(state), tmp_path))
    assert_same(before, snapshot(model))
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert not model._load_state_dict_pre_hooks


def test_advice_is_not_counted_among_the_problems(tmp_path: Path) -> None:
    model = lateinit.deferred_init(nn.Linear, 2, 2)
    path = write({"weight": torch.ones(2, 2)}, tmp_path)
    counted = r"1 problem:\n  bias, \(2,\), is not in the checkpoint\n  \(strict=False initialises"
    with pytest.raises(MismatchError, match=counted):
        lateinit.load_checkpoint(model, path)


def test_all_missing_names_are_told_and_what_to_do(tmp_path: Path) -> None:
    model = lateinit.deferred_init(nn.Sequential, *[nn.Linear(2, 2) for _ in range(30)])
    path = write({"0.weight": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(MismatchError) as caught:
        lateinit.load_checkpoint(model, path)
    lacking = [n for n in model.state_dict() if n != "0.weight"]
    assert all(f"  {name}, " in str(caught.value) for name in lacking)
    assert "strict=False" in str(caught.value)


def test_a_prefix_that_the_model_has_is_told(state: State, tmp_path: Path) -> None:
    model = lateinit.deferred_init(lambda: Bag(net=Net()))
    with pytest.raises(MismatchError, match=r"load it into that part, .*model\.net, "):
        lateinit.load_checkpoint(model, write(state, tmp_path))


def test_a_checkpoint_with_no_name_in_common_is_never_passed_over(tmp_path: Path) -> None:
    eager, model = twins()
    with pytest.raises(MismatchError, match=r"enc\.weight, \(8, 4\), is not in the checkpoint"):
        lateinit.load_checkpoint(model, write({"x": torch.ones(1)}, tmp_path), strict=False)
    assert_untouched(eager, model)


def test_plain_meta_and_an_open_block_are_refused(state: State, tmp_path: Path) -> None:
    path = write(state, tmp_path)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(NotRecordedError, match=r"never recorded: .*enc\.weight"):
        lateinit.load_checkpoint(model, path)
    with lateinit.deferred():
        inside = Net()
        with pytest.raises(DeferredTensorError, match="call it after it"):
            lateinit.load_checkpoint(inside, path)


SHARDED = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
import lateinit
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = torch.nn.Linear(2, 2)
lateinit.save_checkpoint(model, sys.argv[1])
other = lateinit.deferred_init(torch.nn.Linear, 2, 3)
for part in (model, other):
    weight = torch.nn.Parameter(distribute_tensor(part.weight.detach(), mesh, [Shard(0)]))
    part.weight = weight
saved = model.weight.full_tensor().clone()
try:
    lateinit.load_checkpoint(other, sys.argv[1])
except lateinit.errors.MismatchError as error:
    print(error)
assert lateinit.is_deferred(other.weight) and lateinit.is_deferred(other.bias)
with torch.no_grad():
    model.weight.zero_()
print(lateinit.load_checkpoint(model, sys.argv[1]))
assert torch.equal(model.weight.full_tensor(), saved)
dist.destroy_process_group()
"""


def test_a_sharded_model_is_loaded_or_left_as_it_was(tmp_path: Path) -> None:
    said = run_alone(SHARDED, str(tmp_path / "a.safetensors"))
    assert "weight: the checkpoint has the shape (2, 2), the model (3, 2)" in said
    assert "2 tensors loaded" in said


def test_arguments_that_make_no_sense_are_refused(state: State, tmp_path: Path) -> None:
    eager, model = twins()
    path = write(state, tmp_path)
    with pytest.raises(ValueError, match="floating-point"):
        lateinit.load_checkpoint(model, path, dtype=torch.int8)
    with pytest.raises(ValueError, match="meta"):
        lateinit.load_checkpoint(model, path, device="meta")
    for path in (None, {"weight": torch.ones(1)}):
        with pytest.raises(TypeError, match=r"file or a folder is meant, not .*load_state_dict"):
            lateinit.load_checkpoint(Net(), path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype='bfloat16': a torch\.dtype is meant"):
        lateinit.load_checkpoint(Net(), "a.pt", dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a module"):
        lateinit.load_checkpoint([model], path)  # type: ignore[arg-type]
    assert_untouched(eager, model)


# -- what the checkpoint lacks ---------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_missing_is_initialised_as_recorded(
    format_: str, state: State, tmp_path: Path
) -> None:
    eager, model = twins()
    part = {n: t for n, t in state.items() if not n.startswith("dec.")}
    path = FORMATS[format_](part | {"extra": torch.ones(3)}, tmp_path)
    report = lateinit.load_checkpoint(model, path, strict=False)
    eager.load_state_dict(part, strict=False)
    assert_same(eager, model)
    assert names(report.initialised) == ["dec.weight", "dec.bias"]
    assert names(report.computed) == ["table"]
    assert names(report.unexpected) == ["extra"]
    assert sorted(names(report.loaded)) == sorted(part)
    assert report.nbytes == sum(t.nbytes for n, t in part.items() if n != "tied.weight")
    shown = str(report)
    assert "10 tensors loaded" not in shown
    assert "initialised: 2, 144 B\n    dec.weight (4, 8) float32" in shown
    assert "unexpected: 1, 12 B\n    extra (3,) float32" in shown


def test_what_a_real_model_misses_stays_as_it_was(state: State, tmp_path: Path) -> None:
    model, expected = Net(), Net()
    expected.load_state_dict(model.state_dict())
    del state["dec.weight"]
    report = lateinit.load_checkpoint(model, write(state, tmp_path), strict=False)
    expected.load_state_dict(state, strict=False)
    assert_same(expected, model)
    assert names(report.initialised) == ["dec.weight"]
    assert names(report.computed) == []


def test_a_model_that_is_real_in_part_is_loaded_whole(state: State, tmp_path: Path) -> None:
    eager, model = twins()
    lateinit.materialize(model, only="dec.*")
    lateinit.load_checkpoint(model, write(state, tmp_path))
    eager.load_state_dict(state)
    assert_same(eager, model)


# -- ties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["enc.weight", "tied.weight"])
def test_one_name_of_a_tied_pair_loads_both(kept: str, state: State, tmp_path: Path) -> None:
    eager, model = twins()
    eager.load_state_dict(state)
    left_out = {"enc.weight", "tied.weight"} - {kept}
    path = write({n: t for n, t in state.items() if n not in left_out}, tmp_path)
    report = lateinit.load_checkpoint(model, path)
    assert model.enc.weight is model.tied.weight
    assert_same(eager, model)
    assert {"enc.weight", "tied.weight"} <= set(names(report.loaded))


def test_two_names_of_a_tied_pair_that_differ_are_refused(state: State, tmp_path: Path) -> None:
    eager, model = twins()
    state["tied.weight"] = state["enc.weight"] + 1
    with pytest.raises(MismatchError, match=r"enc\.weight and tied\.weight are one tensor"):
        lateinit.load_checkpoint(model, write(state, tmp_path))
    assert_untouched(eager, model)


def test_names_that_the_file_calls_tied_load_a_model_that_does_not_tie_them(
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    lateinit.save_checkpoint(Net(), tmp_path / "a.safetensors")

    def untied() -> nn.Module:
        model = Net()
        model.tied.weight = nn.Parameter(torch.zeros(8, 4))
        return model

    _, model = twins(untied)
    lateinit.load_checkpoint(model, tmp_path / "a.safetensors")
    assert torch.equal(model.tied.weight, model.enc.weight)
    with torch.no_grad():
        model.tied.weight.zero_()
    assert model.enc.weight.abs().sum() > 0


def test_tensors_that_share_memory_in_a_file_do_not_become_tied(tmp_path: Path) -> None:
    shared = torch.ones(2, 2)
    torch.save({"0.weight": shared, "1.weight": shared}, tmp_path / "a.pt")
    model = lateinit.deferred_init(
        lambda: nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(2)])
    )
    lateinit.load_checkpoint(model, tmp_path / "a.pt")
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(model[1].weight, shared)


# -- memory, identity, dtype, device ---------------------------------------------------------------


@pytest.mark.parametrize("format_", ["safetensors", "shards", "pt", "bin shards"])
def test_tensors_are_windows_on_the_file_and_training_leaves_it_alone(
    format_: str, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    state = {n: t.clone() for n, t in nn.Linear(64, 64).state_dict().items()}
    path = FORMATS[format_](state, tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    model = lateinit.deferred_init(nn.Linear, 64, 64)
    lateinit.load_checkpoint(model, path)
    mapped = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line and _holds(line, model.weight.data_ptr())
    ]
    assert mapped
    again = lateinit.deferred_init(nn.Linear, 64, 64)
    lateinit.load_checkpoint(again, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.bias.fill_(float("nan"))
    assert not torch.equal(model.weight, state["weight"])
    assert torch.equal(again.weight, state["weight"])
    assert {p: p.read_bytes() for p in files} == files


def _holds(line: str, address: int) -> bool:
    start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
    return start <= address < end


def test_a_checkpoint_may_be_replaced_while_a_model_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lateinit.save_checkpoint(nn.Linear(64, 64), path)
    model = lateinit.deferred_init(nn.Linear, 64, 64)
    lateinit.load_checkpoint(model, path)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.bias.zero_()
    lateinit.save_checkpoint(model, path, force=True)
    lateinit.save_checkpoint(nn.Linear(64, 64), path, force=True)
    assert torch.equal(model.weight, before)


def test_objects_hooks_and_flags_stay(state: State, tmp_path: Path) -> None:
    _, model = twins()
    model.dec.weight.requires_grad_(False)
    held = dict(model.named_parameters())
    seen = []
    model.enc.weight.register_hook(lambda grad: seen.append(grad.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lateinit.load_checkpoint(model, write(state, tmp_path))
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert not model.dec.weight.requires_grad
    model(torch.ones(3, 4)).sum().backward()
    assert seen == [(8, 4)]
    optimizer.step()
    assert type(model.enc.weight) is nn.Parameter


def test_data_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}'
    header += b" " * (3 - len(header) % 8 + 8)
    values = torch.tensor([1.5, -2.0], dtype=torch.float64)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    model = lateinit.deferred_init(lambda: Bag(a=torch.zeros(2, dtype=torch.float64)))
    lateinit.load_checkpoint(model, path)
    assert torch.equal(model.a, values)
    assert model.a.data_ptr() % 8 == 0


@pytest.mark.parametrize("format_", FORMATS)
def test_dtype_casts_what_is_deferred(format_: str, state: State, tmp_path: Path) -> None:
    eager, model = twins()
    report = lateinit.load_checkpoint(
        model, FORMATS[format_](state, tmp_path), dtype=torch.bfloat16
    )
    eager.load_state_dict(state)
    cast_saved(eager, torch.bfloat16)
    assert_same(eager, model)
    assert {entry.dtype for entry in report.loaded} == {torch.bfloat16, torch.int64}


def test_the_model_says_the_dtype_unless_told(state: State, tmp_path: Path) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    eager, model = twins()
    lateinit.load_checkpoint(model, write(half, tmp_path))
    eager.load_state_dict(half)
    assert_same(eager, model)
    eager, model = twins(lambda: Net().bfloat16())
    lateinit.load_checkpoint(model, write(state, tmp_path))
    eager.load_state_dict(state)
    assert_same(eager, model)


def test_a_layout_other_than_the_files_is_kept(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    eager, model = twins(build)
    state = {n: t + 1 for n, t in eager.state_dict().items()}
    lateinit.load_checkpoint(model, write({n: t.contiguous() for n, t in state.items()}, tmp_path))
    eager.load_state_dict(state)
    assert_same(eager, model)


def test_a_tensor_that_cannot_be_written_is_told_before_anything_changes(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Linear(3, 2)
        model.register_buffer("expanded", torch.zeros(1).expand(3))
        return model

    path = write({**build().state_dict(), "expanded": torch.ones(3)}, tmp_path)
    eager, model = twins(build)
    told = pytest.raises(MismatchError, match="expanded: expanded, so that its elements share")
    with told:
        lateinit.load_checkpoint(model, path)
    assert_untouched(eager, model)
    with told:
        lateinit.load_checkpoint(model, path)
    assert_same(eager, model)


def test_swapping_tensors_on_conversion_changes_nothing(state: State, tmp_path: Path) -> None:
    eager, model = twins()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        lateinit.load_checkpoint(model, write(state, tmp_path))
        assert torch.__future__.get_swap_module_params_on_conversion()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    eager.load_state_dict(state)
    assert_same(eager, model)
    assert still_deferred(model) == []


# -- lazy models -----------------------------------------------------------------------------------


def lazy_net() -> nn.Module:
    return nn.Sequential(
        lateinit.nn.LazyConv2d(4, 3), lateinit.nn.LazyBatchNorm2d(), lateinit.nn.LazyLinear(2)
    )


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("deferred", [True, False])
def test_a_lazy_model_takes_its_sizes_from_the_checkpoint(
    deferred: bool, format_: str, tmp_path: Path
) -> None:
    expected = plain_net()
    path = FORMATS[format_](expected.state_dict(), tmp_path)
    model = lateinit.deferred_init(lazy_net) if deferred else lazy_net()
    held = model[2].weight
    lateinit.load_checkpoint(model, path)
    assert model[2].weight is held
    assert type(model[2]) is nn.Linear
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_new_lazy_head_has_its_eager_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = plain_net()
    state = {n: t + 1 for n, t in expected.state_dict().items() if n != "2.bias"}
    path = write(state, tmp_path)
    torch.manual_seed(0)
    model = lateinit.deferred_init(lazy_net)
    report = lateinit.load_checkpoint(model, path, strict=False)
    expected.load_state_dict(state, strict=False)
    assert_same(expected, model)
    assert names(report.initialised) == ["2.bias"]


def test_wrong_sizes_of_a_lazy_model_are_told_and_it_stays_lazy(tmp_path: Path) -> None:
    state = plain_net().state_dict()
    state["0.weight"] = torch.ones(9, 3, 3, 3)
    state["2.weight"] = torch.ones(3, 5)
    model = lateinit.deferred_init(lazy_net)
    path = write(state, tmp_path)
    with pytest.raises(MismatchError, match=r"0\.weight: the checkpoint has \(9, 3, 3, 3\)"):
        lateinit.load_checkpoint(model, path)
    with pytest.raises(MismatchError, match=r"2\.weight: the checkpoint has \(3, 5\)"):
        lateinit.load_checkpoint(model, path)
    assert isinstance(model[0], lateinit.nn.LazyConv2d)
    lateinit.infer_shapes(model[2], torch.zeros(1, 7))
    assert model[2].weight.shape == (2, 7)


def chain(lazy: bool) -> nn.Module:
    linear = lateinit.nn.LazyLinear if lazy else nn.Linear
    return nn.Sequential(
        nn.Linear(3, 4),
        linear(*(() if lazy else (4,)), 5),
        nn.Linear(5, 2),
        linear(*(() if lazy else (2,)), 3),
        nn.Linear(3, 2),
    )


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        ("0.weight 0.bias", "2.weight"),
        ("0.weight 0.bias 1.weight 1.bias", "4.weight"),
        ("0.weight 0.bias 2.weight 2.bias 4.weight 4.bias 3.weight", "3.bias"),
        ("0.weight 0.bias 1.weight 1.bias 2.weight 2.bias 4.weight 4.bias", None),
        ("0.weight 0.bias 1.weight 1.bias 3.weight 3.bias", None),
        ("0.weight 1.weight 3.weight", None),
        ("2.weight 2.bias 4.weight 4.bias 1.weight 1.bias 3.weight 3.bias", None),
    ],
)
def test_what_would_be_drawn_after_a_lazy_module_is_refused_before_anything_is_loaded(
    tmp_path: Path, names: str, refused: str | None
) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(1)
    expected = chain(lazy=False)
    with torch.no_grad():
        for name in names.split():
            expected.get_parameter(name).zero_()
    save_file({name: expected.get_parameter(name).detach() for name in names.split()}, path)
    torch.manual_seed(1)
    model = lateinit.deferred_init(chain, lazy=True)
    if refused:
        with pytest.raises(RecordingError, match=rf"{refused}.*infer_shapes"):
            lateinit.load_checkpoint(model, path, strict=False)
        assert all(lateinit.is_deferred(p) or is_lazy(p) for p in model.parameters())
        lateinit.infer_shapes(model, torch.empty(1, 3))
        lateinit.load_checkpoint(model, path, strict=False)
    else:
        lateinit.load_checkpoint(model, path, strict=False)
    for name, parameter in model.named_parameters():
        assert is_lazy(parameter) or parameter.equal(expected.get_parameter(name)), name
