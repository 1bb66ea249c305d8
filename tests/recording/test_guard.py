"""What is done to deferred tensors below Python code is heard: honoured, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx

import lateinit
from lateinit.errors import DeferredTensorError, LateinitError, RecordingError
from tests.sharding.alone import alone_as
from tests.sharding.placements import line
from tests.torch_contract.listeners import function_of

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "_dtensor")


def layer() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(3, 5)


def is_heard(tensor: Tensor) -> bool:
    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


# Ops that come by other ways than Python's torch functions.


def product(w: Tensor, x: Tensor) -> Tensor:
    return torch.matmul(x, w.t())


def number(w: Tensor, x: Tensor) -> Tensor:
    return x * float(w.detach().sum())


def filled(w: Tensor, x: Tensor) -> Tensor:
    return w.detach().fill_(2.0)


def filled_in_part(w: Tensor, x: Tensor) -> Tensor:
    return w.detach()[1].zero_()


def drawn(w: Tensor, x: Tensor) -> Tensor:
    return w.detach().uniform_()


def loaded(w: Tensor, x: Tensor) -> Tensor:
    return w.detach().copy_(x.new_ones(3))


def scaled(w: Tensor, x: Tensor) -> Tensor:
    return w.mul(2.0).sub(w.t().t())


def viewed(w: Tensor, x: Tensor) -> Tensor:
    return w.t()[1:].reshape(-1)


def without_functions(f: Callable[..., Any]) -> Callable[..., Any]:
    def called(w: Tensor, x: Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return f(w, x)

    return called


def mapped(f: Callable[..., Any]) -> Callable[..., Any]:
    """Over a dim of the input; what does not depend on it comes out once for each."""

    def called(w: Tensor, x: Tensor) -> Any:
        return torch.vmap(lambda row: f(w, row), out_dims=0)(x)

    return called


WAYS = {
    "python": lambda f: f,
    "functions off": without_functions,
    "script": torch.jit.script,
    "vmap": mapped,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "act", [product, number, filled, filled_in_part, drawn, loaded, scaled, viewed]
)
def test_an_op_that_comes_by_any_way_is_honoured_or_refused(act: Any, way: str) -> None:
    x, eager, late = torch.randn(2, 3), layer(), lateinit.deferred_init(layer)
    untouched = eager.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        run = WAYS[way](act)
    try:
        expected = run(eager.weight, x)
    except RuntimeError as error:
        pytest.skip(f"eager cannot do it either: {error}")
    if act in (filled, filled_in_part):
        run(late.weight, x)
        untouched = eager.weight
    elif act in (scaled, viewed):
        found = run(late.weight, x)
        assert lateinit.is_deferred(found)
        assert lateinit.materialize(found.detach()).equal(expected.detach())
    else:
        # TorchScript turns every error into a RuntimeError, and leaves out its message.
        kind, words = (
            (RuntimeError, "TorchScript") if way == "script" else (LateinitError, "weight")
        )
        with pytest.raises(kind, match=words):
            run(late.weight, x)
    assert lateinit.materialize(late).weight.equal(untouched)


packed = nn.utils.rnn.pack_padded_sequence


@pytest.mark.parametrize("cls", [nn.GRU, nn.LSTM, nn.RNN, nn.GRUCell, nn.LSTMCell, nn.RNNCell])
@pytest.mark.parametrize("given", [lambda x: x, lambda x: packed(x, [2, 1])])
def test_a_recurrent_layer_on_real_data_says_that_it_is_deferred(cls: Any, given: Any) -> None:
    late = lateinit.deferred_init(cls, 3, 5)
    x = torch.randn(2, 3) if "Cell" in cls.__name__ else given(torch.randn(2, 2, 3))
    with pytest.raises(DeferredTensorError, match=r"_[ih]h.*lateinit\.materialize"):
        late(x)
    lateinit.materialize(late)(x)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_error_of_torch_stays_if_no_tensor_is_real(mixed: bool) -> None:
    late = lateinit.deferred_init(nn.Conv1d, 3, 3, 2)
    other = torch.ones(1, 3, 4, dtype=torch.int32, device="cpu" if mixed else "meta")
    kind = DeferredTensorError if mixed else RuntimeError
    with pytest.raises(kind, match="should be the same") as raised:
        late(other)
    assert isinstance(raised.value, LateinitError) == mixed


# What torch.nn.utils makes of the weight of a module.


class Padded(nn.Module):
    """A parametrization whose inverse puts a tensor where the weight says that it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :-1]

    def right_inverse(self, w: Tensor) -> Tensor:
        return torch.geqrf(torch.cat([w, torch.zeros(len(w), 1, device=w.device)], 1))[0]


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.abs().log()


parametrized, prune = nn.utils.parametrizations, torch.nn.utils.prune
REWORKED: dict[str, Callable[[nn.Module], Any]] = {
    "orthogonal": parametrized.orthogonal,
    "orthogonal by cayley": partial(parametrized.orthogonal, orthogonal_map="cayley"),
    "orthogonal, from nothing": partial(parametrized.orthogonal, use_trivialization=False),
    "spectral": parametrized.spectral_norm,
    "weight": parametrized.weight_norm,
    "old spectral": nn.utils.spectral_norm,
    "old weight": nn.utils.weight_norm,
    "padded": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Padded()),
    "logarithm": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Logarithm()),
    "smallest": lambda m: prune.l1_unstructured(m, "weight", 0.3),
    "rows": lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
    "drawn": lambda m: prune.random_unstructured(m, "weight", 0.3),
    "drawn rows": lambda m: prune.random_structured(m, "weight", 0.5, 0),
    "mask": lambda m: prune.custom_from_mask(m, "weight", torch.eye(*m.weight.shape)),
    "everywhere": lambda m: prune.global_unstructured(
        [(m, "weight"), (m, "bias")], prune.L1Unstructured, amount=0.2
    ),
    "vector": lambda m: nn.utils.parameters_to_vector(m.parameters()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("rework", REWORKED)
def test_a_weight_is_reworked_as_eagerly_or_left_as_it_was(
    rework: str, shape: tuple[int, int], mixed: bool
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(*shape)

    def parts(m: nn.Module) -> Any:
        # On failure torch/nn/utils/prune.py: apply registers the parameter again, as the last one.
        own = sorted(name for name, _ in (*m.named_parameters(), *m.named_buffers()))
        return own, list(m._forward_pre_hooks), [*map(type, m.modules())]

    eager, late = build(), lateinit.deferred_init(build)
    if mixed:
        lateinit.materialize(late, only="bias")
    before, random = parts(late), torch.get_rng_state()
    REWORKED[rework](eager)
    torch.set_rng_state(random)
    refused = ""
    try:
        REWORKED[rework](late)
    except DeferredTensorError as error:
        refused = str(error)
    if refused:
        assert "'weight'" in refused
        # torch/nn/utils/prune.py: apply registers a mask before it looks at the weight.
        assert parts(late) == before or rework in ("mask", "drawn rows")
        # torch/nn/utils/prune.py: RandomStructured draws before it looks at the weight, and so does
        # _SpectralNorm of parametrizations.py.
        assert torch.get_rng_state().equal(random) or rework in ("drawn rows", "spectral")
        torch.set_rng_state(random)
        REWORKED[rework](lateinit.materialize(late))
    lateinit.materialize(late)
    x = torch.ones(2, shape[0])
    assert late(x).equal(eager(x))
    assert late.state_dict().keys() == eager.state_dict().keys()


@pytest.mark.parametrize("mixed", [None, 0, 1])
@pytest.mark.parametrize("fuse", ["linear", "conv", "transposed"])
def test_a_batch_norm_is_fused_as_eagerly_or_not_at_all(fuse: str, mixed: int | None) -> None:
    kind: Any = {"linear": nn.Linear, "conv": nn.Conv1d, "transposed": nn.ConvTranspose1d}[fuse]

    def build() -> nn.Module:
        torch.manual_seed(1)
        layer = kind(3, 4) if fuse == "linear" else kind(3, 4, 2)
        return nn.Sequential(layer, nn.BatchNorm1d(4)).eval()

    def fused(m: nn.Sequential) -> nn.Module:
        if fuse == "linear":
            return nn.utils.fuse_linear_bn_eval(m[0], m[1])
        return nn.utils.fuse_conv_bn_eval(m[0], m[1], transpose=fuse == "transposed")

    x = torch.ones(2, 3) if fuse == "linear" else torch.ones(2, 3, 4)
    eager, late = build(), lateinit.deferred_init(build)
    expected = fused(eager)(x)
    if mixed is None:
        assert lateinit.materialize(fused(late))(x).equal(expected)
        return
    lateinit.materialize(late[mixed])
    with pytest.raises(DeferredTensorError, match=r"\d\.\w+' .*lateinit\.materialize"):
        fused(late)
    assert fused(lateinit.materialize(late))(x).equal(expected)


def test_gradients_by_functions_are_those_of_the_eager_twin() -> None:
    def loss(w: Tensor) -> Tensor:
        return (w * w).sum()

    expected = torch.func.grad(loss)(layer().weight)
    found = torch.func.grad(loss)(lateinit.deferred_init(layer).weight)
    assert lateinit.materialize(found).equal(expected)


def test_a_model_that_was_scripted_before_it_was_materialised_computes_with_its_values() -> None:
    x, late = torch.randn(2, 3), lateinit.deferred_init(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(late)
    with pytest.raises(RuntimeError, match="TorchScript"):
        scripted(x)
    lateinit.materialize(late)
    for _ in range(3):
        assert scripted(x).equal(layer()(x))
    with torch.no_grad():
        late.weight.zero_()
    assert scripted(x).equal(late.bias.expand(2, 5))


@pytest.mark.parametrize(
    "derive",
    [
        lambda w: w,
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: w.T,
        lambda w: w[1:],
        lambda w: w * 2,
        nn.Parameter,
        lambda w: w.bfloat16(),
        lambda w: w.detach().requires_grad_(),
        torch.vmap(torch.neg),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_derived_from_a_deferred_tensor_is_heard_too(derive: Any, inference: bool) -> None:
    with torch.inference_mode(inference):
        derived = derive(lateinit.deferred_init(layer).weight)
        assert is_heard(derived)
        assert lateinit.is_deferred(derived)
        assert derived.is_inference() == inference
        assert not is_heard(lateinit.materialize(derived))


def test_a_tensor_with_a_graph_keeps_being_no_leaf_and_its_backward_raises() -> None:
    with lateinit.deferred():
        late = layer()
        late.scaled = late.weight * 2
    assert is_heard(late.scaled)
    assert (late.scaled.is_leaf, late.scaled.requires_grad) == (False, True)
    lateinit.materialize(late)
    assert (late.scaled.is_leaf, late.scaled.requires_grad) == (False, True)
    assert late.scaled.equal(layer().weight * 2)
    with pytest.raises(DeferredTensorError, match="graph was not recorded"):
        late.scaled.sum().backward()


@pytest.mark.parametrize(
    "write",
    [
        lambda real, w: real.add_(w.sum()),
        lambda real, w: real[0].copy_(w[0, 0]),
        lambda real, w: real.__setitem__(0, w[0, 0]),
        lambda real, w: torch.add(w[0, 0], 1.0, out=real[0]),
        lambda real, w: torch._foreach_copy_([real[0]], [w[0, 0]]),
        lambda real, w: real[0].lerp_(w[0, 0], 0.5),
        lambda real, w: real[0].fill_(w[0, 0]),
    ],
)
@pytest.mark.parametrize("way", ["python", "functions off"])
def test_deferred_values_are_not_dropped_on_the_way_to_a_real_tensor(write: Any, way: str) -> None:
    real, late = torch.zeros(3), lateinit.deferred_init(layer)
    with pytest.raises(DeferredTensorError, match="'weight'"):
        WAYS[way](lambda w, x: write(x, w))(late.weight.detach(), real)
    assert not real.any()


@pytest.mark.parametrize("name", ["trunc_normal_", "orthogonal_", "sparse_", "normal_"])
def test_an_initialiser_after_the_block_is_refused(name: str) -> None:
    late = lateinit.deferred_init(layer)
    arguments = {"sparse_": (0.5,)}.get(name, ())
    with pytest.raises(DeferredTensorError, match=r"would change .*'weight'"):
        getattr(nn.init, name)(late.weight, *arguments)
    assert lateinit.materialize(late).weight.equal(layer().weight)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_deferred_tensor_is_not_traced_into_a_graph(mode: str) -> None:
    late = lateinit.deferred_init(layer)
    trace = make_fx(late, tracing_mode=mode, _allow_non_fake_inputs=True)
    with pytest.raises(DeferredTensorError, match=r"'weight'|'bias'"):
        trace(torch.ones(1, 3))


def test_questions_that_are_ops_are_answered() -> None:
    weight = lateinit.deferred_init(layer).weight
    assert not weight.is_pinned()
    assert weight.is_same_size(weight.detach())
    assert weight.is_contiguous()


# Classes of tensors.


class Named(Tensor):
    """A plain subclass."""


class Heard(Tensor):
    """Notes the ops on its tensors."""

    ops: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.ops.append(func.name())
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def test_a_tensor_of_another_class_on_the_memory_of_a_deferred_one_is_heard() -> None:
    late = lateinit.deferred_init(layer)
    named = late.weight.detach().as_subclass(Named)
    assert is_heard(named)
    with pytest.raises(DeferredTensorError, match="would change"):
        named.normal_()
    named.mul_(2)
    lateinit.materialize(named)
    assert type(named) is Named
    assert named.equal(layer().weight * 2)
    assert late.bias.as_subclass(Named).requires_grad
    assert type(lateinit.materialize(late).bias.as_subclass(Named)) is Named


def test_a_class_that_hears_ops_hears_them_again_once_its_tensor_is_real() -> None:
    def build() -> nn.Module:
        made = nn.Module()
        made.register_buffer("table", torch.Tensor._make_subclass(Heard, torch.arange(3.0)))
        return made

    late = lateinit.deferred_init(build)
    assert lateinit.is_deferred(late.table)
    lateinit.materialize(late)
    Heard.ops.clear()
    assert type(late.table) is Heard
    assert (late.table + 1).tolist() == [1, 2, 3]
    assert "aten::add.Tensor" in Heard.ops


# Among tensors without values.


@pytest.mark.parametrize("way", ["python", "functions off"])
def test_among_meta_tensors_the_result_is_a_meta_tensor(way: str) -> None:
    late = lateinit.deferred_init(layer)
    found = WAYS[way](product)(late.weight, torch.empty(2, 3, device="meta"))
    assert type(found) is Tensor
    assert (found.shape, found.device.type) == ((2, 5), "meta")
    assert not lateinit.is_deferred(found)


@pytest.mark.parametrize("way", ["python", "functions off"])
@pytest.mark.parametrize("inside", [False, True])
def test_among_fake_tensors_the_result_is_a_fake_tensor(way: str, inside: bool) -> None:
    late, mode = lateinit.deferred_init(layer), FakeTensorMode()
    x = mode.from_tensor(torch.randn(2, 3))
    if inside:
        with mode:
            found = WAYS[way](product)(late.weight, x)
    else:
        found = WAYS[way](product)(late.weight, x)
    assert isinstance(found, torch._subclasses.FakeTensor)
    assert (found.shape, found.device.type) == ((2, 5), "cpu")
    assert lateinit.materialize(late).weight.equal(layer().weight)


@pytest.mark.parametrize("way", ["python", "functions off"])
def test_a_write_from_meta_or_fake_tensors_is_refused(way: str) -> None:
    late = lateinit.deferred_init(layer)
    x = FakeTensorMode().from_tensor(torch.randn(3))
    for source in (x, x.to("meta"), torch.empty(3, device="meta")):
        with pytest.raises(DeferredTensorError, match="'weight'"):
            WAYS[way](lambda w, x: w.detach().add_(x))(late.weight, source)
    assert lateinit.materialize(late).weight.equal(layer().weight)


# Collectives.


def collectives() -> Iterator[Any]:
    """A call of every op of the namespaces, as a function of a tensor and a process group."""
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, rest = name.partition("::")
        if namespace not in COLLECTIVES:
            continue
        base, _, kind = rest.partition(".")
        op = getattr(getattr(getattr(torch.ops, namespace), base), kind or "default")
        kinds = {a.name: str(a.type) for a in op._schema.arguments}
        unmade = any(k.endswith(("ReduceOp", "SymmetricMemory")) for k in kinds.values())
        if not unmade and "Tensor" in str(kinds):
            yield pytest.param(partial(call, op, kinds), id=name)
    # Python cannot make the ReduceOp that these ops take, but the methods of a group can.
    for name, lists in (
        ("allreduce", (1,)),
        ("reduce", (1,)),
        ("allreduce_coalesced", (1,)),
        ("reduce_scatter", (1, 2)),
        ("reduce_scatter_tensor_coalesced", (1, 1)),
        ("_reduce_scatter_base", (0, 0)),
    ):
        yield pytest.param(partial(call_method, name, lists), id=f"ProcessGroup.{name}")


def call(op: Any, kinds: dict[str, str], tensor: Tensor, group: Any) -> None:
    values = {
        "Tensor": tensor,
        "List[Tensor]": [tensor],
        "List[Optional[Tensor]]": [tensor],
        "List[List[Tensor]]": [[tensor]],
        "int": 0,
        "bool": False,
        "str": "sum",
        "Any": "0",
        "List[int]": [0],
        "List[Optional[int]]": [0],
        "List[str]": ["sum"],
        "List[bool]": [False],
    }

    def value(kind: str) -> Any:
        kind = kind.removeprefix("Optional[") + "]" * (kind.count("[") - kind.count("]"))
        kind = kind.removesuffix("]") if kind.count("]") > kind.count("[") else kind
        return group.boxed() if "ProcessGroup" in kind else values[kind]

    keyword = {a.name for a in op._schema.arguments if a.kwarg_only}
    op(
        *(value(kind) for name, kind in kinds.items() if name not in keyword),
        **{name: value(kinds[name]) for name in keyword},
    )


def call_method(name: str, lists: tuple[int, ...], tensor: Tensor, group: Any) -> None:
    getattr(group, name)(*(([tensor], [[tensor]])[n - 1] if n else tensor for n in lists))


@pytest.mark.parametrize("collective", list(collectives()))
@pytest.mark.parametrize("derive", [lambda w: w, lambda w: (w * 1).detach()])
def test_no_collective_takes_a_deferred_tensor(collective: Any, derive: Any) -> None:
    with alone_as(0, 2):
        late = lateinit.deferred_init(layer)
        with pytest.raises(DeferredTensorError, match=r"exchange the values of .*'weight'"):
            collective(derive(late.weight), dist.group.WORLD)
        assert lateinit.materialize(late).weight.equal(layer().weight)


def test_a_collective_in_a_constructor_is_refused() -> None:
    def build() -> nn.Module:
        made = layer()
        dist.broadcast(made.weight.detach(), 0)
        return made

    with alone_as(0, 2), pytest.raises(RecordingError, match="c10d::broadcast_ exchanges values"):
        lateinit.deferred_init(build)


def test_deepspeed_is_told_how_to_partition_a_deferred_model() -> None:
    """deepspeed/runtime/zero/partition_parameters.py: Init has rank 0 send each parameter."""
    zero = "deepspeed.runtime.zero.partition_parameters"
    send = function_of(zero, "broadcast(tensors[0], 0)", broadcast=dist.broadcast, tensors=[])
    recipe = r"partitions real parameters: .* lateinit.materialize\(layer\) and deepspeed\.zero"

    def build() -> nn.Module:
        made = layer()
        send.__globals__["tensors"] = [made.weight.data]
        send()
        return made

    with alone_as(0, 2):
        with pytest.raises(RecordingError, match=recipe):
            lateinit.deferred_init(build)
        late = lateinit.deferred_init(layer)
        send.__globals__["tensors"] = [late.weight.data]
        with pytest.raises(DeferredTensorError, match=rf"'weight' .* with other ranks.*{recipe}"):
            send()


# Shards.


def by_hand(late: nn.Module) -> Any:
    return distribute_tensor(late.weight, line(2), [Shard(0)])


def from_local(late: nn.Module) -> Any:
    return nn.Parameter(DTensor.from_local(late.weight, line(2), [Replicate()]))


def by_fsdp(late: nn.Module) -> Any:
    return fully_shard(late, mesh=line(2)).weight


@pytest.mark.parametrize("shard", [by_hand, from_local, by_fsdp])
@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.fill_(1.0),
        lambda t: t.zero_(),
        lambda t: t.mul_(2.0),
        nn.init.ones_,
        lambda t: t.copy_(t * 2),
        lambda t: t.to_local().fill_(1.0),
        lambda t: t.full_tensor(),
        lambda t: t.redistribute(placements=[Replicate()]).to_local().zero_(),
        lambda t: t._local_tensor.detach().zero_(),
    ],
)
def test_a_write_to_a_shard_is_honoured_or_refused(shard: Any, write: Any) -> None:
    with alone_as(0, 2), torch.no_grad():
        expected, tensor = shard(layer()), shard(lateinit.deferred_init(layer))
        assert is_heard(tensor.to_local())
        try:
            write(tensor)
        except DeferredTensorError as error:
            refused = str(error)
        else:
            refused = ""
            write(expected)
        assert not refused or "'weight'" in refused
        assert lateinit.materialize(tensor, check=False).to_local().equal(expected.to_local())


def test_a_draw_into_a_shard_is_refused() -> None:
    with alone_as(0, 2), torch.no_grad():
        tensor = by_hand(lateinit.deferred_init(layer))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of DTensor, on its random ops on a CPU mesh
            with pytest.raises(DeferredTensorError, match="'weight'"):
                tensor.normal_()
        expected = by_hand(layer()).to_local()
        assert lateinit.materialize(tensor, check=False).to_local().equal(expected)
