"""Every recipe of docs/recipes.md does what it shows, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lateinit
from tests.support import processes

ROOT = Path(__file__).parents[1]
SOURCE = str(Path(lateinit.__file__).parents[1])
TEXT = (ROOT / "docs" / "recipes.md").read_text()
# What stands after "python" is the name of the recipe and the libraries that it needs.
FENCE = re.compile(r"^```python ?(?P<said>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {block["said"]: block["code"] for block in FENCE.finditer(TEXT)}
START = BLOCKS.pop("") + BLOCKS.pop("ranks")
END = "\nif dist.is_initialized():\n    dist.destroy_process_group()\n"
# accelerate refuses its FSDP plugin on the CPU; what it does with a model then works there too.
ACCELERATOR = "accelerator = Accelerator(fsdp_plugin=plugin)\n"
ON_CPU = """accelerator = Accelerator(cpu=True)
accelerator.state.distributed_type = "FSDP"
accelerator.state.fsdp_plugin = plugin
"""


@pytest.mark.parametrize("said", sorted(BLOCKS))
def test_a_recipe_does_what_it_shows(said: str, tmp_path: Path) -> None:
    name, _, needed = said.partition(" needs ")
    for library in filter(None, needed.split(", ")):
        if not find_spec(library):
            pytest.skip(f"{library} is not there")
    start = START
    if name in {"fsdp_plugin", "lightning", "fabric"}:  # they begin the group themselves
        start = start[: start.index("dist.init_process_group")]
    code = BLOCKS[said]
    if name == "fsdp_plugin" and not torch.cuda.is_available():
        assert ACCELERATOR in code
        code = code.replace(ACCELERATOR, ON_CPU)
    script = tmp_path / "recipe.py"
    script.write_text(start + code + END)
    own = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    environment = {
        **os.environ,
        **(own if start != START else {}),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")]),
    }
    # A Trainer writes where it is.
    if name == "fsdp_plugin":
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *ranks, str(script)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
    else:
        done = processes.run([str(script)], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_there_are_recipes() -> None:
    assert len(BLOCKS) >= 15
