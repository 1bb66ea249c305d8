"""What the server of ``processes`` has imported before any script runs."""

import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import torch.testing._internal.distributed.fake_pg  # noqa: F401

import lateinit

lateinit.materialize  # noqa: B018 - imports all that a first use imports
