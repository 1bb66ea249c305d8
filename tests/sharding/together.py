"""Ranks that fail, differ or try again: ``python -m ... RANK RANKS STORE FOLDER``.

Each case is a function of a rank, and leaves the ranks able to go on. Every rank prints a line for
each case: the errors that it saw, and whether its shards are right at the end.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lateinit
from lateinit._tensors.realize import SharedStorage
from tests.sharding.placements import Block, fsdp, line, on_both_axes

CULPRIT = 1
TIMEOUT = timedelta(seconds=30)
SEED = 3


class Run:
    """One rank in one case.

    Attributes:
        rank: the rank.
        other: whether it is the one at which something goes wrong.
        folder: holds ``model.safetensors`` and ``other.safetensors``, of the same names and shapes.
        seen: the errors, one after the other.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.other = rank == CULPRIT
        self.folder = folder
        self.seen: list[str] = []

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - to be told
            self.seen.append(f"{type(error).__name__}: {error}")


def built(place: Callable[[nn.Module, DeviceMesh], object] = fsdp, mesh: Any = None) -> nn.Module:
    torch.manual_seed(SEED)
    model = lateinit.deferred_init(Block)
    place(model, mesh or line(dist.get_world_size()))
    return model


@contextlib.contextmanager
def failing(error: BaseException, after: int) -> Iterator[None]:
    """Raise an error when some storages have been given their values."""
    give, done = SharedStorage.give, 0

    def given(shared: SharedStorage, *arguments: Any) -> None:
        nonlocal done
        done += 1
        if done > after:
            raise error
        give(shared, *arguments)

    with mock.patch.object(SharedStorage, "give", given):
        yield


def a_wrong_pattern(run: Run) -> nn.Module:
    model = built()
    run.call(lateinit.materialize, model, only="*.wait" if run.other else None)
    run.call(lateinit.materialize, model)
    return model


def a_failure_in_the_middle(run: Run) -> nn.Module:
    model = built()
    with failing(OSError("no such luck"), 2) if run.other else contextlib.nullcontext():
        run.call(lateinit.materialize, model)
    run.call(lateinit.materialize, model)
    return model


def an_interrupt(run: Run) -> nn.Module:
    model = built()
    with failing(KeyboardInterrupt(), 2) if run.other else contextlib.nullcontext():
        run.call(lateinit.materialize, model)
    if run.other:
        run.call(lateinit.materialize, model)
    run.call(lateinit.materialize, model)
    return model


def another_call(run: Run) -> nn.Module:
    model = built()
    if run.other:
        run.call(lateinit.load_checkpoint, model, run.folder / "model.safetensors")
    else:
        run.call(lateinit.materialize, model)
    run.call(lateinit.materialize, model)
    return model


def what_is_left_differs(run: Run) -> nn.Module:
    """A retry after a failure, with another construction on one rank."""
    model = built()
    with failing(OSError("no such luck"), 1) if run.other else contextlib.nullcontext():
        run.call(lateinit.materialize, model.norm)
    run.call(lateinit.materialize, model, seed=9 if run.other else None)
    run.call(lateinit.materialize, model)
    return model


def nothing_is_left(run: Run) -> nn.Module:
    model = built()
    run.call(lateinit.materialize, model)
    run.call(lateinit.materialize, model)
    run.call(lateinit.materialize, model, check=False)
    return model


def no_question(run: Run) -> nn.Module:
    """Without a check, and for a part without shards, no rank waits for another."""
    model = built()
    if run.other:
        run.call(lateinit.materialize, model, only="scale")
        run.call(lateinit.materialize, model, check=False)
        run.call(lateinit.load_checkpoint, Block(), run.folder / "model.safetensors")
    dist.barrier()
    if not run.other:
        run.call(lateinit.materialize, model, check=False)
    return model


def loaded_again(run: Run, wrong: str) -> nn.Module:
    """Load, on one rank at first by the name of a wrong file."""
    model = built()
    name = wrong if run.other else "model"
    run.call(lateinit.load_checkpoint, model, run.folder / f"{name}.safetensors")
    assert lateinit.is_deferred(model)
    run.call(lateinit.load_checkpoint, model, run.folder / "model.safetensors")
    return model


def other_files(run: Run) -> nn.Module:
    return loaded_again(run, "other")


def a_missing_file(run: Run) -> nn.Module:
    return loaded_again(run, "none")


def a_file_that_ends_in_the_middle(run: Run) -> nn.Module:
    from lateinit._checkpoint.load.assign import Placer

    model, put = built(), Placer.put

    def broken(placer: Placer, target: torch.Tensor, *rest: Any, **options: Any) -> None:
        if run.other and isinstance(target, DTensor) and target.dim() == 1:
            raise OSError("the disk is gone")
        put(placer, target, *rest, **options)

    with mock.patch.object(Placer, "put", broken):
        run.call(lateinit.load_checkpoint, model, run.folder / "model.safetensors")
    run.call(lateinit.load_checkpoint, model, run.folder / "model.safetensors")
    return model


def what_the_file_lacks_differs(run: Run) -> nn.Module:
    torch.manual_seed(5 if run.other else SEED)
    model = lateinit.deferred_init(Block)
    fsdp(model, line(dist.get_world_size()))
    path = run.folder / "part.safetensors"
    run.call(lateinit.load_checkpoint, model, path, strict=False)
    assert lateinit.is_deferred(model)
    torch.manual_seed(SEED)
    model = built()
    run.call(lateinit.load_checkpoint, model, path, strict=False)
    return model


CASES = {
    function.__name__: function
    for function in (
        a_failure_in_the_middle,
        a_file_that_ends_in_the_middle,
        a_missing_file,
        a_wrong_pattern,
        an_interrupt,
        another_call,
        no_question,
        nothing_is_left,
        other_files,
        what_is_left_differs,
        what_the_file_lacks_differs,
    )
}


def two_axes(run: Run) -> nn.Module:
    """What goes wrong on one rank is heard along both axes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = built(on_both_axes, mesh)
    with failing(OSError("no such luck"), 2) if run.other else contextlib.nullcontext():
        run.call(lateinit.materialize, model)
    run.call(lateinit.materialize, model)
    return model


def stages(run: Run) -> nn.Module:
    """Pipeline stages hold other modules, and ask only their own ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(SEED)
    model = lateinit.deferred_init(Block)
    if run.rank < 2:
        del model.down
    else:
        del model.up, model.embed
    fully_shard(model, mesh=mesh["dp"])
    with failing(OSError("no such luck"), 1) if run.other else contextlib.nullcontext():
        run.call(lateinit.materialize, model)
    if run.rank < 2:
        run.call(lateinit.materialize, model)
    return model


ON_FOUR = {"stages": stages, "two_axes": two_axes}


def right(model: nn.Module) -> bool:
    """Whether all shards are those of the eager twin."""
    torch.manual_seed(SEED)
    full = Block().state_dict()
    torch.manual_seed(SEED)
    if lateinit.is_deferred(model):
        return False
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if not torch.equal(parameter.full_tensor(), full[name]):
            return False
    return True


def ending(case: Callable[[Run], nn.Module]) -> Callable[[Run], str]:
    return lambda run: "right" if right(case(run)) else "wrong"


def play(cases: Mapping[str, Callable[[Run], str]]) -> int:
    """Run cases as the rank that the arguments of the process name, and print what each came to."""
    rank, ranks, store, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, int(ranks)),
        rank=int(rank),
        world_size=int(ranks),
        timeout=TIMEOUT,
    )
    for name, case in cases.items():
        run = Run(int(rank), Path(folder))
        end = case(run)
        dist.barrier()
        sys.stdout.write(f"{name} | {' | '.join([*run.seen, end])}\n")
        sys.stdout.flush()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    chosen = ON_FOUR if int(sys.argv[2]) == 4 else CASES
    sys.exit(play({name: ending(case) for name, case in chosen.items()}))
