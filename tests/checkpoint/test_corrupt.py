"""What is no checkpoint, or is not whole, is found before a model is touched, by our own error."""

from __future__ import annotations

import json
import os
import pickle
import pkgutil
import shutil
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lateinit
from lateinit._checkpoint.formats.open import open_checkpoint
from lateinit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    MismatchError,
    OutputError,
)
from tests.support.formats import FORMATS
from tests.support.snapshots import assert_same
from tests.support.twins import Net, assert_untouched, twins

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ZIPPED = ("pt", "bin shards", "dcp")


def small() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.fixture
def written(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A checkpoint of `small`, and a model file of it to damage."""
    torch.manual_seed(1)
    path = FORMATS[request.param](small().state_dict(), tmp_path)
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix != ".json")
    return path, next(file for file in files if file.name != ".metadata")


def assert_nothing_wrong_gets_in(path: Path, expected: nn.Module) -> bool:
    """Loading either gives what was saved, or our error and an untouched model; or not."""
    try:
        open_checkpoint(path)
    except CorruptCheckpointError:
        return False  # before there was a model to touch
    _, model = twins(small)
    try:
        lateinit.load_checkpoint(model, path)
    except CheckpointError:
        assert lateinit.is_deferred(model.weight)
        assert lateinit.is_deferred(model.bias)
        return False
    assert_same(expected, model)
    return True


def expected_model() -> nn.Module:
    torch.manual_seed(1)
    return small()


@pytest.mark.parametrize("written", ["safetensors", "pt", "dcp", "old pt"], indirect=True)
@pytest.mark.filterwarnings("ignore:Found a checkpoint")
def test_a_file_cut_off_anywhere_is_refused(written: tuple[Path, Path]) -> None:
    path, file = written
    data, expected = file.read_bytes(), expected_model()
    step = max(1, len(data) // 400)
    for length in [*range(0, len(data), step), len(data) - 1]:
        file.write_bytes(data[:length])
        assert not assert_nothing_wrong_gets_in(path, expected), length
    file.write_bytes(data)
    assert assert_nothing_wrong_gets_in(path, expected)


@pytest.mark.parametrize("written", ["safetensors"], indirect=True)
def test_no_flipped_bit_of_a_safetensors_header_gets_in(written: tuple[Path, Path]) -> None:
    path, file = written
    data, expected = file.read_bytes(), expected_model()
    length = 8 + int.from_bytes(data[:8], "little")
    for bit in range(0, 8 * length, 3):
        file.write_bytes(flipped(data, bit))
        assert_nothing_wrong_gets_in(path, expected)


@pytest.mark.parametrize("written", ["pt", "dcp"], indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_no_flipped_bit_around_the_data_of_a_zip_gets_in(written: tuple[Path, Path]) -> None:
    path, file = written
    data, expected = file.read_bytes(), expected_model()
    values = [t.detach().numpy().tobytes() for t in expected.state_dict().values()]
    inside = {i for v in values for i in range(data.index(v), data.index(v) + len(v))}
    outside = [i for i in range(len(data)) if i not in inside and data[i]][::5]
    for number, index in enumerate(outside):
        file.write_bytes(flipped(data, 8 * index + number % 8))
        assert_nothing_wrong_gets_in(path, expected)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("written", ["dcp"], indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_no_flipped_bit_of_a_dcp_description_gets_in(written: tuple[Path, Path]) -> None:
    path, _ = written
    file, expected = path / ".metadata", expected_model()
    data = file.read_bytes()
    for bit in range(0, 8 * len(data), 29):
        file.write_bytes(flipped(data, bit))
        assert_nothing_wrong_gets_in(path, expected)


# -- headers ---------------------------------------------------------------------------------------

NUMBER = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63)]),
    st.floats(),
    st.booleans(),
)
ABOUT = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "I32", "BF16", "F31", "BOOL"]), NUMBER),
        "shape": st.one_of(st.lists(NUMBER, max_size=3), NUMBER, st.text(max_size=2)),
        "data_offsets": st.one_of(st.lists(NUMBER, max_size=3), st.none()),
        "more": st.none(),
    },
)
HEADERS = st.one_of(
    st.dictionaries(
        st.sampled_from(["weight", "bias", "__metadata__", ""]),
        st.one_of(ABOUT, NUMBER),
        max_size=3,
    ),
    st.lists(st.none(), max_size=2),
    NUMBER,
)


@given(
    header=st.one_of(HEADERS.map(lambda h: json.dumps(h).encode()), st.binary(max_size=60)),
    stated=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    tail=st.integers(0, 80),
)
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_made_up_header_gets_in(
    tmp_path: Path, header: bytes, stated: int | None, tail: int
) -> None:
    path = tmp_path / "made_up.safetensors"
    length = len(header) if stated is None else stated
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(tail))
    try:
        reader = open_checkpoint(path)
    except CorruptCheckpointError:
        return
    assert sum(entry.nbytes for entry in reader.entries.values()) == tail  # the file is filled
    for name, entry in reader.entries.items():
        assert tuple(reader.read(name).shape) == entry.shape


def described(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "it has 3 bytes": b"abc",
    "its header would take": (10**12).to_bytes(8, "little") + b"{}",
    "is no JSON object": (2).to_bytes(8, "little") + b"[]",
    "nested without end": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "has a name twice": (20).to_bytes(8, "little") + b'{"a":{},"a":{}}     ',
    "the dtype 'F31'": described(a={**F32, "dtype": "F31"}) + bytes(8),
    "takes 8 bytes, but its shape asks for 12": described(a={**F32, "shape": [3]}) + bytes(8),
    "'b' starts at byte 4, but 'a' ends at 8": described(a=F32, b={**F32, "data_offsets": [4, 12]})
    + bytes(12),
    "starts at byte 8, but 'the header' ends at 0": described(a={**F32, "data_offsets": [8, 16]})
    + bytes(16),
    "bytes, but its header describes": described(a=F32) + bytes(12),
    "no dtype, shape and place of 'a'": described(a={"dtype": "F32"}),
    "has the shape \\[-2\\]": described(a={**F32, "shape": [-2]}) + bytes(8),
    "values that are no strings": described(__metadata__={"a": 1}),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_what_is_wrong_with_a_header_is_said(message: str, tmp_path: Path) -> None:
    eager, model = twins()
    path = tmp_path / "a.safetensors"
    path.write_bytes(DAMAGED[message])
    with pytest.raises(CorruptCheckpointError, match=message):
        lateinit.load_checkpoint(model, path)
    assert_untouched(eager, model)


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return FORMATS["shards"](Net().state_dict(), tmp_path)


def index_of(folder: Path) -> Any:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(folder: Path, message: str) -> None:
    eager, model = twins()
    with pytest.raises(CorruptCheckpointError, match=message):
        lateinit.load_checkpoint(model, folder)
    assert_untouched(eager, model)


def test_an_index_itself_may_be_named(folder: Path) -> None:
    _, model = twins()
    lateinit.load_checkpoint(model, folder / "model.safetensors.index.json")


def test_all_missing_shards_are_named(folder: Path) -> None:
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").unlink()
    refused(folder, r"model-00001-of-00002.safetensors, model-00002-of-00002.safetensors.* missing")


def test_a_truncated_last_shard_is_found_first(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, r"00002\.safetensors is no whole safetensors file: it has")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..", "", "a\\..\\b", "x\0y"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(name: str, folder: Path) -> None:
    save_file({"enc.weight": torch.ones(8, 4)}, folder.parent / "outside.safetensors")
    index = index_of(folder)
    index["weight_map"]["enc.weight"] = name
    write_index(folder, index)
    refused(folder, r"not inside of .*: refused")


def test_an_index_that_is_wrong_about_a_shard_is_refused(folder: Path) -> None:
    index = index_of(folder)
    places = index["weight_map"]
    other = next(f for f in places.values() if f != places["enc.weight"])
    places["enc.weight"] = other
    write_index(folder, index)
    refused(folder, f"says that enc.weight would be in {other}, which it is not")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": 3}, {"weight_map": {"a": 1}}, None])
def test_what_is_no_index_is_refused(index: Any, folder: Path) -> None:
    write_index(folder, index)
    refused(folder, "is no index of shards")


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path, "is no checkpoint: it has no index.* but nothing")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "but notes.txt")
    refused(tmp_path / "notes.txt", r"notes\.txt is no checkpoint: a \.safetensors")
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "several checkpoints: name one of a.safetensors, b.safetensors")


@pytest.mark.parametrize("kept", [(1,), (1, 2)])
def test_shards_without_their_index_are_no_checkpoint(kept: tuple[int, ...], folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    for number in {1, 2} - {*kept}:
        (folder / f"model-0000{number}-of-00002.safetensors").unlink()
    refused(
        folder, r"no index of its shards, model-00001\S* .*fetch model\.safetensors\.index\.json"
    )


def test_one_shard_that_is_all_there_is_needs_no_index(tmp_path: Path) -> None:
    expected = Net()
    lateinit.save_checkpoint(expected, tmp_path / "model-00001-of-00001.safetensors")
    _, model = twins()
    lateinit.load_checkpoint(model, tmp_path)
    assert torch.equal(model.dec.weight, expected.dec.weight)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt"])
def test_a_pointer_to_a_file_is_told_from_the_file(name: str, tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / name).write_text(text)
    message = r"a\.\w+ is a pointer of Git LFS.* `git lfs pull`"
    refused(tmp_path / name, message)
    if name != "a.bin":
        refused(tmp_path, message)


def test_the_state_of_an_optimizer_is_told_from_that_of_a_module(tmp_path: Path) -> None:
    torch.save(torch.optim.Adam(Net().parameters()).state_dict(), tmp_path / "a.pt")
    with pytest.raises(MismatchError, match=r"state of an optimizer.*optimizer\.load_state_dict"):
        lateinit.load_checkpoint(Net(), tmp_path / "a.pt")


def test_a_pickled_module_is_refused_with_its_class_and_no_advice_to_unpickle_it(
    tmp_path: Path,
) -> None:
    torch.save(Net(), tmp_path / "a.pt")
    refused(
        tmp_path / "a.pt", r"save model\.state_dict\(\) in its place\. \(Unsupp.*twins\.Net[^\n]*$"
    )


# -- pickles ---------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_a_pickle_that_could_run_code_is_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    for zipped in (True, False):
        torch.save({"enc.weight": Evil()}, path, _use_new_zipfile_serialization=zipped)
        refused(path, "could run any code, so it is not unpickled")
    path.write_bytes(pickle.dumps(Evil()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the pickle's protocol
        refused(path, "not unpickled")
    dcp = FORMATS["dcp"](Net().state_dict(), tmp_path)
    (dcp / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused(dcp, r"system does not belong there")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "name", ["pathlib PosixPath", "torch.distributed.checkpoint.metadata Metadata"]
)
def test_a_pickle_changes_no_class_that_it_names(name: str, tmp_path: Path) -> None:
    dcp, cls = (
        FORMATS["dcp"](Net().state_dict(), tmp_path),
        pkgutil.resolve_name(name.replace(" ", ":")),
    )
    data = (dcp / ".metadata").read_bytes()
    named = "c{}\n{}\n".format(*name.split())
    # Name the class, set an attribute of it, take it off the stack; then the metadata as they were.
    change = named.encode() + b"N}X\x07\x00\x00\x00changedI1\ns\x86b0"
    (dcp / ".metadata").write_bytes(data[:2] + change + data[2:])
    _, model = twins(seed=3)
    lateinit.load_checkpoint(model, dcp)
    assert not hasattr(cls, "changed")
    pickle.loads(data[:2] + change + b"N.")
    assert cls.changed == 1  # by an unpickler that gives it the class
    del cls.changed


def test_what_is_no_state_dict_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.ones(2), path)
    refused(path, "holds a Tensor, no state dict")
    torch.save({3: torch.ones(2)}, path)
    refused(path, "holds a dict, no state dict")
    torch.save([torch.ones(2)], path)
    refused(path, "holds a list, no state dict")
    torch.save(Net(), path)
    refused(path, "not unpickled")
    path.write_bytes(b"PK\x03\x04 nothing of that kind")
    refused(path, "is no whole file of torch.save")


@pytest.mark.parametrize("change", [-4, 4, 64])
def test_a_record_of_another_length_than_its_storage_is_refused(
    change: int, tmp_path: Path
) -> None:
    whole = FORMATS["pt"](Net().state_dict(), tmp_path)
    changed = tmp_path / "changed.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            if record.filename.endswith("data/1"):
                data = data[:change] if change < 0 else data + bytes(change)
            new.writestr(record.filename, data)
    refused(changed, r"its record 'data/1' has \d+ bytes in place of \d+")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    expected = Net()
    torch.serialization.set_crc32_options(False)
    try:
        path = FORMATS["pt"](expected.state_dict(), tmp_path)
        dcp = FORMATS["dcp"](expected.state_dict(), tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    for place in (path, dcp):
        _, model = twins(seed=3)
        lateinit.load_checkpoint(model, place)
        assert_same(expected, model)


def test_dcp_files_that_lead_out_of_the_folder_or_are_missing_are_refused(tmp_path: Path) -> None:
    dcp = FORMATS["dcp"](Net().state_dict(), tmp_path)
    shutil.copy(dcp / "__0_0.distcp", tmp_path / "out.distcp")
    data = (dcp / ".metadata").read_bytes()
    (dcp / ".metadata").write_bytes(data.replace(b"\x0d__0_0.distcp"[1:], b"../out.distcp"[:12]))
    refused(dcp, "not inside of .*refused|cannot be read")
    (dcp / ".metadata").write_bytes(data)
    (dcp / "__0_0.distcp").unlink()
    refused(dcp, r"__0_0\.distcp cannot be read: No such file")


# -- windows ---------------------------------------------------------------------------------------


def boxes() -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    yield (0, 0, 0), (4, 6, 5)
    yield (1, 2, 3), (2, 3, 2)
    yield (3, 0, 0), (1, 6, 5)
    yield (0, 5, 4), (4, 1, 1)
    yield (2, 2, 2), (0, 1, 1)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_window_of_a_tensor_is_that_block(format_: str, tmp_path: Path) -> None:
    whole = torch.randn(4, 6, 5)
    state = {"turned": whole.permute(2, 0, 1), "a": whole, "scalar": torch.tensor(2.5)}
    reader = open_checkpoint(FORMATS[format_](state, tmp_path))
    for offsets, sizes in boxes():
        block = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        assert torch.equal(reader.read("a", offsets, sizes), whole[block])
    assert torch.equal(reader.read("turned"), whole.permute(2, 0, 1))
    assert torch.equal(reader.read("scalar"), torch.tensor(2.5))
    for wrong in (((0, 0, 0), (5, 6, 5)), ((-1, 0, 0), (1, 1, 1)), ((0, 0), (1, 1))):
        with pytest.raises(ValueError, match="no block"):
            reader.read("a", *wrong)
    with pytest.raises(CheckpointError, match="no tensor 'b'; there are: a"):
        reader.read("b")


@pytest.mark.parametrize("name", ["x" * 5000, "y" * 300 + ".safetensors"])
def test_a_path_that_the_system_refuses_is_told(name: str, tmp_path: Path) -> None:
    _, model = twins()
    with pytest.raises(CorruptCheckpointError, match="cannot be read: File name too long"):
        lateinit.load_checkpoint(model, tmp_path / name)
    with pytest.raises(OutputError, match=r"cannot write .*File name too long"):
        lateinit.save_checkpoint(model, tmp_path / name)
