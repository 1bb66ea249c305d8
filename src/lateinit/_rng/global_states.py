"""The global random generators of torch, numpy and Python."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomStates:
    """The states of the global random generators at construction, for ``restore``."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        self._torch = torch.default_generator.get_state()
        # Reading the states of CUDA would initialise it.
        ready = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if ready else []

    def restore(self) -> None:
        """Put the generators back into the kept states."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.default_generator.set_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def seed_all(seed: int) -> None:
    """Seed every generator that a constructor may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - constructors use the global one; it takes 32 bits
    torch.manual_seed(seed)
