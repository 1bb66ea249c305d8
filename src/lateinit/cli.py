"""The command ``lateinit``: ``inspect`` a model, ``check`` it, ``init`` a checkpoint; ``info``.

Each command finds the model (``model_specs``), calls the library, and prints text or JSON. Exit
codes: 0, 1 for a difference, 2 for an expected error, 130 for an interrupt. The docstrings of
commands are their help.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console
from torch import nn

from lateinit._checkpoint.api import save_checkpoint
from lateinit._checkpoint.formats import DTYPES
from lateinit._checkpoint.load import Choice
from lateinit._distributed import mesh_cost, training_cost
from lateinit._integrations import model_specs
from lateinit._recording import deferred_init
from lateinit._report import Verification, parity
from lateinit._report.computed import ComputedReader, opened
from lateinit._report.contents import contents
from lateinit._report.differences import differences
from lateinit._report.environment import environment
from lateinit._report.summary import summary
from lateinit._report.verify import verify
from lateinit._rng import seed_all
from lateinit._units import parse_bytes
from lateinit._version import __version__
from lateinit.errors import LateinitError

app = typer.Typer(
    name="lateinit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Deferred initialisation of PyTorch models, bit for bit what eager construction gives.",
)

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="transformers:MODEL_TYPE_OR_CONFIG_JSON, timm:NAME, torchvision:NAME, "
        "package.module:callable or path/file.py:callable",
    ),
]
SpecOrPath = Annotated[
    str,
    typer.Argument(
        metavar="SPEC_OR_PATH",
        help="A model, as for the other commands, or a checkpoint: a .safetensors, .pt, .pth or "
        ".bin file, its index, or a folder",
    ),
]
Kwargs = Annotated[
    str | None,
    typer.Option("--kwargs", metavar="JSON", help="Arguments: '{\"hidden_size\": 64}'"),
]
Seed = Annotated[int, typer.Option("--seed", help="As torch.manual_seed(SEED) before construction")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs")]


def main() -> None:
    """Run the command line."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lateinit {__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    del version
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is built from its description alone
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does


@app.command()
def inspect(  # noqa: PLR0913, PLR0917 - the options of a command
    spec: SpecOrPath,
    kwargs: Kwargs = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="GLOB", help="Only these tensors")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh",
            metavar="AXES",
            help="What a rank of it would hold: fsdp=64,tp=8; also replicate, pp and ep",
        ),
    ] = None,
    tp_plan: Annotated[
        str | None,
        typer.Option("--tp-plan", metavar="JSON", help='How tp cuts: \'{"*.up": "colwise"}\''),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="POLICY",
            help="Add gradients and AdamW's state. recorded: in the model's dtype; "
            "mixed: that, and FSDP2 or autocast computes in bfloat16; bfloat16: all of it; master: "
            "bfloat16 and a float32 copy",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="With --train: sequences of a micro-batch")
    ] = None,
    sequence: Annotated[
        int | None, typer.Option("--sequence", min=1, help="With --batch: tokens of a sequence")
    ] = None,
    recompute: Annotated[
        str, typer.Option("--recompute", help="Activations not kept: none, selective or full")
    ] = "selective",
    as_json: Json = False,
) -> None:
    """Show every tensor of a model and how it is initialised, or what a checkpoint holds.

    Nothing is allocated, and of a checkpoint only headers are read. What exists as a file or a
    folder is a checkpoint; all else is a model.
    """
    with _errors():
        path = model_specs.path_named(spec)
        if path is not None:
            _only_of_models(
                path,
                {
                    "--kwargs": kwargs,
                    "--mesh": mesh,
                    "--tp-plan": tp_plan,
                    "--train": train,
                    "--batch": batch,
                    "--sequence": sequence,
                },
            )
            _show(contents(path, only=only), as_json=as_json)
            return
        axes = None if mesh is None else mesh_cost.parse_mesh(mesh)
        policy = None if train is None else training_cost.policy_named(train)
        computed = _batch(batch, sequence, recompute)
        if computed is not None and policy is None:
            raise typer.BadParameter("--batch goes with --train")
        plan = model_specs.parse_kwargs(tp_plan, "--tp-plan") if tp_plan is not None else None
        model = deferred_init(_build(spec, kwargs))
        if axes is not None:
            share = mesh_cost.share_of_rank(model, axes, plan, policy, computed)
            if as_json:
                _print_json({"spec": spec, **share.to_dict()})
            else:
                typer.echo(f"{spec} on {share}")
            return
        table = summary(model, only=only)
        alone = (
            None if policy is None else mesh_cost.share_of_rank(model, {}, None, policy, computed)
        )
        if as_json:
            training = {} if alone is None else {"training": alone.to_dict()["training"]}
            _print_json({"spec": spec, **table.to_dict(), **training})
        elif _is_terminal():
            Console().print(table)
        else:
            typer.echo(str(table))
        if alone is not None and not as_json:
            typer.echo(alone.training_line)


@app.command()
def check(
    spec: Spec,
    seed: Seed = 0,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Compare this with what the seed gives")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="With --checkpoint: cast, as init --dtype does")
    ] = None,
    kwargs: Kwargs = None,
    as_json: Json = False,
) -> None:
    """Build a model eagerly and deferred from one seed, and compare every bit.

    With --checkpoint, compare the checkpoint with the values of the seed, one tensor at a time.
    """
    cast = _dtype(dtype)
    if cast is not None and checkpoint is None:
        raise typer.BadParameter("--dtype is for --checkpoint")
    with _errors():
        build = _build(spec, kwargs)
        found: parity.Parity | Verification
        if checkpoint is None:
            found = parity.check_parity(build, seed=seed)
        else:
            found = verify(_seeded(build, seed), checkpoint, seed=seed, dtype=cast)
        if as_json:
            _print_json({"spec": spec, **found.to_dict()})
        else:
            typer.echo(f"{spec}: {found}")
        if not found.equal:
            raise typer.Exit(1)


@app.command()
def diff(  # noqa: PLR0913, PLR0917 - the options of a command
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, or a model as for check")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one")],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="GLOB", help="Only these names")
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Compare values, or headers only")
    ] = True,
    key: Annotated[
        str | None, typer.Option("--key", help="Where the state dict is in B: model")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="What B's names begin with: module.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option("--rename", metavar="OLD=NEW", help="A's name for a name of B"),
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of a model: cast, as init --dtype does")
    ] = None,
    kwargs: Kwargs = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints, or a checkpoint with what a seed gives, larger than memory or not.

    Exit status: 0 if they are equal, 1 if they differ, 2 if they cannot be compared.
    """
    cast, choice = _dtype(dtype), Choice(key, prefix, _renamed(rename))
    with _errors():

        def model(spec: str) -> ComputedReader:
            module = _seeded(_build(spec, kwargs), seed)
            return ComputedReader(module, f"{spec} from seed {seed}", cast)

        left, right = opened(a, b, model, choice)
        if (kwargs or dtype) and not any(isinstance(r, ComputedReader) for r in (left, right)):
            raise typer.BadParameter("--kwargs and --dtype are for models, and these are none")
        shown = sys.stderr.isatty()
        found = differences(left, right, only=only, values=values, progress=shown)
        _show(found, as_json=as_json)
        if not found.equal:
            raise typer.Exit(1)


@app.command()
def init(  # noqa: PLR0913, PLR0917 - the options of a command
    spec: Spec,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder to make, or a file: OUT.safetensors")
    ],
    seed: Seed = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Cast floating-point tensors: bfloat16")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Bytes to a file: 2GB, 500MB")
    ] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a killed run")] = False,
    kwargs: Kwargs = None,
    as_json: Json = False,
) -> None:
    """Write an initialised checkpoint, without ever holding the model in memory."""
    cast = _dtype(dtype)
    with _errors():
        build = _build(spec, kwargs)
        saved = save_checkpoint(
            _seeded(build, seed),
            output,
            max_shard_size=_size(max_shard_size),
            dtype=cast,
            force=force,
            resume=resume,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
        if as_json:
            _print_json(
                {
                    "spec": spec,
                    "path": str(saved.path),
                    "files": saved.files,
                    "tensors": saved.tensors,
                    "bytes": saved.nbytes,
                    "seed": seed,
                }
            )
        else:
            typer.echo(str(saved))


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, the processor and which native kernels are used: what a bug report needs."""
    _show(environment(), as_json=as_json)


def _only_of_models(path: Path, options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{path} is a checkpoint: {', '.join(given)} is for models")


def _show(found: Shown, *, as_json: bool) -> None:
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


class Shown(Protocol):
    """What can be printed, for people and for programs."""

    def to_dict(self) -> dict[str, Any]: ...


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    known = {str(d).removeprefix("torch."): d for d in DTYPES if d.is_floating_point}
    if name not in known:
        raise typer.BadParameter(f"--dtype {name} is none of {', '.join(known)}")
    return known[name]


def _batch(size: int | None, length: int | None, recompute: str) -> training_cost.Batch | None:
    if recompute not in training_cost.RECOMPUTED:
        known = ", ".join(training_cost.RECOMPUTED)
        raise typer.BadParameter(f"--recompute {recompute} is none of {known}")
    if (size is None) != (length is None):
        raise typer.BadParameter("--batch and --sequence go together")
    return training_cost.Batch(size, length, recompute) if size and length else None


def _renamed(pairs: list[str] | None) -> dict[str, str | None] | None:
    found = [pair.partition("=") for pair in pairs or ()]
    if not all(old and new for old, _, new in found):
        raise typer.BadParameter("--rename is OLD=NEW")
    return {old: new for old, _, new in found} or None


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(f"--max-shard-size {error}") from error


class _ConstructionError(Exception):
    """A model's own constructor raised."""


def _build(spec: str, kwargs: str | None) -> Callable[[], nn.Module]:
    """What builds a model, with errors of its own told apart from lateinit's."""
    build = model_specs.load_spec(spec, model_specs.parse_kwargs(kwargs))

    @functools.wraps(build)
    def building() -> nn.Module:
        try:
            return build()
        except LateinitError:
            raise
        except Exception as error:
            raise _ConstructionError from error

    return building


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    seed_all(seed)
    return deferred_init(build)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print an expected error on stderr, and exit with 2."""
    try:
        yield
    except LateinitError as error:
        typer.echo(f"lateinit: {error}", err=True)
        raise typer.Exit(2) from error
    except _ConstructionError as error:
        traceback.print_exception(error.__cause__)
        typer.echo("lateinit: the model's constructor raised this", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo("lateinit: interrupted; `init` can be continued with --resume", err=True)
        raise typer.Exit(130) from error


def _print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
