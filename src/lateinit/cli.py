"""The command ``lateinit``: ``inspect``, ``check``, ``init``, ``diff``, ``report`` and ``info``.

Each command finds the model (``model_specs``), calls the library, and prints text or JSON. Exit
codes: 0, 1 for a difference, 2 for an expected error, 130 for an interrupt. The docstrings of
commands are their help.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lateinit._progress import Working
from lateinit._terminal import Console
from lateinit._version import __version__
from lateinit.errors import LateinitError


def _on_first_use(name: str) -> ModuleType:
    """The module, imported when an attribute of it is first read (a recipe of importlib's page)."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from lateinit import _commands
else:
    _commands = _on_first_use("lateinit._commands")  # needs torch, as no help text does

app = typer.Typer(
    name="lateinit",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Deferred initialisation of PyTorch models, bit for bit what eager construction gives.",
)


def _seed(value: int) -> int:
    """Check that ``torch.manual_seed`` accepts a seed."""
    if not -(2**63) <= value < 2**64:
        raise typer.BadParameter(f"{value} is no seed: torch takes -2**63 to 2**64 - 1")
    return value


def _path(text: str) -> Path:
    """Parse a path, which must not be empty: ``Path("")`` would be the current folder."""
    if not text.strip():
        raise typer.BadParameter("the path is empty: name a file or a folder")
    return Path(text)


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
Rules = Annotated[
    str | None,
    typer.Option(
        "--init", metavar="JSON", help='Initialise by name: \'{"lm_head": "normal(std=0.02)"}\''
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", callback=_seed, help="As torch.manual_seed(SEED) before construction"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs")]


# The options for one rank: its mesh, and how it trains.
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXES",
        help="What a rank of it would hold: fsdp=64,tp=8; also replicate, pp and ep",
    ),
]
TpPlan = Annotated[
    str | None,
    typer.Option("--tp-plan", metavar="JSON", help='How tp cuts: \'{"*.up": "colwise"}\''),
]
Train = Annotated[
    str | None,
    typer.Option(
        "--train",
        metavar="POLICY",
        help="Add gradients and AdamW's state. recorded: in the model's dtype; mixed: that, and "
        "FSDP2 or autocast computes in bfloat16; bfloat16: all of it; master: bfloat16 and a "
        "float32 copy",
    ),
]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="With --train: sequences of a micro-batch")
]
Sequence = Annotated[
    int | None, typer.Option("--sequence", min=1, help="With --batch: tokens of a sequence")
]
Recompute = Annotated[
    str, typer.Option("--recompute", help="Activations not kept: none, selective or full")
]


def main() -> None:
    """Run the command line."""
    # At exit Python collects garbage among all objects, which takes 0.5 s if transformers was
    # imported. The system takes the memory back without that.
    atexit.register(gc.freeze)
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lateinit {__version__} (torch {importlib.metadata.version('torch')})")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version"),
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
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth", min=0, help="Show modules, down to this level, in place of tensors"
        ),
    ] = None,
    mesh: Mesh = None,
    tp_plan: TpPlan = None,
    train: Train = None,
    batch: Batch = None,
    sequence: Sequence = None,
    recompute: Recompute = "selective",
    as_json: Json = False,
) -> None:
    """Show every tensor of a model and how it is initialised, or every tensor of a checkpoint.

    Nothing is allocated, and of a checkpoint only headers are read. An argument that is an existing
    file or folder is a checkpoint; any other is a model.
    """
    rank = _commands.Rank(mesh, tp_plan, train, batch, sequence, recompute)
    with _working():
        found = _commands.inspect(spec, kwargs, only, depth, rank)
    if as_json:
        _print_json({"spec": spec, **found.to_dict()})
    elif mesh is not None:
        typer.echo(f"{spec} on {found}")
    elif _is_terminal():
        Console().print(found)
    else:
        typer.echo(str(found))


@app.command()
def check(
    spec: Spec,
    seed: Seed = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            parser=_path,
            metavar="PATH",
            help="Compare this with what the seed gives",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="With --checkpoint: cast, as init --dtype does")
    ] = None,
    rules: Rules = None,
    kwargs: Kwargs = None,
    as_json: Json = False,
) -> None:
    """Build a model eagerly and deferred from one seed, and compare every bit.

    With --checkpoint, compare the checkpoint with the values of the seed, one tensor at a time.
    """
    with _working():
        found = _commands.check(spec, kwargs, seed, checkpoint, dtype, rules)
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
    """Compare two checkpoints, or a checkpoint with the values of a seed, of any size.

    Exit status: 0 if they are equal, 1 if they differ, 2 if they cannot be compared.
    """
    options = _commands.Sides(only, values, key, prefix, rename or (), seed, dtype, kwargs)
    with _working():
        found = _commands.diff(a, b, options)
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))
    if not found.equal:
        raise typer.Exit(1)


@app.command()
def init(  # noqa: PLR0913, PLR0917 - the options of a command
    spec: Spec,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=_path,
            metavar="PATH",
            help="A folder to make, or a file: OUT.safetensors",
        ),
    ],
    seed: Seed = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help='Cast: bfloat16, or by name: \'{"*norm*": "fp32", "*": "bf16"}\''
        ),
    ] = None,
    rules: Rules = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Bytes to a file: 2GB, 500MB")
    ] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a killed run")] = False,
    kwargs: Kwargs = None,
    as_json: Json = False,
) -> None:
    """Write an initialised checkpoint, without ever holding the model in memory."""
    with _working():
        saved = _commands.init(
            spec,
            kwargs,
            output,
            seed=seed,
            dtype=dtype,
            rules=rules,
            max_shard_size=max_shard_size,
            force=force,
            resume=resume,
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
def report(  # noqa: PLR0913, PLR0917 - the options of a command
    spec: SpecOrPath,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", parser=_path, metavar="PATH", help="The page: report.html"),
    ],
    seed: Seed = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", parser=_path, metavar="PATH", help="Show what loading this would do"
        ),
    ] = None,
    mesh: Mesh = None,
    tp_plan: TpPlan = None,
    train: Train = None,
    batch: Batch = None,
    sequence: Sequence = None,
    recompute: Recompute = "selective",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there")] = False,
    kwargs: Kwargs = None,
) -> None:
    """Write a page to look at: memory, initial values and tensors of a model or a checkpoint.

    The model is not built, and the page needs no network. It is drawn by plotly: pip install
    'lateinit[report]'.
    """
    with _working():
        rank = _commands.Rank(mesh, tp_plan, train, batch, sequence, recompute)
        found = _commands.report(
            spec, kwargs, output, rank, checkpoint=checkpoint, seed=seed, force=force
        )
    typer.echo(str(found))


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, the processor and which native kernels are used: what a bug report needs."""
    with _working():
        found = _commands.info()
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


def _is_terminal() -> bool:
    return sys.stdout.isatty()


@contextlib.contextmanager
def _working() -> Iterator[None]:
    """Show progress; print an expected error on stderr, and exit with 2."""
    try:
        with Working():
            yield
    except KeyboardInterrupt as error:
        typer.echo("lateinit: interrupted; `init` can be continued with --resume", err=True)
        raise typer.Exit(130) from error
    except LateinitError as error:
        typer.echo(f"lateinit: {error}", err=True)
        raise typer.Exit(2) from error
    except _commands.ConstructionError as error:
        traceback.print_exception(error.__cause__)
        typer.echo("lateinit: the model's constructor raised this", err=True)
        raise typer.Exit(2) from error


def _print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
