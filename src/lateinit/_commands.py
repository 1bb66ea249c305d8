"""The work of the commands of ``cli``. Each returns its result; ``cli`` prints it.

A module of its own, so that the help texts of ``cli`` need no torch.
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

from lateinit._checkpoint.api import save_checkpoint
from lateinit._checkpoint.formats import DTYPES, open_checkpoint
from lateinit._checkpoint.load import Choice, plan_load
from lateinit._checkpoint.save import Saved
from lateinit._distributed import mesh_cost, training_cost
from lateinit._integrations import model_specs
from lateinit._progress import Progress
from lateinit._recording import deferred_init
from lateinit._report import Verification, page, parity
from lateinit._report.computed import ComputedReader, opened
from lateinit._report.contents import Contents, contents
from lateinit._report.differences import Differences, differences
from lateinit._report.environment import environment as info
from lateinit._report.summary import Summary, summary
from lateinit._report.trained import Trained
from lateinit._report.verify import verify
from lateinit._rng import seed_all
from lateinit._tensors import DTypes, casting
from lateinit._torch import unhurried
from lateinit._units import parse_bytes
from lateinit.errors import LateinitError

__all__ = [
    "ConstructionError",
    "Rank",
    "Sides",
    "check",
    "diff",
    "info",
    "init",
    "inspect",
    "report",
]

Build = Callable[[], nn.Module]


class ConstructionError(Exception):
    """A model's own constructor raised."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The options of ``inspect`` for one rank: its mesh and how it trains."""

    mesh: str | None
    tp_plan: str | None
    train: str | None
    batch: int | None
    sequence: int | None
    recompute: str


@dataclass(frozen=True, slots=True)
class Sides:
    """The options of ``diff``: values or headers, names, and the model to build."""

    only: Sequence[str] | None
    values: bool
    key: str | None
    prefix: str | None
    rename: Sequence[str]
    seed: int
    dtype: str | None
    kwargs: str | None


def inspect(
    spec: str, kwargs: str | None, only: Sequence[str] | None, depth: int | None, rank: Rank
) -> Summary | Trained | mesh_cost.Share | Contents:
    """The table of a model or of a checkpoint; with a mesh, a rank's share of the model."""
    path = model_specs.path_named(spec)
    if path is not None:
        _only_of_models(path, kwargs, rank)
        return contents(path, only=only)
    share = _sharing(rank)
    model = _recorded(_build(spec, kwargs))
    if share is not None and rank.mesh is not None:
        return share(model)
    table = summary(model, only=only, depth=depth)
    return table if share is None else Trained(table, share(model))


def _sharing(rank: Rank) -> Callable[[nn.Module], mesh_cost.Share] | None:
    """A function that estimates a rank's share of a model, or training; None if not requested."""
    axes = None if rank.mesh is None else mesh_cost.parse_mesh(rank.mesh)
    policy = None if rank.train is None else training_cost.policy_named(rank.train)
    computed = _batch(rank)
    if computed is not None and policy is None:
        raise typer.BadParameter("--batch goes with --train")
    plan = None if rank.tp_plan is None else model_specs.parse_kwargs(rank.tp_plan, "--tp-plan")
    if axes is None and policy is None:
        return None
    if axes is None:
        return lambda model: mesh_cost.share_of_rank(model, {}, None, policy, computed)
    return lambda model: mesh_cost.share_of_rank(model, axes, plan, policy, computed)


def _only_of_models(path: Path, kwargs: str | None, rank: Rank, **more: object) -> None:
    """Raise if a checkpoint is given with options for models: ``rank``, ``kwargs`` and ``more``."""
    options: dict[str, object] = {
        "--kwargs": kwargs,
        "--mesh": rank.mesh,
        "--tp-plan": rank.tp_plan,
    }
    options |= {"--train": rank.train, "--batch": rank.batch, "--sequence": rank.sequence}
    options |= {f"--{name}": value for name, value in more.items()}
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{path} is a checkpoint: {', '.join(given)} is for models")


def diff(a: str, b: str, options: Sides) -> Differences:
    """Compare two checkpoints or models."""
    cast = _dtype(options.dtype)
    choice = Choice(options.key, options.prefix, _renamed(options.rename))

    def model(spec: str) -> ComputedReader:
        build = _build(spec, options.kwargs)
        seed_all(options.seed)
        return ComputedReader(_recorded(build), f"{spec} from seed {options.seed}", cast)

    left, right = opened(a, b, model, choice)
    models = any(isinstance(reader, ComputedReader) for reader in (left, right))
    if (options.kwargs or options.dtype) and not models:
        raise typer.BadParameter("--kwargs and --dtype are for models, and these are none")
    return differences(left, right, only=options.only, values=options.values)


def _renamed(pairs: Sequence[str]) -> dict[str, str | None] | None:
    found = [pair.partition("=") for pair in pairs]
    if not all(old and new for old, _, new in found):
        raise typer.BadParameter("--rename is OLD=NEW")
    return {old: new for old, _, new in found} or None


def check(
    spec: str,
    kwargs: str | None,
    seed: int,
    checkpoint: Path | None,
    dtype: str | None,
    rules: str | None,
) -> parity.Parity | Verification:
    """Compare a model, or a checkpoint, with the values of eager construction."""
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


def report(
    spec: str,
    kwargs: str | None,
    output: Path,
    rank: Rank,
    *,
    checkpoint: Path | None,
    seed: int,
    force: bool,
) -> page.Written:
    """Write the page of a model or of a checkpoint."""
    page.check_output(output, force=force)
    path = model_specs.path_named(spec)
    if path is not None:
        _only_of_models(path, kwargs, rank, checkpoint=checkpoint)
        return page.written(page.of_checkpoint(spec, path), output)
    share = _sharing(rank)
    build = _build(spec, kwargs)
    seed_all(seed)
    model = _recorded(build)
    plan = None
    if checkpoint is not None:
        plan = plan_load(model, open_checkpoint(checkpoint), casting(None, None), strict=False)
    shown = page.of_model(spec, model, seed=seed, share=share and share(model), plan=plan)
    return page.written(shown, output)


@unhurried  # full collections took 0.4 of the 2.8 s in which transformers is imported
def _build(spec: str, kwargs: str | None) -> Build:
    with Progress("import", None):
        return _building(model_specs.load_spec(spec, model_specs.parse_kwargs(kwargs)))


def _recorded(build: Build) -> nn.Module:
    with Progress("record", None):
        return deferred_init(build)


def _building(build: Build) -> Build:
    """The same function; errors of the model's constructor become ``ConstructionError``."""

    @functools.wraps(build)
    def building() -> nn.Module:
        try:
            return build()
        except LateinitError:
            raise
        except Exception as error:
            raise ConstructionError from error

    return building


# The short forms that people write, and those of safetensors files.
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
