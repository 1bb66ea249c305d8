"""The page as one HTML file, which cannot access the network.

A Content-Security-Policy in its head forbids that: scripts run only if their hash is in the policy,
and nothing is fetched. So markup in a name of a checkpoint would have no effect even if it were not
escaped. Names are escaped too: Python uses ``html.escape``, and ``page.js`` makes text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from lateinit._checkpoint.load import Loaded
from lateinit._distributed.mesh_cost import Share
from lateinit._distributed.training_cost import Training
from lateinit._integrations.plotly import plotly_js
from lateinit._report.page.content import Content
from lateinit._report.page.histograms import Histogram
from lateinit._units import format_bytes
from lateinit.errors import OutputError, OutputExistsError


def check_output(path: Path, *, force: bool) -> None:
    """Raise if the page could not be written; called before anything is computed.

    Raises:
        OutputExistsError: there is a file already, and no ``force``.
        OutputError: plotly is not installed, or the folder is missing or not writable.
    """
    plotly_js()
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file, such as {path / 'report.html'}")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is no regular file: name another --output")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists: give --force to replace it, or another --output")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: no permission in {path.parent}")


@dataclass(frozen=True, slots=True)
class Written:
    """The page that was written; ``print`` it."""

    path: Path
    nbytes: int
    tensors: int

    def __str__(self) -> str:
        tensors = f"{self.tensors:,} tensor{'s' * (self.tensors != 1)}"
        return f"{self.path}: {tensors}, {format_bytes(self.nbytes)}; open it in a browser"


def written(content: Content, path: Path) -> Written:
    """Write the page, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    # File names may hold bytes that are no text (PEP 383) and cannot be encoded as UTF-8.
    encoded = page_of(content).encode("utf-8", "xmlcharrefreplace")
    # Through symbolic links, so that the rename replaces the page and not a link to it.
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        try:
            beside.write_bytes(encoded)
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    return Written(path, len(encoded), len(content.lines))


def page_of(content: Content) -> str:
    """The page, as HTML."""
    scripts = [plotly_js(), _own("page.js")]
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(_data(content), separators=(",", ":"), allow_nan=False)
    # In a script element only `</script` and `<!--` have a meaning: without `<` neither can occur.
    data = data.replace("<", "\\u003c")
    plotly, own = (f"<script>{script}</script>" for script in scripts)
    title = escape(content.title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{_own("page.css")}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{escape(content.subtitle)}</p>
{_facts(content.facts)}
</header>
<noscript><p>The treemap, the histograms and the table need JavaScript.</p></noscript>
<main>
{"" if content.share is None else _share(content.share)}
{"" if content.loaded is None else _loaded(content.loaded)}
{_BODY}
</main>
<footer>{escape(content.about)}</footer>
<script type="application/json" id="data">{data}</script>
{plotly}
{own}
</body>
</html>
"""


_BODY = """<section id="memory">
<h2>Memory</h2>
<p>Each box is a module or a tensor, as large as its bytes. Click a box to look inside it.</p>
<div class="bar"><div class="choice" id="ways" role="group" aria-label="colour by"></div></div>
<ul class="key" id="legend"></ul>
<div id="treemap"></div>
</section>
<section id="values">
<h2>Values</h2>
<p>Of each tensor a few ranges, each found at its own place without the rest. The tensors of most
memory come first.</p>
<div class="values">
<div><div class="cards" id="cards"></div><button class="more" id="all-cards" hidden></button></div>
<div class="shown"><h3 id="which"></h3><p id="told"></p><p id="moments"></p>
<div id="histogram"></div></div>
</div>
</section>
<section id="tensors">
<h2>Tensors</h2>
<p>Layers that are alike share a line, which opens. A value with \u2248 is of a sample.</p>
<div class="bar"><input type="search" id="filter" aria-label="filter"
placeholder="filter: words of names, dtypes, initialisers"><span id="count"></span></div>
<div class="scroll"><table><thead><tr id="heads"></tr></thead><tbody id="rows"></tbody></table>
</div>
<button class="more" id="all-rows" hidden></button>
</section>"""


def _own(name: str) -> str:
    return resources.files("lateinit._report.page").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data(content: Content) -> dict[str, Any]:
    return {
        "treemap": content.treemap(),
        "lines": [asdict(line) for line in content.lines],
        "histograms": [None if h is None else _shown(h) for h in content.histograms],
        "groups": [
            {
                "name": group.name,
                "members": group.members,
                "seen": group.seen,
                # A group of one tensor has the histogram of its line.
                "histogram": _shown(group.histogram) if len(group.members) > 1 else None,
            }
            for group in content.groups
        ],
    }


def _shown(histogram: Histogram) -> dict[str, Any]:
    numbers = asdict(histogram)
    # JSON has no infinity, which the standard deviation of very large numbers can be.
    return {
        k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in numbers.items()
    }


def _facts(facts: Iterable[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(much)}<small>{escape(remark)}</small></dd></div>"
        for what, much, remark in facts
    )
    return f'<dl class="facts">{cells}</dl>'


def _share(share: Share) -> str:
    """The section on the memory of a rank of a mesh, or of one device in training."""
    rows = [("the model", [("all tensors", share.model_bytes)])]
    if share.mesh:
        held = [
            ("parameters", share.rank_bytes - share.buffer_bytes),
            ("buffers", share.buffer_bytes),
            ("computed whole, for a time", share.whole_bytes),
        ]
        rows.append(("each rank, at most", held))
    if share.training is not None:
        rows.append(("training", _training(share.training, share.buffer_bytes)))
    lines = str(share).splitlines()[1:] if share.mesh else [share.training_line]
    told = [re.split(" {2,}", line, maxsplit=1) for line in lines]
    listed = "".join(f"<dt>{escape(what)}</dt><dd>{escape(much)}</dd>" for what, much in told)
    ranks = math.prod(share.mesh.values())
    axes = " \u00d7 ".join(f"{name} {size}" for name, size in share.mesh.items())
    of = f"{axes}: {ranks:,} rank{'s' * (ranks != 1)}" if share.mesh else "On one device"
    return f"""<section>
<h2>{"Memory of a rank" if share.mesh else "Memory to train"}</h2>
<p>{escape(of)}.</p>
{_bars(rows)}
<dl class="list">{listed}</dl>
</section>"""


def _training(training: Training, buffers: int) -> list[tuple[str, int]]:
    kept = training.activations
    return [
        ("parameters", training.parameters),
        ("buffers", buffers),
        ("gradients", training.gradients),
        ("AdamW", training.optimizer),
        ("gathered layers" if training.sharded else "copies by autocast", training.gathered),
        ("activations", 0 if kept is None else kept.nbytes),
    ]


def _bars(rows: list[tuple[str, list[tuple[str, int]]]]) -> str:
    """A bar for each row, with a part for each of its sizes, and the legend."""
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind, size in parts if size))
    most = max(sum(size for _, size in parts) for _, parts in rows) or 1
    shown = []
    for name, parts in rows:
        track = "".join(
            f'<i style="width:{100 * size / most:.3f}%;background:var(--c{kinds.index(kind)})" '
            f'title="{escape(kind)}: {format_bytes(size)}"></i>'
            for kind, size in parts
            if size
        )
        total = format_bytes(sum(size for _, size in parts))
        shown.append(
            f'<div class="row"><span>{escape(name)}</span><div class="track">{track}</div>'
            f'<span class="size">{total}</span></div>'
        )
    key = "".join(
        f'<li><b style="background:var(--c{number})"></b>{escape(kind)}</li>'
        for number, kind in enumerate(kinds)
    )
    return f'<div class="bars">{"".join(shown)}</div><ul class="key">{key}</ul>'


def _loaded(loaded: Loaded) -> str:
    """The section on the predicted result of loading a checkpoint."""
    kinds = {
        "loaded": loaded.loaded,
        "initialised": loaded.initialised,
        "computed": loaded.computed,
        "unexpected": loaded.unexpected,
    }
    said = {
        "loaded": "have their values from the checkpoint",
        "initialised": "are not in it, and have their initial values",
        "computed": "are in no checkpoint, and computed",
        "unexpected": "are in the checkpoint and not in the model",
    }
    under = f", under {loaded.under!r}" if loaded.under else ""
    blocks = []
    for kind, tensors in kinds.items():
        nbytes = sum(tensor.nbytes for tensor in tensors)
        size = format_bytes(loaded.nbytes if kind == "loaded" else nbytes)  # ties count once
        names = "".join(f"<li>{escape(tensor.name)} {tensor.shape}</li>" for tensor in tensors)
        summary = f"<b>{len(tensors):,} {kind}</b> {said[kind]}, {size}"
        blocks.append(
            f"<details><summary>{summary}</summary><ul>{names}</ul></details>"
            if tensors
            else f"<p>none {kind}</p>"
        )
    return f"""<section>
<h2>What loading does</h2>
<p>{escape(str(loaded.path))}{escape(under)}: {format_bytes(loaded.nbytes)} would be read</p>
{"".join(blocks)}
</section>"""
