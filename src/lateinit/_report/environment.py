"""The facts that a bug report needs: the machine, and the installed versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lateinit import _native
from lateinit._torch import without_modes
from lateinit._units import format_bytes
from lateinit._version import __version__

_REQUIRED = ("torch", "numpy", "rich", "typer")
_OPTIONAL = (
    *("accelerate", "diffusers", "lightning", "peft", "pytorch-pfn-extras", "safetensors"),
    *("timm", "torchao", "torchtitan", "torchvision", "transformers"),
)
_PROCESSORS = Path("/proc/cpuinfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions, the processor, and the native kernels with the result of their trials.

    Attributes:
        versions: the versions of lateinit, Python and the packages that lateinit requires.
        optional: the versions of optional packages; None for one that is not installed.
        system: the operating system and the architecture.
        processor: the name of the processor.
        accelerators: the CUDA devices that torch sees, with the CUDA version of torch's build.
        capability: the vector extensions that torch's CPU kernels use.
        threads: the number of threads of torch, and so of ``materialize``.
        cores: the number of cores of the machine.
        memory: the bytes of memory of the machine.
        huge_pages: the kernel's setting for transparent huge pages; None if it has none.
        native: for each native kernel, whether it is used, and why.
    """

    versions: dict[str, str]
    optional: dict[str, str | None]
    system: str
    processor: str
    accelerators: tuple[str, ...]
    capability: str
    threads: int
    cores: int | None
    memory: int
    huge_pages: str | None
    native: dict[str, _native.Verdict]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        native = {name: {"used": v.used, "why": v.why} for name, v in self.native.items()}
        return {**asdict(self), "native": native}

    def __str__(self) -> str:
        rows = {
            **self.versions,
            **{name: version or "not installed" for name, version in self.optional.items()},
            "system": self.system,
            "processor": self.processor,
            "accelerators": ", ".join(self.accelerators) or "none",
            "CPU capability": self.capability,
            "threads": f"{self.threads} of {self.cores} cores",
            "memory": format_bytes(self.memory),
            "huge pages": self.huge_pages or "unknown",
            **{
                f"native {name}": f"{'used' if v.used else 'not used'}: {v.why}"
                for name, v in self.native.items()
            },
        }
        width = max(map(len, rows))
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())


def environment() -> Environment:
    """Collect the facts; native kernels that were not used yet are tried."""
    with without_modes():
        native = _native.verdicts()
    versions = {name: _installed(name) or "unknown" for name in _REQUIRED}
    return Environment(
        versions={"lateinit": __version__, "python": platform.python_version(), **versions},
        optional={name: _installed(name) for name in _OPTIONAL},
        system=platform.platform(),
        processor=_processor(),
        accelerators=_accelerators(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        huge_pages=_HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else None,
        native=native,
    )


def _processor() -> str:
    """The name of the processor on Linux; elsewhere the value of ``platform.processor``."""
    lines = _PROCESSORS.read_text().splitlines() if _PROCESSORS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _accelerators() -> tuple[str, ...]:
    cuda = torch.version.cuda
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return tuple(f"{name} (CUDA {cuda})" for name in names)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
