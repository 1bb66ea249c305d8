"""What the commands of ``cli`` do. They return what is to be shown; ``cli`` shows it.

Apart from ``cli``, so that its help needs no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from lateinit._checkpoint.api import Saved, save_checkpoint
from lateinit._checkpoint.formats import DTYPES
from lateinit._distributed import mesh_cost, training_cost
from lateinit._integrations import model_specs
from lateinit._progress import Progress
from lateinit._recording import deferred_init
from lateinit._report import Verification, parity
from lateinit._report.environment import environment as info
from lateinit._report.summary import Summary, summary
from lateinit._report.verify import verify
from lateinit._rng import seed_all
from lateinit._tensors import DTypes
from lateinit._units import parse_bytes
from lateinit.errors import LateinitError

__all__ = ["ConstructionError", "Rank", "check", "info", "init", "inspect"]

Build = Callable[[], nn.Module]


class ConstructionError(Exception):
    """A model's own constructor raised."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The options of ``inspect`` that say what a rank is to be, and how it trains."""

    mesh: str | None
    tp_plan: str | None
    train: str | None
    batch: int | None
    sequence: int | None
    recompute: str


def inspect(
    spec: str, kwargs: str | None, only: Sequence[str] | None, depth: int | None, rank: Rank
) -> Summary | mesh_cost.Share:
    """The table of a model; with a mesh, what a rank of it holds."""
    axes = None if rank.mesh is None else mesh_cost.parse_mesh(rank.mesh)
    policy = None if rank.train is None else training_cost.policy_named(rank.train)
    computed = _batch(rank)
    if (policy is not None and axes is None) or (computed is not None and policy is None):
        raise typer.BadParameter("--train goes with --mesh, and --batch with --train")
    plan = None if rank.tp_plan is None else model_specs.parse_kwargs(rank.tp_plan, "--tp-plan")
    model = _recorded(_build(spec, kwargs))
    if axes is None:
        return summary(model, only=only, depth=depth)
    return mesh_cost.share_of_rank(model, axes, plan, policy, computed)


def check(
    spec: str,
    kwargs: str | None,
    seed: int,
    checkpoint: Path | None,
    dtype: str | None,
    rules: str | None,
) -> parity.Parity | Verification:
    """Compare a model, or a checkpoint, with what eager construction gives."""
    cast = _dtype(dtype)
    if cast is not None and checkpoint is None:
        raise typer.BadParameter("--dtype is for --checkpoint")
    build = _build(spec, kwargs)
    if checkpoint is None:
        return parity.check_parity(build, seed=seed, init=_rules(rules))
    seed_all(seed)
    return verify(_recorded(build), checkpoint, seed=seed, dtype=cast, init=_rules(rules))


def init(  # noqa: PLR0913 - the options of a command
    spec: str,
    kwargs: str | None,
    output: Path,
    *,
    seed: int,
    dtype: str | None,
    rules: str | None,
    max_shard_size: str,
    force: bool,
    resume: bool,
) -> Saved:
    """Write the checkpoint of a model."""
    cast, size = _dtype(dtype), _size(max_shard_size)
    build = _build(spec, kwargs)
    seed_all(seed)
    return save_checkpoint(
        _recorded(build),
        output,
        max_shard_size=size,
        dtype=cast,
        init=_rules(rules),
        force=force,
        resume=resume,
        seed=seed,
    )


def _build(spec: str, kwargs: str | None) -> Build:
    with Progress("import", None):
        return _building(model_specs.load_spec(spec, model_specs.parse_kwargs(kwargs)))


def _recorded(build: Build) -> nn.Module:
    with Progress("record", None):
        return deferred_init(build)


def _building(build: Build) -> Build:
    """The same function, with its errors told apart from lateinit's own."""

    @functools.wraps(build)
    def building() -> nn.Module:
        try:
            return build()
        except LateinitError:
            raise
        except Exception as error:
            raise ConstructionError from error

    return building


# As people write them, and as safetensors files do.
_SHORT = {
    "bf16": "bfloat16",
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double"), "float64"),
}


def _dtype(name: str | None) -> DTypes | None:
    if name is None:
        return None
    if name.lstrip().startswith("{"):
        given = model_specs.parse_kwargs(name, "--dtype")
        return {pattern: _one_dtype(str(dtype)) for pattern, dtype in given.items()}
    return _one_dtype(name)


def _rules(text: str | None) -> dict[str, Any] | None:
    return None if text is None else model_specs.parse_kwargs(text, "--init")


def _one_dtype(name: str) -> torch.dtype:
    known = {str(d).removeprefix("torch."): d for d in DTYPES if d.is_floating_point}
    asked = name.strip().lower().removeprefix("torch.")
    found = known.get(_SHORT.get(asked, asked))
    if found is None:
        shown = ", ".join([*known, *_SHORT])
        raise typer.BadParameter(f"--dtype {name!r} is none of {shown}")
    return found


def _batch(rank: Rank) -> training_cost.Batch | None:
    size, length, recompute = rank.batch, rank.sequence, rank.recompute
    if recompute not in training_cost.RECOMPUTED:
        known = ", ".join(training_cost.RECOMPUTED)
        raise typer.BadParameter(f"--recompute {recompute} is none of {known}")
    if (size is None) != (length is None):
        raise typer.BadParameter("--batch and --sequence go together")
    return training_cost.Batch(size, length, recompute) if size and length else None


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(f"--max-shard-size {error}") from error
