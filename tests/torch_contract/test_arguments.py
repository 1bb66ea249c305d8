"""What the dispatcher hands over, and what may stand on ``meta`` in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lateinit._torch.arguments import (
    META,
    flat,
    has_tensor,
    kwargs_to_meta,
    map_leaves,
    map_tensors,
    tensors_in,
    to_meta,
)
from lateinit._torch.modes import DispatchMode
from lateinit._torch.operators import op_info

aten = torch.ops.aten


class Arguments(DispatchMode):
    """Notes what the dispatcher hands over, and what it is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.args: list[Any] = []
        self.results: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.args.append(args)
        self.results.append(func(*args, **(kwargs or {})))
        return self.results[-1]


def test_a_tensor_on_meta_has_a_layout_and_no_memory() -> None:
    """c10/core/Device.h: meta is a device whose tensors have sizes and strides and no data."""
    tensor = torch.empty_strided((2, 3), (1, 2), device=META)
    assert tensor.is_meta
    assert tensor.device == META == torch.empty(1, device="meta").device
    assert (tensor.stride(), tensor.untyped_storage().data_ptr()) == ((1, 2), 0)


def test_the_dispatcher_hands_tensors_over_alone_or_in_flat_lists() -> None:
    """torch/csrc/utils/python_dispatch.cpp: parseIValuesToPyArgsKwargs makes Tensor[] a list."""
    a, b = torch.ones(2), torch.ones(2)
    index = torch.tensor([0])
    with Arguments() as mode:
        torch.cat((a, b))
        a[None, index]
    cat, (view, indexed) = mode.args[0], (mode.args[1], mode.args[-1])
    assert type(cat[0]) is list
    assert [id(t) for t in tensors_in(cat, {})] == [id(a), id(b)]
    assert [id(t) for t in tensors_in((), {"out": a, "others": [b]})] == [id(a), id(b)]
    assert tensors_in(view, {})[0] is a
    assert indexed[1] == [None, index]
    assert tensors_in(indexed, {})[1:] == [index]


def test_a_fill_has_numbers_after_self_unless_a_tensor_is_copied() -> None:
    """aten/src/ATen/native/native_functions.yaml: ``fill_.Scalar`` and ``fill_.Tensor`` are two."""
    x = torch.ones(2)
    with Arguments() as mode:
        x.fill_(2)
        x.uniform_(0, 1)
        x.fill_(torch.tensor(2.0))
        x.copy_(x)
    found = [has_tensor(args[1:]) for args in mode.args if args[0] is x]
    assert found == [False, False, True, True]


def test_collectives_take_lists_of_lists_of_tensors() -> None:
    """torch/csrc/distributed/c10d/Ops.cpp: ``allgather_(Tensor[][] output_tensors, ...)``."""
    tensors = [torch.ones(1), torch.ones(2), torch.ones(3)]
    nested = ([tensors[:2], [tensors[2]]], {"inputs": (tensors[0],), "op": 1})
    doubled = map_tensors(nested, lambda t: t * 2)
    assert [len(t) for t in tensors_in((doubled[0],), doubled[1])] == [1, 2, 3, 1]
    assert all(t.eq(2).all() for t in tensors_in((doubled[0],), doubled[1]))
    assert doubled[1]["op"] == 1


def test_a_kernel_on_meta_gives_the_layout_that_the_real_one_gives() -> None:
    """torch/_meta_registrations.py: results have the sizes, strides and dtype of real ones."""
    real = (torch.arange(6.0).view(2, 3).t(), [torch.ones(3, 1)], 2, "mean")
    meta = to_meta(real)
    assert meta[2:] == real[2:]
    assert to_meta(meta[0]) is meta[0]
    for func in (lambda a, b: torch.cat([a, *b], 1), lambda a, b: a + b[0], lambda a, b: a.exp()):
        expected, found = func(*real[:2]), func(*meta[:2])
        assert found.is_meta
        assert (found.shape, found.stride(), found.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )


def test_factories_on_meta_take_no_generator_of_another_device_and_no_pinning() -> None:
    """aten/src/ATen/native/TensorFactories.cpp: ``device=`` says where, and only CPU pins."""
    given = {"generator": torch.Generator(), "device": "cpu", "pin_memory": True, "dtype": None}
    changed = kwargs_to_meta(op_info(aten.randn.generator), given)
    assert changed == {"generator": None, "device": META, "dtype": None}
    assert aten.randn.generator([2], **changed).is_meta
    assert kwargs_to_meta(op_info(aten.zeros.default), {})["device"] == META
    # These take the device of their argument.
    like = op_info(aten.zeros_like.default)
    assert kwargs_to_meta(like, {}) == {}
    assert aten.zeros_like.default(torch.empty(2, device=META)).is_meta
    assert kwargs_to_meta(like, {"device": "cpu"}) == {"device": META}


def test_operators_return_a_tensor_a_tuple_a_list_or_none() -> None:
    """torch/csrc/utils/pybind.cpp: several returns are a tuple, and ``Tensor[]`` is a list."""
    x = torch.ones(4)
    results = [
        aten.neg.default(x),
        aten.max.dim(x, 0),
        aten.split.Tensor(x, 2),
        aten._foreach_neg_.default([x]),
        aten.lstm.input(
            x.view(1, 1, 4),
            [torch.zeros(1, 1, 2)] * 2,
            [torch.ones(8, 4), torch.ones(8, 2)],
            False,
            1,
            0.0,
            False,
            False,
            False,
        ),
    ]
    assert [type(result) for result in results] == [torch.Tensor, tuple, list, type(None), tuple]
    assert [len(flat(result)) for result in results] == [1, 2, 2, 1, 3]
    assert flat((x, [x, (None,)])) == (x, x, None)


def test_a_tree_is_mapped_leaf_by_leaf_and_keeps_its_types() -> None:
    """torch/utils/_pytree.py: tree_map goes into lists, tuples and dicts, and into no module."""
    layer = nn.Identity()
    tree = {"a": [1, (2, None)], "b": layer, "size": torch.Size([3])}
    heard: list[Any] = []
    mapped = map_leaves(lambda leaf: heard.append(leaf) or leaf, tree)
    assert mapped == tree
    assert type(mapped["a"][1]) is tuple
    assert layer in heard
    assert map_leaves(str, [1, (2,)], is_leaf=lambda part: part == (2,)) == ["1", "(2,)"]
