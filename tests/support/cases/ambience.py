"""Dtypes, devices, contexts, containers: what surrounds the tensors of a constructor."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from tests.support.cases import Bag, Registry

AMBIENCE = Registry([])


@AMBIENCE.case()
def many_dtypes():
    return Bag(
        float16s=nn.Parameter(torch.randn(5, dtype=torch.float16)),
        bfloat16s=nn.Parameter(torch.randn(20).bfloat16()),
        float64s=nn.Parameter(torch.randn(3, dtype=torch.float64)),
        complexes=nn.Parameter(torch.ones(2, dtype=torch.complex64) * 1j),
        flags=torch.tensor([True, False]),
        small=torch.arange(4, dtype=torch.uint8),
        integers=nn.Parameter(torch.arange(3), requires_grad=False),
        float8s=torch.randn(4).to(torch.float8_e4m3fn),
    )


@AMBIENCE.case()
def cast_by_half():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).half()


@AMBIENCE.case()
def cast_in_turns():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Embedding(3, 2))
    model.to(torch.bfloat16)
    model[1].float()
    model[2].to("cpu", torch.float64)
    nn.init.normal_(model[0].weight)
    return model


@AMBIENCE.case()
def default_dtype_changed_and_restored():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = nn.Linear(4, 3)
        table = torch.arange(0, 6, 2) / 6
        exponents = 10000 ** -torch.linspace(0, 1, 4)
    finally:
        torch.set_default_dtype(before)
    return Bag(layer=layer, table=table, exponents=exponents, after=torch.arange(3) / 2)


@AMBIENCE.case()
def autocast_inside():
    weight = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = weight @ weight
    return Bag(weight=nn.Parameter(weight), product=product)


# torch itself replaces a meta inference parameter on a cast where it keeps a real one.
@AMBIENCE.case(trains=False, loads=False, casts=False)
def inference_mode_inside():
    with torch.inference_mode():
        layer = nn.Linear(3, 3)
        table = torch.randn(4) * 2
    return Bag(layer=layer, table=table)


@AMBIENCE.case()
def gradients_off_and_on():
    with torch.no_grad():
        frozen = nn.Linear(3, 2)
        scaled = frozen.weight * 2
        with torch.enable_grad():
            inner = nn.Parameter(torch.ones(2))
    frozen.requires_grad_(False)
    fixed = nn.Parameter(torch.randn(4), requires_grad=False)
    return Bag(frozen=frozen, scaled=scaled, inner=inner, fixed=fixed)


@AMBIENCE.case(deepcopies=False)
def attribute_that_is_not_a_leaf():
    model = nn.Linear(3, 2)
    model.normalised = model.weight / model.weight.norm(dim=0)
    return model


@AMBIENCE.case()
def plain_tensor_attributes():
    model = nn.Linear(3, 2)
    model.scale = torch.arange(3.0)
    model.shifted = model.scale + torch.randn(3)
    return model


@AMBIENCE.case()
def tensors_in_containers():
    model = nn.Linear(3, 2)
    shared = torch.randn(4)
    model.listed = [torch.ones(2), shared, "text", 3]
    model.loose = [nn.Parameter(torch.randn(3)), nn.Parameter(shared)]
    model.tupled = (torch.randn(2), (shared, None))
    model.keyed = {"a": torch.zeros(1), "deep": {"b": [shared[1:], {"c": torch.randn(5)}]}, 7: 1}
    return model


@AMBIENCE.case()
def parameter_containers():
    return nn.ModuleDict(
        {
            "listed": nn.ParameterList([torch.randn(3), nn.Parameter(torch.ones(2))]),
            "keyed": nn.ParameterDict({"a": torch.randn(2, 3), "b": nn.Parameter(torch.zeros(1))}),
        }
    )


@AMBIENCE.case()
def modules_and_parameters_left_out():
    model = nn.Linear(3, 2, bias=False)
    model.register_buffer("absent", None)
    model.register_parameter("missing", None)
    model.extra = [nn.Linear(2, 2)]
    model.register_buffer("drawn", torch.randn(3), persistent=False)
    return model


class Marked(nn.Parameter):
    """A subclass that a library uses to mark parameters."""


@AMBIENCE.case()
def parameters_with_attributes():
    model = nn.Linear(3, 2)
    model.weight.partition_dim = 0
    model.weight.is_tensor_parallel = True
    model.bias = Marked(torch.randn(2))
    return model


# nn.Buffer is no class of the tensor's: it marks one that a module then registers.
@AMBIENCE.case()
def buffers_by_class():
    model = nn.Module()
    model.kept = nn.Buffer(torch.randn(3))
    model.lost = nn.Buffer(torch.arange(3), persistent=False)
    return model


@AMBIENCE.case()
def legacy_constructors():
    return Bag(
        sized=torch.Tensor(3, 4).fill_(0.5),
        listed=torch.Tensor([1, 2, 3]),
        typed=nn.Parameter(torch.FloatTensor(2, 3).uniform_(-1, 1)),
        longs=torch.LongTensor([4, 5]),
        doubles=torch.DoubleTensor(2).zero_(),
        copied=torch.ones(2).new(3).normal_(),
    )


@AMBIENCE.case()
def tensors_made_from_others():
    like = torch.ones(2, 3, dtype=torch.float64)
    return Bag(
        drawn=like.new_empty(4).normal_(),
        tensor=like.new_tensor([1, 2]),
        zeros=like.new_zeros((2,), dtype=torch.int32),
        ones=like.new_ones(3),
        full=like.new_full((2, 2), 0.1),
        zeros_like=torch.zeros_like(like, dtype=torch.bool),
        full_like=torch.full_like(like, 3, dtype=torch.float32),
        cloned=like.clone(),
        cast=like.to(torch.int64),
        typed=like.type(torch.float16),
        type_as=torch.arange(2).type_as(like),
    )


@AMBIENCE.case()
def device_passed_along():
    layer = nn.Linear(3, 2, device=torch.device("cpu"), dtype=torch.float32)
    device = layer.weight.device
    model = Bag(
        layer=layer,
        zeros=torch.zeros(2, device=device),
        range=torch.arange(3, device="cpu"),
        moved=torch.randn(3).to(device).cpu(),
        like=torch.randn_like(layer.weight, device=device),
    )
    model.devices = [device, str(device), device.type, next(model.parameters()).device]
    return model.to(device)


@AMBIENCE.case()
def initialisation_skipped_on_meta():
    layer = nn.Linear(4, 3)
    probe = torch.empty(1).device
    if layer.weight.is_meta or layer.weight.device.type == "meta" or probe.type == "meta":
        raise RuntimeError("a constructor that was shown the meta device")
    if layer.weight.is_cpu and layer.weight.get_device() == -1 and not layer.weight.is_cuda:
        nn.init.normal_(layer.weight)
    if layer.bias.device == torch.device("cpu"):
        nn.init.ones_(layer.bias)
    return layer


@AMBIENCE.case()
def device_context_inside():
    with torch.device("cpu"):
        layer = nn.Linear(4, 3)
        table = torch.arange(3)
    return Bag(layer=layer, table=table)


# Libraries count parameters this way; what they build is thrown away, and it draws nothing.
@AMBIENCE.case()
def meta_probe_thrown_away():
    with torch.device("meta"):
        probe = nn.Linear(5, 4)
    model = nn.Linear(3, 2)
    model.count = sum(p.numel() for p in probe.parameters())
    model.was_meta = probe.weight.is_meta
    return model


@AMBIENCE.case()
def contexts_on_a_stack():
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        weight = torch.randn(3, 3).triu()
    return Bag(weight=nn.Parameter(weight))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@AMBIENCE.case()
def custom_autograd_function():
    return Bag(weight=nn.Parameter(Doubled.apply(torch.randn(3)).detach()))


@AMBIENCE.case()
def sparse_matrix_on_the_way():
    index = torch.tensor([[0, 1, 2], [2, 0, 1]])
    adjacency = torch.sparse_coo_tensor(
        index, torch.tensor([1.0, 2.0, 3.0]), (3, 3), check_invariants=True
    )
    return Bag(dense=adjacency.to_dense(), product=torch.sparse.mm(adjacency, torch.randn(3, 2)))


@AMBIENCE.case()
class SizeFoundByItsOwnForwardPass(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(self.features(torch.zeros(1, 1, 8, 8)).flatten(1).shape[1], 3)

    def forward(self, image):
        return self.head(self.features(image).flatten(1))


@AMBIENCE.case()
def statistics_by_a_forward_pass():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    return norm.eval()
