"""Values that leave tensors while a constructor runs, and real data that enters them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from tests.support.cases import Bag, Registry

READS = Registry([])


@READS.case()
def drop_path_rates_by_item():
    rates = [x.item() for x in torch.linspace(0, 0.1, 6)]
    return nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.Dropout(rate)) for rate in rates])


@READS.case()
def drop_path_rates_by_tolist():
    model = nn.Sequential(nn.Linear(3, 2))
    model.rates = torch.linspace(0, 0.3, 5).tolist()
    model.depths = [part.tolist() for part in torch.linspace(0, 1, 4).split([1, 3])]
    return model


@READS.case()
def python_conversions():
    values = torch.arange(1, 5)
    model = Bag(layer=nn.Linear(int(values[2]), len(values)))
    model.truth = bool(values[0] == 1)
    model.real = float(values.float().mean())
    model.complex = complex(torch.tensor(1 + 2j))
    model.iterated = [int(value) for value in values]
    model.index = [10, 20, 30][torch.tensor(1)]
    model.member = 3 in values
    model.formatted = f"{values.sum()} {values[1]:03d}"
    a, b = torch.tensor([3.0, 4.0])
    model.unpacked = (a.item(), float(b))
    return model


@READS.case()
def printed_in_the_constructor():
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 0.25)
    model = Bag(layer=layer, steps=torch.arange(3))
    model.text = [repr(layer.weight), str(model.steps), f"{layer.weight.shape}"]
    return model


@READS.case()
def comparisons_of_tensors():
    layer = nn.Linear(3, 3)
    nn.init.eye_(layer.weight)
    model = Bag(layer=layer)
    model.answers = [
        torch.equal(layer.weight, torch.eye(3)),
        torch.allclose(layer.weight, torch.eye(3) + 1e-9),
        bool((layer.weight == 1).any()),
        torch.isnan(layer.weight).any().item(),
        any(layer.weight is p for p in layer.parameters()),
        bool(layer.weight.sum() > 2),
    ]
    return model


@READS.case()
def shapes_that_depend_on_data():
    mask = torch.tensor([[1, 0, 2], [0, 3, 0]])
    values, counts = torch.unique(torch.tensor([3, 1, 3, 2]), return_counts=True)
    return Bag(
        where=mask.nonzero(),
        rows=torch.where(mask > 0)[0],
        selected=torch.masked_select(mask, mask > 0),
        indexed=mask[mask > 1],
        values=values,
        counts=counts,
        hot=nn.functional.one_hot(torch.tensor([0, 2, 1])),
        repeated=torch.repeat_interleave(torch.arange(3), torch.tensor([1, 0, 2])),
        counted=torch.bincount(torch.tensor([1, 1, 4])),
    )


@READS.case()
def sorting_and_searching():
    values = torch.tensor([0.3, 2.0, -1.0, 5.0, 0.1])
    ordered, order = values.sort()
    edges = torch.linspace(-1, 5, 4)
    return Bag(
        ordered=ordered,
        order=order,
        inverse=torch.argsort(order),
        best=torch.topk(values, 2).indices,
        bucket=torch.bucketize(values, edges),
        place=torch.searchsorted(edges, values, right=True),
        histogram=torch.histc(values, bins=3, min=-1, max=5),
    )


@READS.case()
def window_mask_through_numpy():
    mask = torch.zeros(1, 4, 4, 1)
    for index, part in enumerate((slice(0, 2), slice(2, 4))):
        mask[:, part, part] = index + 1
    windows = mask.numpy().reshape(-1, 4)
    difference = windows[:, None] - windows[:, :, None]
    return Bag(mask=torch.from_numpy(np.where(difference == 0, 0.0, -100.0)))


@READS.case()
def numpy_array_reused_after_from_numpy():
    array = np.arange(6, dtype=np.float32)
    doubled = torch.from_numpy(array) * 2
    array[:] = 7
    tripled = torch.from_numpy(array) * 3
    return Bag(doubled=doubled, tripled=tripled)


@READS.case()
def buffer_on_a_numpy_array():
    array = np.zeros((2, 3), dtype=np.float32)
    table = torch.from_numpy(array)
    array[0] = [1, 2, 3]
    table[1] = 4
    return Bag(table=table, seen=torch.from_numpy(array.copy()))


@READS.case()
def tensor_written_through_its_numpy_view():
    table = torch.zeros(2, 3)
    view = table.numpy()
    view[:] = np.arange(6).reshape(2, 3)
    position = torch.empty(3, 4)
    position.detach().numpy()[...] = np.sin(np.arange(12.0)).reshape(3, 4)
    return Bag(table=table, position=nn.Parameter(position), later=table + 1)


@READS.case()
def arrays_made_of_tensors():
    steps = torch.linspace(0, 1, 5)
    model = Bag(squared=torch.as_tensor(np.asarray(steps) ** 2))
    model.array = np.asarray(steps)
    model.mean = np.mean(steps.numpy()).item()
    return model


@READS.case()
def constants_changed_after_use():
    anchors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    before = anchors * 10
    anchors[0, 0] = 9
    anchors += 1
    return Bag(anchors=anchors, before=before, after=anchors * 10)


@READS.case()
def data_in_many_forms():
    return Bag(
        nested=torch.tensor([[1, 2], [3, 4]]),
        scalar=torch.tensor(3.5),
        cast=torch.tensor([1, 2], dtype=torch.float16),
        of_array=torch.as_tensor(np.array([1.5, 2.5])),
        of_tensor=torch.as_tensor(torch.ones(2)),
        of_list=torch.stack([torch.tensor(1.0), torch.ones(())]),
        of_bytes=torch.frombuffer(bytearray(b"\x01\x02\x03\x04"), dtype=torch.uint8),
        scalar_tensor=torch.scalar_tensor(4),
        of_numpy_scalar=torch.tensor(np.float64(0.1)),
    )


@READS.case()
def rotary_frequencies_not_persistent():
    inverse = 1.0 / (10000 ** (torch.arange(0, 8, 2, dtype=torch.int64).float() / 8))
    angles = torch.outer(torch.arange(6).float(), inverse)
    model = nn.Linear(3, 3)
    model.register_buffer("inv_freq", inverse, persistent=False)
    model.register_buffer("cos", angles.cos().to(torch.bfloat16), persistent=False)
    model.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin(), persistent=False)
    model.original_inv_freq = model.inv_freq
    return model


@READS.case()
def rotary_frequencies_as_complex_exponentials():
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1, 0.01]))
    return Bag(
        polar=torch.polar(torch.ones_like(angles), angles), exponential=torch.exp(1j * angles)
    )


@READS.case()
def sinusoidal_table_written_in_slices():
    table = torch.zeros(10, 6)
    position = torch.arange(10, dtype=torch.float).unsqueeze(1)
    scale = torch.exp(torch.arange(0, 6, 2).float() * (-math.log(10000.0) / 6))
    table[:, 0::2] = torch.sin(position * scale)
    table[:, 1::2] = torch.cos(position * scale)
    return Bag(table=table.unsqueeze(0).transpose(0, 1))


@READS.case()
def relative_position_index():
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij")
    places = torch.stack((rows, columns)).flatten(1)
    offset = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0).contiguous()
    offset[..., 0] += 2
    offset[..., 0] *= 3
    table = nn.Parameter(torch.zeros(int(offset.max()) + 1, 2))
    nn.init.trunc_normal_(table, std=0.02)
    return Bag(index=offset.sum(-1), table=table)


@READS.case()
def causal_and_sliding_masks():
    causal = torch.full((5, 5), float("-inf")).triu_(1)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    near = torch.vmap(lambda i: (i - torch.arange(5)).abs() < 2)(torch.arange(5))
    return Bag(causal=causal, allowed=allowed, near=near, both=allowed & near)


@READS.case()
def written_by_index():
    table = torch.zeros(5, 4)
    table[torch.tensor([0, 2])] = torch.ones(4)
    table[table.sum(1) == 0] = -1
    table.scatter_(1, torch.tensor([[0], [1], [2], [3], [0]]), 7.0)
    table.index_fill_(0, torch.tensor([4]), 3)
    table.masked_fill_(table < 0, 0.5)
    table.index_put_((torch.tensor([1]), torch.tensor([1])), torch.tensor(2.0), accumulate=True)
    return Bag(table=nn.Parameter(table), picked=table.gather(1, torch.zeros(5, 1).long()))


@READS.case(reads_random=True)
def parameter_rescaled_by_what_was_read():
    layer = nn.Linear(6, 5)
    norm = layer.weight.detach().norm().item()
    layer.weight.data.mul_(0.1 / norm)
    return layer
