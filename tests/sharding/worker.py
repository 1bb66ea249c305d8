"""One rank of a group of real processes: ``python -m tests.sharding.worker RANK RANKS STORE``.

Prints a line for each model that is not what its eager twin is, and at last how many are.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import lateinit
from lateinit.errors import LateinitError
from tests.sharding.compare import differences
from tests.sharding.placements import (
    EVEN,
    ON_A_GRID,
    PLACEMENTS,
    Block,
    fsdp,
    grid,
    line,
    on_both_axes,
    tensor_parallel,
)
from tests.support.building import SEED
from tests.support.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(seconds=60)
UNSHARDABLE = (NotImplementedError, RuntimeError, ValueError, AssertionError, KeyError, TypeError)
TOKENS = torch.arange(12).reshape(2, 6)


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store = dist.FileStore(options.store, options.ranks)
    dist.init_process_group(
        "gloo", store=store, rank=options.rank, world_size=options.ranks, timeout=TIMEOUT
    )
    equal = skipped = 0
    wrong: list[str] = []
    for name, way in checks(options):
        try:
            found = way()
        except Exception as error:  # noqa: BLE001 - the other models are to be seen too
            found = [f"{type(error).__name__}: {error}"]
        equal += found == []
        skipped += found is None
        wrong += [f"{name}: {text}" for text in found or []]
    for text in wrong:
        say(f"rank {options.rank} of {options.ranks}: {text[:500]}")
    say(f"rank {options.rank}: {equal} equal, {skipped} that cannot be sharded eagerly either")
    dist.barrier()
    dist.destroy_process_group()
    return 1 if wrong or not equal else 0


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def checks(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[str] | None]]]:
    axis = line(options.ranks)
    axes = grid(options.ranks) if options.ranks % EVEN == 0 else None
    ways = [(name, place, axis) for name, place in PLACEMENTS.items()]
    ways += [(name, place, axes) for name, place in ON_A_GRID.items() if axes is not None]
    models: list[tuple[str, Callable[[], nn.Module]]] = [(str(c), c.build) for c in MODELS]
    if options.architectures:
        from tests.sharding.architectures import architectures  # needs transformers

        models += architectures(options.architectures)
    for number, (name, make) in enumerate(models):
        # A subset meets every model and every way, but not each with each.
        for way, place, mesh in ways[number % options.every :: options.every]:
            yield f"{name}, {way}", lambda m=make, p=place, d=mesh: check(m, p, d)
        way, place, mesh = ways[number % len(ways)]
        path = Path(f"{options.store}-{options.rank}.safetensors")
        yield f"{name}, {way}, loaded", lambda m=make, p=place, d=mesh, f=path: load(m, p, d, f)
    if axes is not None:
        yield "block, tensor parallel", lambda: train(tensor_parallel, axes["tp"])
        yield "block, on both axes", lambda: train(on_both_axes, axes)
    yield "block, fsdp", lambda: train(fsdp, axis)


def check(make: Callable[[], nn.Module], place: Callable[..., None], mesh: Any) -> list[str] | None:
    """How shard-then-materialise differs from materialise-then-shard; None if neither can be."""
    torch.manual_seed(SEED)
    expected = make()
    torch.manual_seed(SEED)
    with lateinit.deferred():
        found = make()
    try:
        place(expected, mesh, None)
    except UNSHARDABLE:
        return None
    place(found, mesh, source_of(found))
    lateinit.materialize(found)
    return differences(expected, found)


def load(
    make: Callable[[], nn.Module], place: Callable[..., None], mesh: Any, path: Path
) -> list[str] | None:
    """How a checkpoint in shards differs from shards of a checkpoint that was loaded whole."""
    torch.manual_seed(SEED + 1)
    source = make()
    torch.manual_seed(SEED + 1)
    expected, real = make(), make()
    torch.manual_seed(SEED)
    if shapes(make()) != shapes(source):
        return None  # what was drawn decided what was built
    try:
        make().load_state_dict(source.state_dict())
        lateinit.save_checkpoint(source, path, force=True)
        place(expected, mesh, None)
        place(real, mesh, None)
    except (*UNSHARDABLE, LateinitError):
        return None
    torch.manual_seed(SEED)
    with lateinit.deferred():
        found = make()
    place(found, mesh, source_of(found))
    held = {name: id(p) for name, p in found.named_parameters()}
    for model in (found, real):
        lateinit.load_checkpoint(model, path)
    wrong = [] if held == {n: id(p) for n, p in found.named_parameters()} else ["other objects"]
    # What a checkpoint does not hold is drawn from another seed here.
    kept = set(expected.state_dict())
    for model in (found, real):
        wrong += [text for text in differences(expected, model) if text.partition(":")[0] in kept]
    return wrong


def source_of(model: nn.Module) -> int | None:
    """0 where all is deferred, and nothing will be sent; real tensors are cut by each rank."""
    return 0 if all(lateinit.is_deferred(p) for p in model.parameters()) else None


def shapes(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def train(place: Callable[[nn.Module, DeviceMesh], None], mesh: DeviceMesh) -> list[str]:
    """Likewise, and the losses of two steps against those of one process."""
    torch.manual_seed(SEED)
    with lateinit.deferred():
        found = Block()
    place(found, mesh)
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    lateinit.materialize(found)
    torch.manual_seed(SEED)
    expected = Block()
    alone = copy.deepcopy(expected)
    place(expected, mesh)
    wrong = differences(expected, found)
    ours = losses(found, optimizer)
    theirs = losses(expected, torch.optim.SGD(expected.parameters(), lr=0.1))
    single = losses(alone, torch.optim.SGD(alone.parameters(), lr=0.1))
    if ours != theirs:
        wrong.append(f"losses {ours} for {theirs}")
    if not torch.allclose(torch.tensor(ours), torch.tensor(single), rtol=1e-4):
        wrong.append(f"losses {ours} for {single} in one process")
    return wrong


def losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        output = model(TOKENS)
        whole = output.full_tensor() if isinstance(output, DTensor) else output
        loss = whole.square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sharding.worker", description=__doc__)
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("store", help="a file through which the ranks find each other")
    parser.add_argument("--every", type=int, default=1, help="only every nth way for each model")
    parser.add_argument("--architectures", type=int, default=0, help="so many of transformers'")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
