"""Ordinary layers, and the structures that torch itself builds around them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.support.cases import Bag, Registry

LAYERS = Registry([])


@LAYERS.case()
def multilayer_perceptron():
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))


@LAYERS.case()
def batch_norm_buffers():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))


@LAYERS.case()
def channels_last_weights():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    )


@LAYERS.case()
def weights_drawn_into_channels_last():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv


@LAYERS.case()
def transposed_and_grouped_convolutions():
    return nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv3d(6, 2, 1), nn.PReLU(3))


@LAYERS.case()
def layers_stacked_by_deepcopy():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


@LAYERS.case()
def multihead_attention_with_separate_projections():
    return nn.MultiheadAttention(8, 2, kdim=6, vdim=5, add_bias_kv=True)


@LAYERS.case()
def recurrent_layers_with_flat_weights():
    return nn.Sequential(
        nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), nn.GRU(4, 3), nn.GRUCell(3, 2)
    )


@LAYERS.case()
def padding_row_zeroed_in_place():
    return nn.Sequential(nn.Embedding(9, 4, padding_idx=3), nn.EmbeddingBag(5, 4, padding_idx=0))


@LAYERS.case()
def bilinear_and_learnt_affine():
    return nn.Sequential(nn.Bilinear(3, 4, 2), nn.LayerNorm((2, 3)), nn.RMSNorm(5))


# The old functions keep the normalised weight as a plain, non-leaf tensor.
@LAYERS.case(deepcopies=False)
def old_weight_norm():
    return nn.Sequential(
        nn.utils.weight_norm(nn.Linear(5, 4)), nn.utils.weight_norm(nn.Conv1d(2, 3, 3), dim=None)
    )


@LAYERS.case()
def old_weight_norm_removed_again():
    return nn.utils.remove_weight_norm(nn.utils.weight_norm(nn.Linear(5, 4)))


@LAYERS.case()
def old_spectral_norm():
    return nn.utils.spectral_norm(nn.Linear(6, 4), n_power_iterations=2)


@LAYERS.case(pickles=False)
def weight_norm_parametrization():
    return parametrizations.weight_norm(nn.Linear(5, 4))


@LAYERS.case(pickles=False)
def spectral_norm_parametrization():
    return parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))


# It asserts that what it drew is orthogonal, which is to read it.
@LAYERS.case(pickles=False, reads_random=True)
def orthogonal_parametrization():
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(6, 3), orthogonal_map="cayley"),
        parametrizations.orthogonal(nn.Linear(3, 5), use_trivialization=False),
    )


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT

    def right_inverse(self, weight):
        return weight.triu()


@LAYERS.case(pickles=False)
def custom_parametrization():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


@LAYERS.case()
def parametrization_removed_again():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return parametrize.remove_parametrizations(layer, "weight")


@LAYERS.case()
def submodule_copied_deeply():
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    nn.init.zeros_(student[0].bias)
    return nn.ModuleDict({"student": student, "teacher": teacher})


@LAYERS.case()
def module_moved_and_registered_again():
    class_head = nn.Linear(4, 3)
    model = Bag(body=nn.Linear(5, 4), head=class_head)
    del model.head
    model.body.head = class_head
    model.body.weight = nn.Parameter(model.body.weight.detach().mul(2))
    model.old_head = model.body.head
    return model


@LAYERS.case()
def hugging_face_style_second_pass():
    model = nn.Sequential(nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 6), nn.LayerNorm(6))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if getattr(module, "padding_idx", None) is not None:
                module.weight.data[module.padding_idx].zero_()
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
    return model


class Recorder:
    """A gradient hook that pickles and copies with the parameter it is on."""

    def __call__(self, gradient):
        return gradient * 2


@LAYERS.case()
def hooks_registered_in_the_constructor():
    layer = nn.Linear(3, 2)
    layer.weight.register_hook(Recorder())
    return layer
