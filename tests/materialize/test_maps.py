"""``device=`` and ``dtype=`` by name, and what one ``dtype=`` leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lateinit
from lateinit._tensors import Cast, Deferred
from lateinit._tensors.casts import agreed
from lateinit.errors import DeferredTensorError, DeviceError, PatternError
from tests.support.call_sequences import cast_saved
from tests.support.snapshots import assert_same

BF, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout()
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("rope", torch.rand(3), persistent=False)
        self.note = torch.rand(3)


def net(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    with lateinit.deferred():
        return Net()


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    state = dict(model.named_buffers()) | dict(model.named_parameters())
    return {name: tensor.dtype for name, tensor in state.items()} | {"note": model.note.dtype}


def test_one_dtype_leaves_alone_what_a_state_dict_leaves_out() -> None:
    torch.manual_seed(3)
    expected, model = Net(), net()
    cast_saved(expected, BF)
    assert_same(expected, lateinit.materialize(model, dtype=BF))
    assert model.rope.dtype == model.note.dtype == F32


@pytest.mark.parametrize("everything", ["*", ""])
def test_a_map_of_everything_is_one_dtype(everything: str) -> None:
    expected = lateinit.materialize(net(), dtype=BF)
    assert_same(expected, lateinit.materialize(net(), dtype={everything: BF}))


def test_what_a_map_names_alone_is_cast() -> None:
    found = dtypes(lateinit.materialize(net(), dtype={"rope": F16, "note": F64, "*norm*": F64}))
    assert found["rope"] == F16
    assert found["note"] == found["norm.running_mean"] == found["norm.weight"] == F64
    assert found["norm.num_batches_tracked"] == torch.int64
    assert found["layers.0.weight"] == F32


# Each map, and the dtype that it gives to layers.1.weight.
SPECIFIC: dict[str, Any] = {
    "a longer prefix": ({"layers": BF, "layers.1": F16}, F16),
    "a prefix and everything": ({"": F64, "layers": BF}, BF),
    "an exact name": ({"layers.1.weight": F16, "layers.1": BF, "*": F64, "*.weight": F64}, F16),
    "a glob in a glob": ({"*.weight": BF, "layers.*.weight": F16}, F16),
    "a glob below a prefix": ({"layers.1": BF, "layers.1.w*": F16}, F16),
    "a class of characters": ({"layers.[01].weight": F16, "*": BF}, F16),
    "equal values": ({"layers.*": BF, "*.weight": BF}, BF),
    "no prefix of a name alone": ({"layer": BF, "layers": F16}, F16),
}


@pytest.mark.parametrize("case", sorted(SPECIFIC))
def test_the_more_specific_pattern_wins(case: str) -> None:
    given, expected = SPECIFIC[case]
    for ordered in (given, dict(reversed(given.items()))):
        model = net()
        if "layer" in given:
            model.layer = nn.Linear(1, 1)
        assert lateinit.materialize(model, dtype=ordered).layers[1].weight.dtype == expected


def test_a_module_without_tensors_may_be_in_a_map_of_devices() -> None:
    devices = {"embed": "cpu", "layers.0": torch.device("cpu"), "layers.1": "cpu", "drop": "cpu"}
    devices |= {"norm": "cpu", "head": "cpu", "rope": "cpu"}
    torch.manual_seed(3)
    assert_same(Net(), lateinit.materialize(net(), device=devices))


def test_a_map_may_be_repeated_for_the_parts_of_a_model() -> None:
    given = {"*": BF, "norm": F32}
    expected, model = lateinit.materialize(net(), dtype=given), net()
    for only in ("layers.*", "norm.*", "*"):
        lateinit.materialize(model, only=only, dtype=given)
    assert_same(expected, model)


def test_given_tensors_are_cast_whatever_they_are() -> None:
    model = net()
    lateinit.materialize([model.rope, model.note], dtype=F64)
    assert model.rope.dtype == model.note.dtype == F64
    lateinit.materialize({"a": model.norm.weight}, dtype={"a": F16})
    assert model.norm.weight.dtype == F16


def shared(attribute: bool) -> nn.Module:
    module = nn.Module()
    whole = torch.randn(6)
    module.low = nn.Parameter(whole[:4])
    if attribute:
        module.high = whole[2:]
    else:
        module.register_buffer("high", whole[2:], persistent=False)
    return module


def held() -> nn.Module:
    module = nn.Module()
    module.register_buffer("low", torch.randn(4))
    module.prior = torch.distributions.Normal(module.low[:2], 1.0)
    return module


WRONG: dict[str, Any] = {
    "nothing matches": (PatternError, r"'blocks\.\*' matches no tensor.*layers", {"blocks.*": BF}),
    "a name that is none": (
        PatternError,
        r"'layer' matches no tensor; there are.*layers\.0",
        {"layer": BF},
    ),
    "several match nothing": (PatternError, r"'a', 'b' match no tensor", {"a": BF, "b": BF}),
    "a tie": (
        PatternError,
        r"'embed\.weight' and 'head\.weight' are one tensor, for which 'embed' says torch\.bfl",
        {"embed": BF, "head": F16},
    ),
    "no more specific one": (
        PatternError,
        r"'layers\.\*' and '\*\.weight' both match 'layers\.0\.weight', neither is more specific",
        {"layers.*": BF, "*.weight": F16},
    ),
    "nothing to cast": (PatternError, r"'\*tracked' matches no floating-point", {"*tracked": BF}),
    "an integer": (
        ValueError,
        r"'\*': torch\.int8\}: weights are cast to a floating",
        {"*": torch.int8},
    ),
    "a string": (TypeError, r"'\*': 'bf16'\}: a torch\.dtype is meant", {"*": "bf16"}),
    "a key": (TypeError, r"dtype=\{0: \.\.\.\}: a name of a tensor", {0: BF}),
    "no pattern": (PatternError, r"dtype=\{\}: a map without a pattern", {}),
    "a list": (TypeError, r"a torch\.dtype is meant", ["*"]),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_wrong_map_of_dtypes_is_refused_before_anything_changes(case: str) -> None:
    kind, message, given = WRONG[case]
    model = net()
    with pytest.raises(kind, match=message):
        lateinit.materialize(model, dtype=given)
    assert all(p.is_meta for p in model.parameters())


WRONG_DEVICES: dict[str, Any] = {
    "a gap": (
        PatternError,
        r"no pattern of the map matches 'rope', 'norm\.weight'",
        {"layers": "cpu", "embed": "cpu"},
    ),
    "meta": (ValueError, r"'': 'meta'\}: materialised tensors need", {"": "meta"}),
    "not there": (
        DeviceError,
        r"'layers': 'xpu:3'\}: this machine does not",
        {"layers": "xpu:3", "": "cpu"},
    ),
    "an index": (DeviceError, r"'': 97\}: this machine does not have", {"": 97}),
    "a truth value": (TypeError, r"True\}: a torch\.device, its name, or the index", {"": True}),
    "nothing": (TypeError, r"a torch\.device, its name, or the index", {"": None}),
}


@pytest.mark.parametrize("case", sorted(WRONG_DEVICES))
def test_a_wrong_map_of_devices_is_refused_before_anything_changes(case: str) -> None:
    kind, message, given = WRONG_DEVICES[case]
    model = net()
    with pytest.raises(kind, match=message):
        lateinit.materialize(model, device=given)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("attribute", [False, True])
def test_a_storage_across_the_line_is_refused(attribute: bool) -> None:
    model = lateinit.deferred_init(shared, attribute)
    with pytest.raises(DeferredTensorError, match=r"'low', 'high' share one storage, but dtype="):
        lateinit.materialize(model, dtype=BF)
    lateinit.materialize(model, dtype={"low": BF, "high": BF})
    assert model.low.untyped_storage().data_ptr() == model.high.untyped_storage().data_ptr()
    assert model.high.dtype == BF


def test_what_an_object_keeps_of_a_buffer_is_across_the_line() -> None:
    model = lateinit.deferred_init(held)
    with pytest.raises(DeferredTensorError, match=r"'low', 'prior\.loc' share one storage"):
        lateinit.materialize(model, dtype=BF)
    lateinit.materialize(model, dtype=F32)
    assert model.prior.loc.dtype == F32


def test_a_storage_cannot_be_sent_to_two_devices() -> None:
    model = lateinit.deferred_init(shared, False)
    pairs = []
    for name, device in (("low", torch.device("cuda:0")), ("high", torch.device("cpu"))):
        deferred = Deferred.of(getattr(model, name))
        deferred.name = name
        pairs.append((deferred, Cast(device, None), False))
    with pytest.raises(DeferredTensorError, match="sends 'low' to cuda:0, 'high' to cpu"):
        agreed(pairs)
    assert agreed(pairs[:1]).device == torch.device("cuda:0")


def test_a_name_under_two_modules_is_registered_if_one_of_them_registers_it() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Module()
            self.second = nn.Linear(2, 2)
            self.first.friends = [self.second.weight]

    model = lateinit.deferred_init(Both)
    assert lateinit.materialize(model, dtype=BF).second.weight.dtype == BF
    assert model.first.friends[0] is model.second.weight


# -- float32 in half-precision models ------------------------------------------------------------


def t5(dtype: torch.dtype | None = None) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=19, **sizes, dtype=dtype)
    return transformers.T5EncoderModel(config)


@pytest.mark.parametrize("dtype", [BF, F16])
def test_what_transformers_keeps_in_float32_is_kept(dtype: torch.dtype, tmp_path: Any) -> None:
    model = lateinit.deferred_init(t5)
    lateinit.save_checkpoint(model, tmp_path / "saved")
    expected = type(t5()).from_pretrained(tmp_path / "saved", dtype=dtype)
    told = {n: p.dtype for n, p in expected.named_parameters()}
    assert (F32 in told.values()) == (dtype == F16)
    assert {
        n: p.dtype for n, p in lateinit.materialize(model, dtype=dtype).named_parameters()
    } == told
    other = lateinit.deferred_init(t5)
    lateinit.load_checkpoint(other, tmp_path / "saved", dtype=dtype)
    assert {n: p.dtype for n, p in other.named_parameters()} == told
    third = lateinit.deferred_init(t5)
    wrapped = lateinit.materialize(nn.Sequential(third), dtype={"": dtype})
    assert {n: p.dtype for n, p in wrapped[0].named_parameters()} == told


def test_what_is_named_alone_is_not_kept_in_float32() -> None:
    model = lateinit.materialize(lateinit.deferred_init(t5), dtype={"": F16, "*.wo.weight": F16})
    assert {p.dtype for n, p in model.named_parameters()} == {F16}


def test_what_diffusers_keeps_in_float32_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Net):
        __module__ = "diffusers.models.toy"
        _keep_in_fp32_modules = "norm"

    model = lateinit.materialize(lateinit.deferred_init(Half), dtype=F16)
    assert model.norm.weight.dtype == F32
    assert model.layers[0].weight.dtype == F16
    model = lateinit.materialize(lateinit.deferred_init(Half), dtype=BF)
    assert model.norm.weight.dtype == BF


# -- checkpoints ---------------------------------------------------------------------------------

GIVEN = {"*norm*": F32, "*": BF, "rope": F16}


def test_maps_are_honoured_by_loading(tmp_path: Any) -> None:
    torch.manual_seed(5)
    source = Net()
    lateinit.save_checkpoint(source, tmp_path / "a.safetensors")
    expected, model = lateinit.materialize(net(), dtype=GIVEN), net()
    lateinit.load_checkpoint(model, tmp_path / "a.safetensors", dtype=GIVEN, device={"": "cpu"})
    assert dtypes(model) == dtypes(expected)
    assert torch.equal(model.layers[1].weight, source.layers[1].weight.to(BF))
    with pytest.raises(PatternError, match=r"map matches 'rope', 'embed\.weight'"):
        lateinit.load_checkpoint(net(), tmp_path / "a.safetensors", device={"layers": "cpu"})


def test_maps_are_honoured_by_saving(tmp_path: Any) -> None:
    given = {"*norm*": F32, "*": BF}
    lateinit.save_checkpoint(net(), tmp_path / "a.safetensors", dtype=given)
    lateinit.save_checkpoint(lateinit.materialize(net(), dtype=given), tmp_path / "b.safetensors")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert {n: t.dtype for n, t in first.items()} == {n: t.dtype for n, t in second.items()}
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    with pytest.raises(PatternError, match="'norms' matches no tensor"):
        lateinit.save_checkpoint(net(), tmp_path / "c.safetensors", dtype={"norms": BF})
    assert not (tmp_path / "c.safetensors").exists()


class Odd(nn.Module):
    """Modules whose names are globs, each beside one whose name the glob matches."""

    PAIRS = (("a[0]", "a0"), ("b*", "b1"), ("c?", "cx"), ("d[!x]", "dy"))

    def __init__(self) -> None:
        super().__init__()
        for odd, plain in self.PAIRS:
            self.add_module(odd, nn.Linear(2, 2))
            self.add_module(plain, nn.Linear(2, 2))


@pytest.mark.parametrize("below", ["", ".weight"])
@pytest.mark.parametrize(("odd", "plain"), Odd.PAIRS)
def test_a_pattern_that_is_a_name_is_that_name_and_no_glob(
    odd: str, plain: str, below: str, tmp_path: Path
) -> None:
    model, pattern = lateinit.deferred_init(Odd), odd + below
    zeroed = lateinit.init.zeros()
    path = tmp_path / "odd.safetensors"
    lateinit.save_checkpoint(model, path, init={pattern: zeroed}, dtype={pattern: F16})
    saved = load_file(path)
    lateinit.materialize(model, init={pattern: zeroed}, dtype={pattern: F16})
    for found in (saved, model.state_dict()):
        assert found[f"{odd}.weight"].dtype is F16
        assert not found[f"{odd}.weight"].any()
        assert found[f"{plain}.weight"].dtype is F32
        assert found[f"{plain}.weight"].any()


@pytest.mark.parametrize(("odd", "plain"), Odd.PAIRS)
def test_only_also_takes_a_name_for_itself(odd: str, plain: str) -> None:
    model = lateinit.deferred_init(Odd)
    lateinit.materialize(model, only=f"{odd}.bias")
    assert not lateinit.is_deferred(model.get_submodule(odd).bias)
    assert lateinit.is_deferred(model.get_submodule(plain))


def test_a_dtype_that_torch_cannot_cast_to_is_refused_before_anything_changes() -> None:
    model = net()
    for asked in (torch.float4_e2m1fn_x2, {"*": torch.float4_e2m1fn_x2}):
        with pytest.raises(ValueError, match=r"dtype=.*torch cannot cast to it"):
            lateinit.materialize(model, dtype=asked)
    assert all(map(lateinit.is_deferred, model.parameters()))


@pytest.mark.parametrize("asked", ["nope", {"": "nope"}])
def test_a_word_that_names_no_device_is_told_as_such(asked: Any) -> None:
    with pytest.raises(DeviceError, match=r"device=.*does not have that device.*nope"):
        lateinit.materialize(net(), device=asked)


@pytest.mark.parametrize(
    ("seed", "error"),
    [("a", TypeError), (1.5, TypeError), (2**64, ValueError), (-(2**64), ValueError)],
)
def test_a_seed_that_torch_does_not_take_is_refused(seed: Any, error: type[Exception]) -> None:
    model = net()
    with pytest.raises(error, match=r"seed=.*manual_seed\(\)"):
        lateinit.materialize(model, seed=seed)
    assert lateinit.is_deferred(model)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_the_ends_of_the_range_of_seeds_are_those_of_torch(seed: int) -> None:
    torch.manual_seed(seed)
    assert_same(Net(), lateinit.materialize(net(), seed=seed))
