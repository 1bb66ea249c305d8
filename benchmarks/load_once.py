"""One way to load a checkpoint, in a process of its own.

``python -m benchmarks.load_once WAY MODEL PATH [tiny]`` prints, as JSON, the seconds until there is
a model, the seconds until each of its bytes has been read too, the growth of the resident memory
at its highest, and a sum of the bits of every tensor.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, load_model

import lateinit
from benchmarks.contenders import deferred, eager, init_empty_weights, meta
from benchmarks.harness import tensors
from benchmarks.memory import forget, highest, resident
from benchmarks.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Make = Callable[[], nn.Module]


def ours(make: Make, path: str) -> nn.Module:
    model = deferred(make)
    lateinit.load_checkpoint(model, path)
    return model


def eager_and_state_dict(make: Make, path: str) -> nn.Module:
    model = eager(make)
    model.load_state_dict(load_file(path))
    return model


def eager_and_load_model(make: Make, path: str) -> nn.Module:
    model = eager(make)
    load_model(model, path)
    return model


def meta_and_assign(make: Make, path: str) -> nn.Module:
    model = meta(make)
    model.load_state_dict(load_file(path), assign=True)
    return model


def accelerate(make: Make, path: str) -> nn.Module:
    from accelerate import load_checkpoint_and_dispatch  # noqa: PLC0415 - slow to import

    return load_checkpoint_and_dispatch(init_empty_weights(make), path, device_map={"": "cpu"})


WAYS: dict[str, Callable[[Make, str], nn.Module]] = {
    "ours": ours,
    "eager, load_state_dict": eager_and_state_dict,
    "eager, safetensors load_model": eager_and_load_model,
    "meta, load_state_dict(assign=True)": meta_and_assign,
    "accelerate load_checkpoint_and_dispatch": accelerate,
}


def bits(tensor: torch.Tensor) -> str:
    """A sum of the bits, which reads each of them once."""
    if tensor.is_meta:
        return "on meta"
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 4 * 4
    return f"{int(flat[:whole].view(torch.int32).sum())} {int(flat[whole:].sum())}"


def main(way: str, model: str, path: str, size: str = "") -> None:
    warnings.simplefilter("ignore")
    MODELS[model](tiny=True)  # imports what is imported late
    small = torch.nn.Linear(2, 2)
    small_path = f"{path}.{way.partition(',')[0].split()[0]}.warm.safetensors"
    lateinit.save_checkpoint(small, small_path, force=True)
    WAYS[way](lambda: torch.nn.Linear(2, 2), small_path)
    gc.collect()
    forget()
    before, started = resident(), time.perf_counter()
    built = WAYS[way](lambda: MODELS[model](tiny=size == "tiny"), path)
    usable = time.perf_counter() - started
    sums = {name: bits(tensor) for name, tensor in tensors(built)}
    read = time.perf_counter() - started
    peak = max(highest(), resident()) - before
    print(json.dumps({"usable": usable, "read": read, "peak": peak, "bits": sums}))


if __name__ == "__main__":
    main(*sys.argv[1:])
