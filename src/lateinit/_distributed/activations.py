"""The memory that a model keeps for its backward pass, found by a forward pass on shapes alone.

The tensors that autograd saves are counted on ``meta``, where nothing is computed. Each storage
counts once, parameters and buffers not at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lateinit._distributed.training_cost import Batch
from lateinit._torch import flat, storage_key


def activations_of(
    model: nn.Module, batch: Batch, dtype: torch.dtype | None, layers: str | None
) -> int:
    """The bytes that a forward pass of a batch of tokens keeps, on one device.

    Args:
        model: a module that takes token ids, deferred or real; it is not changed.
        batch: the batch of one forward pass.
        dtype: the dtype of floating-point tensors in the computation; None for their own.
        layers: the name of the list of layers, with a final dot; None without one.

    Raises:
        Exception: any error that the model raises for token ids without values.
    """
    parameters = {name: _stand_in(p, dtype) for name, p in model.named_parameters()}
    buffers = {name: _stand_in(b, dtype) for name, b in model.named_buffers()}
    tally = _Tally([*parameters.values(), *buffers.values()])
    ids = torch.zeros(batch.size, batch.length, dtype=torch.int64, device="meta")
    known = inspect.signature(model.forward).parameters
    # With labels, models of `transformers` compute their loss too, which keeps the logits.
    given = {"labels": ids} if "labels" in known else {}
    attention = nullcontext() if batch.recompute == "none" else _FusedAttention()
    with (
        torch.enable_grad(),
        _in_layers(model, layers, tally),
        saved_tensors_hooks(tally.save, lambda saved: saved),
        attention,
    ):
        result = functional_call(model, {**parameters, **buffers}, (ids,), given)
    del result
    return tally.recomputed() if batch.recompute == "full" else tally.total()


def _stand_in(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = dtype if tensor.is_floating_point() else None
    made = torch.empty(tensor.shape, dtype=cast or tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad)


class _Tally:
    """The storages that are kept, each by its key, with its bytes and the layer that saved it."""

    def __init__(self, own: list[Tensor]) -> None:
        self._own = {storage_key(t.untyped_storage()) for t in own}
        self._kept: dict[int, tuple[torch.UntypedStorage, str]] = {}
        self._inputs: dict[int, int] = {}
        self.layer = ""

    def save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_key(storage) not in self._own:
            # Keep the storage itself alive, so that its address is not reused.
            self._kept.setdefault(storage_key(storage), (storage, self.layer))
        return tensor

    def enter(self, layer: str, inputs: Any) -> None:
        """Note that a layer begins."""
        self.layer = layer
        for tensor in flat(inputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                storage = tensor.untyped_storage()
                self._inputs[storage_key(storage)] = storage.nbytes()

    def total(self) -> int:
        """The bytes that are kept."""
        return sum(storage.nbytes() for storage, _ in self._kept.values())

    def recomputed(self) -> int:
        """The bytes kept if each layer keeps only its inputs and is recomputed in backward."""
        layers: dict[str, int] = {}
        for key, (storage, layer) in self._kept.items():
            if key not in self._inputs:
                layers[layer] = layers.get(layer, 0) + storage.nbytes()
        outside = layers.pop("", 0)
        return outside + sum(self._inputs.values()) + max(layers.values(), default=0)


@contextmanager
def _in_layers(model: nn.Module, path: str | None, tally: _Tally) -> Iterator[None]:
    """Tell the tally when a layer runs."""
    hooks = []
    layers = [] if path is None else list(model.get_submodule(path.removesuffix(".")).children())
    for number, layer in enumerate(layers):

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = str(number)) -> None:
            del module
            tally.enter(name, [*args, *kwargs.values()])

        def after(module: nn.Module, args: Any, result: Any) -> None:
            del module, args, result
            tally.layer = ""

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _FusedAttention(TorchFunctionMode):
    """Function mode: attention on ``meta`` saves the tensors that a fused kernel would save."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Shapes and saved tensors of aten::_scaled_dot_product_flash_attention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The log of each row's sum is in float32 (aten/src/ATen/native/transformers).
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # The result is laid out as (batch, length, heads, head), so that a model which joins the
        # heads again makes no copy.
        shape = (*query.shape[:-1], value.shape[-1])
        result = query.new_empty(shape)
        if len(shape) == 4:
            batch, heads, length, head = shape
            result = query.new_empty(batch, length, heads, head).transpose(1, 2)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("nothing is computed on shapes")
