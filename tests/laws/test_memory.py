"""Law 6, in processes of their own: what is allocated while recording and while materialising."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("resource", reason="limits on memory are POSIX's")

PREAMBLE = """
import resource, sys
import torch
from torch import nn
import lateinit

GIB, MIB = 2**30, 2**20

def data_size():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))

def allow(more):
    # Counts what is mapped privately and writable, touched or not.
    limit = data_size() + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

def stack(layers, width):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])

# First uses import and map what is needed once.
lateinit.materialize(lateinit.deferred_init(stack, 2, 64))
"""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits data size")


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@needs_linux
def test_recording_a_model_of_160_gib_needs_no_memory_for_it() -> None:
    done = run("""
        allow(64 * MIB)
        model = lateinit.deferred_init(stack, 40, 32768)
        assert sum(p.nbytes for p in model.parameters()) > 150 * GIB
        assert all(p.is_meta for p in model.parameters())
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_linux
def test_the_limit_of_these_tests_does_stop_eager_construction() -> None:
    done = run("""
        allow(64 * MIB)
        stack(40, 4096)
    """)
    assert done.returncode != 0
    assert "allocate" in done.stderr


@pytest.mark.slow
@needs_linux
def test_a_part_of_a_large_model_needs_the_memory_of_the_part() -> None:
    done = run("""
        model = lateinit.deferred_init(stack, 40, 32768)
        allow(96 * MIB)
        lateinit.materialize(model, only="*.bias")
        lateinit.materialize(model, only="17.bias")
        assert model[17].bias.abs().max() > 0
    """)
    assert done.returncode == 0, done.stderr


@needs_linux
def test_materialising_peaks_at_the_model_and_a_bounded_working_set() -> None:
    done = run("""
        def twice():
            model = stack(16, 2048)  # 256 MiB, each value drawn and then drawn again
            for layer in model:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            return model
        model = lateinit.deferred_init(twice)
        allow(256 * MIB + 96 * MIB)
        lateinit.materialize(model)
        assert model[15].weight.std() > 0.01
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_linux
def test_one_layer_at_a_time_needs_the_memory_of_one_layer() -> None:
    done = run("""
        model = lateinit.deferred_init(stack, 12, 4096)  # 64 MiB a layer
        allow(192 * MIB)
        for index in range(12):
            lateinit.materialize(model[index])
            assert model[index].weight.abs().max() > 0
            model[index] = nn.Identity()
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_linux
def test_redrawing_is_counted_in_bounded_memory() -> None:
    done = run("""
        def redrawn(numel):
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(numel), a=-1.0, b=1.0))

        lateinit.deferred_init(redrawn, 1 << 22)
        allow(96 * MIB)
        lateinit.deferred_init(redrawn, 1 << 26)  # a third of it, as places, takes 162 MiB
    """)
    assert done.returncode == 0, done.stderr


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pt", "materialize"])
def test_running_out_of_address_space_is_told_and_can_be_repeated(
    kind: str, tmp_path: Path
) -> None:
    done = run(f"""
        from lateinit.errors import OutOfMemoryError
        path = {str(tmp_path / f"saved.{kind}")!r}
        eager = stack(4, 4096)
        if path.endswith("pt"):
            torch.save(eager.state_dict(), path)
        elif path.endswith("safetensors"):
            lateinit.save_checkpoint(eager, path)
        model = lateinit.deferred_init(stack, 4, 4096)
        def give():
            if path.endswith("materialize"):
                return lateinit.materialize(model)
            return lateinit.load_checkpoint(model, path)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 40 * MIB, resource.RLIM_INFINITY))
        try:
            give()
        except OutOfMemoryError as error:
            assert "free" in str(error)
        else:
            raise AssertionError("there was memory enough")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        give()
        if not path.endswith("materialize"):
            pairs = zip(eager.parameters(), model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert not lateinit.is_deferred(model)
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_shards_are_saved_one_after_another(form: str, tmp_path: Path) -> None:
    done = run(f"""
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

        def save(model, name):
            fully_shard(model, mesh=mesh)
            path = {str(tmp_path)!r} + name
            lateinit.save_checkpoint(model, path, format={form!r}, max_shard_size="1GB")

        save(lateinit.deferred_init(stack, 2, 64), "small")
        model = lateinit.deferred_init(stack, 16, 2048)
        allow(128 * MIB)
        assert sum(p.nbytes for p in model.parameters()) > 256 * MIB
        save(model, "large")
        dist.destroy_process_group()
    """)
    assert done.returncode == 0, done.stderr
