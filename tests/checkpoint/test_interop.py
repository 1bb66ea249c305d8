"""Checkpoints between lateinit, transformers and torch; architectures of the zoo; killed loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import lateinit
from tests.support import processes
from tests.support.formats import FORMATS
from tests.support.snapshots import assert_same, first_difference, snapshot
from tests.support.sweep import part_of
from tests.support.twins import Net, run_alone, twins

transformers = pytest.importorskip("transformers")

from tests.checkpoint.test_save import HUB  # noqa: E402 - needs transformers
from tests.zoo import catalog, check, pool  # noqa: E402
from tests.zoo.hints import default_config  # noqa: E402
from tests.zoo.test_zoo import SPREAD  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    pool.prepare()
    yield
    torch.set_num_threads(threads)


def smallest(model_type: str) -> Callable[[], nn.Module]:
    """What builds the bare model of a type, or the first one that can be built."""
    bare, heads = catalog.classes(model_type)
    config = default_config(model_type)
    for name in (*bare, *heads):
        cls = catalog.model_class(model_type, name)
        try:
            _, small = check.smallest(cls, config)
        except check.UnbuildableError:
            continue
        return lambda cls=cls, small=small: cls(small)  # type: ignore[misc]
    raise AssertionError(model_type)


@pytest.mark.parametrize("model_type", part_of(SPREAD, 1, 3))
def test_an_architecture_loads_as_its_eager_twin_does(model_type: str, tmp_path: Path) -> None:
    """From every format, and from what its own ``save_pretrained`` makes of it."""
    build = smallest(model_type)
    check.seed(check.EAGER_POISON)
    eager = build()
    with torch.no_grad():
        for tensor in {id(t): t for t in eager.state_dict(keep_vars=True).values()}.values():
            if tensor.is_floating_point():
                tensor.mul_(3).add_(1)
    state = eager.state_dict()
    check.seed(check.EAGER_POISON)
    twin = build()
    twin.load_state_dict(state)
    after, expected = torch.get_rng_state(), snapshot(twin)
    lateinit.save_checkpoint(eager, tmp_path / "ours", max_shard_size="1MB")
    paths = [tmp_path / "ours", *(write(state, tmp_path) for write in FORMATS.values())]
    if hasattr(eager, "save_pretrained") and model_type not in UNREADABLE:
        eager.save_pretrained(tmp_path / "theirs")
        paths.append(tmp_path / "theirs")
    for path in paths:
        check.seed(check.LATE_POISON)
        model = lateinit.deferred_init(build)
        lateinit.load_checkpoint(model, path)
        assert torch.equal(after, torch.get_rng_state()), path
        assert first_difference(expected, snapshot(model)) is None, path


# What transformers cannot save where it is this small.
UNREADABLE = {"kimi_k25"}


def hub_model(name: str) -> tuple[Any, Any]:
    config = transformers.AutoConfig.for_model(name.partition("-")[0], **HUB[name])
    mapping = transformers.AutoModelForCausalLM._model_mapping
    return (transformers.T5Model if name == "t5" else mapping[type(config)]), config


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("size", ["4kB", "5GB"])
def test_what_transformers_wrote_is_read(name: str, size: str, tmp_path: Path) -> None:
    cls, config = hub_model(name)
    torch.manual_seed(5)
    cls(config).save_pretrained(tmp_path, max_shard_size=size)
    expected = cls.from_pretrained(tmp_path)
    torch.manual_seed(0)
    model = lateinit.deferred_init(cls, config)
    report = lateinit.load_checkpoint(model, tmp_path)
    assert not report.unexpected
    assert not report.initialised
    for (path, ours), (_, theirs) in zip(
        model.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), path
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_what_safetensors_wrote_is_read_and_it_reads_ours(tmp_path: Path) -> None:
    expected = Net()
    save_model(expected, str(tmp_path / "theirs.safetensors"))
    _, model = twins(seed=3)
    lateinit.load_checkpoint(model, tmp_path / "theirs.safetensors")
    assert_same(expected, model)
    lateinit.save_checkpoint(model, tmp_path / "ours.safetensors")
    other = Net()
    load_model(other, tmp_path / "ours.safetensors")
    assert_same(expected, other)
    for name, tensor in load_file(tmp_path / "ours.safetensors").items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_sharded_dcp_checkpoint_is_joined(tmp_path: Path) -> None:
    run_alone(SHARDED_DCP, str(tmp_path / "dcp"))
    model = lateinit.deferred_init(nn.Linear, 7, 10)
    lateinit.load_checkpoint(model, tmp_path / "dcp")
    assert torch.equal(model.weight, torch.arange(70.0).view(10, 7))
    assert torch.equal(model.bias, torch.arange(10.0))


SHARDED_DCP = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

def save(rank, path, port):
    import warnings
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", store=dist.FileStore(port, 2), rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.arange(70.0).view(10, 7), mesh, [Shard(1)])
    bias = distribute_tensor(torch.arange(10.0), mesh, [Shard(0)])
    dcp.save({"weight": weight, "bias": bias}, checkpoint_id=path)
    dist.barrier()
    dist.destroy_process_group()

mp.start_processes(save, args=(sys.argv[1], sys.argv[1] + ".store"), nprocs=2,
                   start_method="fork")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("format_", ["shards", "pt", "dcp"])
def test_a_load_killed_at_any_step_leaves_the_files_as_they_were(
    format_: str, tmp_path: Path
) -> None:
    done = processes.run(["-m", "tests.support.killed_loads", str(tmp_path), format_])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 15


LARGE = """
import sys, torch, lateinit
from torch import nn

def stack():
    return nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)])

def own_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if "RssAnon" in line) / 1024

lateinit.save_checkpoint(lateinit.deferred_init(stack), sys.argv[1] + "/a.safetensors")
with torch.device("meta"):
    pass
small = lateinit.deferred_init(nn.Linear, 2, 2)
lateinit.save_checkpoint(small, sys.argv[1] + "/small.safetensors")
lateinit.load_checkpoint(small, sys.argv[1] + "/small.safetensors")
before = own_memory()
model = lateinit.deferred_init(stack)
lateinit.load_checkpoint(model, sys.argv[1] + "/a.safetensors")
total = sum(p.sum().item() for p in model.parameters())
mapped = own_memory() - before
lateinit.load_checkpoint(model, sys.argv[1] + "/a.safetensors")
print(f"{mapped:.0f}", f"{own_memory() - before:.0f}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_loading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    mapped, copied = map(int, run_alone(LARGE, str(tmp_path)).split())
    assert mapped < 16  # MiB, of a model of 128
    assert copied < 128 + 32  # real by now: copied into, one at a time


def test_scales_of_microscaling_formats_are_read_and_written(tmp_path: Path) -> None:
    scales = torch.tensor([1.0, 0.5, 2.0**-127, float("nan")]).to(torch.float8_e8m0fnu)
    save_file({"scales": scales}, tmp_path / "a.safetensors")

    def build() -> nn.Module:
        module = nn.Module()
        module.register_buffer("scales", torch.ones(4).to(torch.float8_e8m0fnu))
        return module

    model = lateinit.deferred_init(build)
    lateinit.load_checkpoint(model, tmp_path / "a.safetensors")
    lateinit.save_checkpoint(model, tmp_path / "b.safetensors")
    for found in (model.scales, load_file(tmp_path / "b.safetensors")["scales"]):
        assert torch.equal(found.view(torch.uint8), scales.view(torch.uint8))
