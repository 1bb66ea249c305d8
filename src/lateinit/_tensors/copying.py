"""``copy.deepcopy`` of deferred tensors, and the attributes that copies and pickles carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lateinit._tensors.deferred import Deferred
from lateinit._tensors.slots import is_parameter, original_class
from lateinit._torch import below_python


def copied_by_deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A deferred copy with the layout and sharing that ``copy.deepcopy`` gives a real tensor.

    A parameter is cloned. For any other tensor the whole storage is copied, once per ``memo``, so
    that views of one storage stay views of one storage.
    """
    # torch/_tensor.py: __deepcopy__ clones every meta tensor, which would lose the sharing. The
    # code below follows its steps for a tensor with memory.
    if not tensor.is_leaf:
        raise RuntimeError("only leaf tensors can be deep-copied: detach() this one first")
    with torch.no_grad():
        if is_parameter(tensor):
            data = tensor.detach().clone(memory_format=torch.preserve_format)
            # torch/nn/parameter.py: Parameter.__new__ keeps its own class only on plain tensors.
            with below_python():
                data = data.detach()
            return original_class(tensor)(data, tensor.requires_grad)
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in memo:
            memo[key] = torch.empty(0, dtype=torch.uint8, device="meta").set_(storage).clone()
        copied = Deferred.of(tensor).ref._replace(bits=0).on(memo[key].untyped_storage())
        copied = copied.conj_physical() if tensor.is_conj() else copied
        copied = copied.neg() if tensor.is_neg() else copied
        copied.requires_grad_(tensor.requires_grad)
        copied.__dict__.update(attributes(tensor))
        return copied


def attributes(tensor: Tensor) -> dict[str, Any]:
    """The attributes that users set on a tensor object."""
    return dict(tensor.__dict__)
