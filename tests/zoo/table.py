"""The results as a page."""

from __future__ import annotations

import os
import platform
from collections import Counter
from typing import TYPE_CHECKING

import torch

from tests.zoo.check import DIFFERENT, EQUAL, REFUSED, UNBUILT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.zoo.check import Outcome

INTRODUCTION = """# The zoo

Every model type of `transformers`, its default configuration made small, and what is installed of
diffusers (every model whose arguments all have defaults), peft (every method, on a small GPT-2),
timm (one model of each of its files) and torchvision (one of each family), built eagerly and
deferred from one seed. *Equal* means: every parameter, every buffer (non-persistent ones too) and
every tensor kept as a plain attribute has the same bits, dtype, shape, strides, `requires_grad`,
ties and shared storages; every plain value on the modules is the same; torch's, NumPy's and
Python's random generators end in the same state; and the same again when the tensors are
materialised in four parts, out of order, and by one, two and four threads that fill these small
tensors as they fill large ones. Memory that eager construction leaves unwritten has no
defined bits and is not compared (*undefined*).

Made by `make zoo` (`python -m tests.zoo --help` for parts of it).
"""

WITHOUT = """From its default configuration or one made smaller, with the packages that the
development environment has.
"""


def totals(results: list[Outcome]) -> str:
    """How many of what, as a list."""
    types = {r.model_type for r in results}
    equal = {r.model_type for r in results if r.status == EQUAL}
    wrong = {r.model_type for r in results if r.status not in (EQUAL, UNBUILT)}
    done = [r for r in results if r.status == EQUAL]
    tensors, elements = sum(r.tensors for r in done), sum(r.elements for r in done)
    ops, draws, reads = (sum(getattr(r, k) for r in done) for k in ("ops", "draws", "reads"))
    seconds = {k: sum(getattr(r, k) for r in done) for k in ("eager", "record", "materialize")}
    return f"""- {len(types)} architectures: {len(equal)} are equal to their eager twin, \
{len(wrong)} are not, {len(types - equal - wrong)} cannot be built eagerly either
- {len(results)} classes: {described(Counter(r.status for r in results))}
- {tensors:,} tensors, {elements:,} parameter elements, \
{sum(r.undefined for r in done)} tensors undefined
- {ops:,} ops recorded, {draws:,} of them random; {reads} random values read by \
{sum(r.reads > 0 for r in done)} constructors
- {seconds["eager"]:.1f} s to build them eagerly, {seconds["record"]:.1f} s to record, \
{seconds["materialize"]:.1f} s to materialise"""


def described(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.most_common())


def page(results: list[Outcome]) -> str:
    """The whole page, as Markdown."""
    wrong = [r for r in results if r.status not in (EQUAL, UNBUILT)]
    unbuilt = [r for r in results if r.status == UNBUILT]
    parts = [
        INTRODUCTION,
        f"Measured with {machine()}.\n",
        totals(results) + "\n",
        "## What cannot be deferred\n",
        reasons(wrong) if wrong else "Nothing.\n",
        "## What cannot be built eagerly\n",
        WITHOUT,
        reasons(unbuilt),
        "## Results\n",
        table(
            [r for r in results if r.status in (EQUAL, DIFFERENT, REFUSED)],
            COLUMNS,
        ),
    ]
    return "\n".join(parts)


def machine() -> str:
    import transformers

    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, one thread "
        "to a model"
    )


def reasons(results: list[Outcome]) -> str:
    return table(
        results,
        {
            "model type": lambda r: f"`{r.model_type}`",
            "class": lambda r: r.name,
            "reason": lambda r: r.detail,
        },
    )


COLUMNS: dict[str, Callable[[Outcome], str]] = {
    "model type": lambda r: f"`{r.model_type}`",
    "class": lambda r: r.name,
    "result": lambda r: r.status,
    "made smaller by": lambda r: r.recipe,
    "elements": lambda r: f"{r.elements:,}",
    "tensors": lambda r: str(r.tensors),
    "undefined": lambda r: str(r.undefined or ""),
    "ops": lambda r: str(r.ops),
    "draws": lambda r: str(r.draws),
    "random reads": lambda r: str(r.reads or ""),
    "eager (ms)": lambda r: f"{1000 * r.eager:.0f}",
    "record (ms)": lambda r: f"{1000 * r.record:.0f}",
    "materialise (ms)": lambda r: f"{1000 * r.materialize:.0f}",
}


def table(results: Iterable[Outcome], columns: dict[str, Callable[[Outcome], str]]) -> str:
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[cell(result) for cell in columns.values()] for result in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
