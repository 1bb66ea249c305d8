"""Initialisers, in torch.nn.init and as models write them by hand."""

from __future__ import annotations

import math

import torch
from torch import nn

from tests.support.cases import Bag, Registry

INITIALISERS = Registry([])


@INITIALISERS.case()
def every_plain_initialiser():
    layers = [nn.Linear(6, 5) for _ in range(8)]
    nn.init.uniform_(layers[0].weight, -0.1, 0.3)
    nn.init.normal_(layers[1].weight, 1.0, 0.02)
    nn.init.constant_(layers[2].weight, 0.3)
    nn.init.xavier_uniform_(layers[3].weight, gain=nn.init.calculate_gain("tanh"))
    nn.init.xavier_normal_(layers[4].weight)
    nn.init.kaiming_uniform_(layers[5].weight, nonlinearity="relu")
    nn.init.kaiming_normal_(layers[6].weight, a=0.1)
    nn.init.ones_(layers[7].weight)
    nn.init.eye_(layers[0].weight)
    return nn.Sequential(*layers)


@INITIALISERS.case()
def orthogonal_matrices():
    layers = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv2d(2, 3, 3))
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=1.4)
    return layers


@INITIALISERS.case()
def sparse_columns_by_randperm():
    layer = nn.Linear(10, 8)
    nn.init.sparse_(layer.weight, sparsity=0.4)
    return layer


@INITIALISERS.case()
def dirac_kernel_element_by_element():
    conv = nn.Conv2d(4, 4, 3, groups=2)
    nn.init.dirac_(conv.weight, groups=2)
    return conv


@INITIALISERS.case()
def truncated_normal_with_wide_bounds():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    for layer in model:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return model


@INITIALISERS.case()
def truncated_normal_that_redraws():
    model = nn.Sequential(*[nn.Linear(16, 12) for _ in range(3)])
    for layer in model:
        nn.init.trunc_normal_(layer.weight, std=1.0, a=-2.0, b=2.0)
    return model


@INITIALISERS.case()
def truncated_normal_in_a_tail():
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 3))
    nn.init.trunc_normal_(model[0].weight, std=1.0, a=2.0, b=3.0)
    return model


@INITIALISERS.case()
def truncated_normal_in_half_precision():
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8)).bfloat16()
    nn.init.trunc_normal_(model[0].weight, std=1.0, a=-1.5, b=1.5)
    nn.init.trunc_normal_(model[1].weight, std=0.02)
    return model


def inverse_error_function_truncated_normal_(tensor, std, low, high):
    bounds = [(1 + math.erf(x / std / math.sqrt(2))) / 2 for x in (low, high)]
    with torch.no_grad():
        tensor.uniform_(2 * bounds[0] - 1, 2 * bounds[1] - 1)
        tensor.erfinv_().mul_(std * math.sqrt(2)).clamp_(min=low, max=high)


@INITIALISERS.case()
def truncated_normal_by_erfinv():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    for layer in model:
        inverse_error_function_truncated_normal_(layer.weight, 0.02, -0.03, 0.03)
    return model


@INITIALISERS.case()
def value_written_from_fan_in():
    weight = nn.Parameter(torch.empty(5, 3))
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    return Bag(weight=weight)


@INITIALISERS.case()
def state_space_matrices():
    steps = torch.exp(torch.rand(6) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    inverse = steps + torch.log(-torch.expm1(-steps))
    decay = torch.arange(1, 5, dtype=torch.float32).repeat(6, 1).contiguous()
    return Bag(bias=nn.Parameter(inverse), decay=nn.Parameter(decay.log()))


@INITIALISERS.case()
def linear_algebra():
    matrix = torch.randn(4, 4)
    symmetric = matrix @ matrix.mT + torch.eye(4)
    left, singular, _ = torch.linalg.svd(matrix)
    q, r = torch.linalg.qr(matrix)
    return Bag(
        left=left,
        singular=nn.Parameter(singular),
        q=q,
        r=nn.Parameter(r),
        inverse=torch.linalg.inv(symmetric),
        eigenvalues=torch.linalg.eigh(symmetric)[0],
        cholesky=torch.linalg.cholesky(symmetric),
        exponential=torch.matrix_exp(matrix - matrix.mT),
    )


@INITIALISERS.case()
def signal_processing():
    window = torch.hann_window(16)
    basis = torch.fft.rfft(torch.eye(8), dim=0)
    spectrum = torch.stft(torch.sin(torch.arange(64.0)), 16, 8, window=window, return_complex=True)
    return Bag(window=window, basis=basis, spectrum=torch.view_as_real(spectrum))


@INITIALISERS.case()
def contractions_and_scans():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    return Bag(
        product=nn.Parameter(torch.einsum("ij,jk->ik", a, b)),
        running=torch.cumsum(a, dim=1),
        scanned=torch.cumprod(torch.rand(5), dim=0),
        kronecker=torch.kron(torch.eye(2), a),
        distance=torch.cdist(a, a),
    )


@INITIALISERS.case()
def positions_resized():
    grid = torch.randn(1, 4, 4, 6).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, size=(7, 5), mode="bicubic", align_corners=False)
    return Bag(position=nn.Parameter(resized.permute(0, 2, 3, 1).flatten(1, 2)))


@INITIALISERS.case()
def matrix_filled_in_a_python_loop():
    table = torch.zeros(4, 4)
    for row in range(4):
        for column in range(4):
            table[row, column] = (row - column) / 4
    return Bag(table=table)
