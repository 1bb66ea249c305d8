"""Tensors that share objects or storage, and layouts that are not plain."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.cases import Bag, Registry

ALIASES = Registry([])


@ALIASES.case()
def one_parameter_under_two_names():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    return model


@ALIASES.case()
def one_module_under_two_names():
    block = nn.Linear(4, 4)
    return nn.Sequential(block, nn.ReLU(), block)


@ALIASES.case()
def two_parameters_on_one_storage():
    weight = torch.randn(6, 4)
    return Bag(rows=nn.Parameter(weight), columns=nn.Parameter(weight.T))


@ALIASES.case()
def buffer_viewing_a_parameter():
    layer = nn.Linear(5, 4)
    layer.register_buffer("diagonal", layer.weight.detach().diagonal())
    layer.register_buffer("last_row", layer.weight.data[-1])
    return layer


@ALIASES.case()
def views_that_overlap_in_part():
    base = torch.randn(10)
    model = Bag(head=base[:6], tail=base[4:], every_third=base[1::3])
    model.head.mul_(2)
    model.tail.add_(1)
    return model


@ALIASES.case()
def packed_projection_split_into_views():
    packed = nn.Parameter(torch.empty(12, 4))
    query, key, value = packed.detach().chunk(3)
    nn.init.xavier_uniform_(query)
    nn.init.normal_(key)
    value.fill_(0.5)
    return Bag(packed=packed, value=value)


@ALIASES.case()
def storage_set_from_another_tensor():
    source = torch.randn(8)
    replaced = torch.empty(0)
    replaced.set_(source)
    strided = torch.empty(0)
    strided.set_(source.untyped_storage(), 2, (2, 2), (3, 1))
    source.mul_(3)
    return Bag(source=source, replaced=replaced, strided=strided)


@ALIASES.case()
def data_written_through():
    layer = nn.Linear(4, 3)
    layer.weight.data.normal_(0, 0.1)
    layer.weight.data[0] = 1
    layer.weight.data[:, 1:3].mul_(5)
    layer.bias.detach().uniform_(-1, 1)
    return layer


@ALIASES.case()
def data_replaced():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight.data = torch.randn(3, 4)
    model[1].weight.data = model[1].weight.data.double().mul(2).float()
    model[2].weight.data = torch.zeros(5, 2)
    return model


@ALIASES.case()
def two_parameters_tied_through_data():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    model[0].weight.data.mul_(2)
    return model


@ALIASES.case(loads=False)
def buffer_expanded_with_stride_zero():
    row = torch.arange(4.0)
    return Bag(mask=row.expand(3, 4), fresh=torch.randn(1).expand(5))


@ALIASES.case()
def strides_that_are_not_contiguous():
    base = torch.randn(4, 6, 5)
    return Bag(
        permuted=nn.Parameter(base.permute(2, 0, 1).clone(memory_format=torch.preserve_format)),
        sliced=nn.Parameter(torch.randn(6, 8)[::2, 1:5]),
        strided=torch.as_strided(torch.arange(12.0), (3, 2), (1, 4), 2),
        empty_strided=torch.empty_strided((3, 4), (1, 3)).normal_(),
        flipped=base.flip(0),
        unfolded=torch.arange(6.0).unfold(0, 3, 2).contiguous(),
    )


@ALIASES.case()
def shapes_changed_in_place():
    weight = torch.randn(4, 3)
    weight.t_()
    other = torch.arange(6.0)
    other.unsqueeze_(0).resize_(2, 3).transpose_(0, 1)
    grown = torch.ones(2)
    grown.resize_(5).fill_(0.25)
    return Bag(weight=nn.Parameter(weight), other=other, grown=grown)


@ALIASES.case()
def conjugate_and_negative_views():
    values = torch.complex(torch.randn(4), torch.randn(4))
    return Bag(
        conjugate=values.conj(),
        imaginary=values.conj().imag,
        pairs=torch.view_as_real(values),
        parameter=nn.Parameter(values.conj()),
    )


@ALIASES.case()
def dtype_reinterpreted():
    values = torch.randn(4)
    return Bag(values=values, bits=values.view(torch.int32), halves=values.view(torch.int16))


@ALIASES.case()
def empty_and_scalar_tensors():
    return Bag(
        nothing=nn.Parameter(torch.empty(0)),
        no_rows=nn.Parameter(torch.randn(0, 3)),
        scale=nn.Parameter(torch.tensor(2.6592)),
        drawn=nn.Parameter(torch.randn(())),
        step=torch.zeros((), dtype=torch.long),
    )


@ALIASES.case()
def out_arguments():
    total = torch.empty(4)
    torch.randn(4, out=total)
    index = torch.empty(0, dtype=torch.long)
    torch.arange(3, out=index)
    doubled = torch.empty(4)
    torch.add(total, total, out=doubled)
    return Bag(total=total, index=index, doubled=doubled)


@ALIASES.case()
def lists_of_tensors_updated_together():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        torch._foreach_mul_(list(layers.parameters()), 0.5)
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(layers.parameters()) + 1, layers.parameters()
        )
    return layers


@ALIASES.case()
def addresses_compared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(model[0].weight.detach())
    addresses = [layer.weight.data_ptr() for layer in model]
    model.apart = addresses[0] != addresses[1]
    model.together = addresses[0] == addresses[2]
    model.distinct = len({p.untyped_storage().data_ptr() for p in model.parameters()})
    return model
