"""Which of torch's functions asks: each is called as torch calls it."""

from __future__ import annotations

import copy
import ctypes
import inspect
import io
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from torch import Tensor, nn
from torch.ao.quantization.quantize import _get_unique_devices_
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional

from lateinit._torch.callers import (
    Asked,
    Meant,
    attention_without_fused_kernel,
    class_of_new_parameter,
    collective_that_compares,
    is_batching,
    is_copying_shallowly,
    is_dcp_writing,
    is_differentiating,
    is_in_torch_optim,
    is_making_parameter,
    is_module_converting,
    is_optimizer_stepping,
    is_pointer_followed,
    is_storage_pickled,
    is_torch_saving,
    is_typed_storage_indexed,
    meant_by_device,
    running_initialiser,
    why_is_meta,
)
from tests.sharding.alone import alone_as
from tests.torch_contract.listeners import Functions, Operators, function_of

OPTIMIZERS = [c for c in vars(torch.optim).values() if inspect.isclass(c)]


class AskedIfMeta(Tensor):
    """Notes why its ``is_meta`` is read."""

    heard: ClassVar[list[Asked]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_meta.__get__:
            AskedIfMeta.heard.append(why_is_meta(args[0]))
        return super().__torch_function__(func, types, args, kwargs or {})


class Noted(nn.Parameter):
    """Notes whether it is an optimizer that reads its gradient or asks if it is a leaf."""

    steps: ClassVar[list[bool]] = []
    leaves: ClassVar[list[bool]] = []

    @property
    def grad(self) -> Any:
        self.note()
        return None

    def note(self) -> None:
        Noted.steps.append(is_optimizer_stepping())

    @property
    def is_leaf(self) -> bool:
        Noted.leaves.append(is_in_torch_optim())
        return True


@pytest.fixture(autouse=True)
def nothing_noted() -> None:
    for noted in (AskedIfMeta.heard, Noted.steps, Noted.leaves):
        noted.clear()


def asked_if_meta(*sizes: int) -> Any:
    return torch.empty(*sizes, device="meta").as_subclass(AskedIfMeta)


def test_loading_asks_a_parameter_whether_it_is_on_meta() -> None:
    """torch/nn/modules/module.py: _load_from_state_dict warns if a copy into meta does nothing."""
    layer = nn.Linear(2, 2, bias=False, device="meta")
    layer.weight = nn.Parameter(asked_if_meta(2, 2))
    with pytest.warns(UserWarning, match="which is a no-op"):
        layer.load_state_dict({"weight": torch.ones(2, 2)})
    assert Asked("load", {}) in AskedIfMeta.heard
    AskedIfMeta.heard.clear()
    assert layer.weight.is_meta
    assert AskedIfMeta.heard == [Asked(None, {})]


class AsksItsDevice(torch.Tensor):
    """Notes whether it is a loading batch norm that reads its device."""

    heard: ClassVar[list[bool]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:
            cls.heard.append(meant_by_device({}, ()))
        return super().__torch_function__(func, types, args, kwargs)


def test_a_batch_norm_asks_for_the_device_of_a_counter_that_a_state_dict_lacks() -> None:
    """torch/nn/modules/batchnorm.py: _NormBase takes the counter that there is, unless on meta."""
    layer = nn.BatchNorm1d(2)
    layer.num_batches_tracked = torch.tensor(3).as_subclass(AsksItsDevice)
    layer.load_state_dict({"weight": torch.ones(2)}, strict=False)
    assert Meant.RECORDED in AsksItsDevice.heard
    AsksItsDevice.heard.clear()
    assert layer.num_batches_tracked.device.type == "cpu"
    assert AsksItsDevice.heard == [Meant.META]


def test_what_a_module_of_torch_needs_that_asks_for_a_device() -> None:
    """torch/distributed/checkpoint, torch/ao, torch/_subclasses and torch/nn/parallel."""
    tensor = torch.ones(2).as_subclass(AsksItsDevice)
    state = {"t": tensor}
    AsksItsDevice.heard.clear()
    planner_helpers._init_state_dict(state)
    assert Meant.RECORDED in AsksItsDevice.heard
    AsksItsDevice.heard.clear()
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(tensor.view(1, 2))
    assert _get_unique_devices_(layer) == {torch.device("cpu")}
    assert set(AsksItsDevice.heard) == {Meant.RECORDED}
    AsksItsDevice.heard.clear()
    with alone_as(0, 1):
        nn.parallel.DistributedDataParallel(layer)
    assert Meant.PARALLEL in AsksItsDevice.heard
    AsksItsDevice.heard.clear()
    torch.distributions.Normal(tensor, 1.0)
    assert set(AsksItsDevice.heard) == {Meant.RECORDED}


def test_fully_shard_asks_if_its_shards_are_on_meta_before_the_first_forward_pass() -> None:
    """torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py: _validate_no_meta_params."""

    class Parameters:
        fsdp_params = (SimpleNamespace(sharded_param=torch.ones(2).as_subclass(AsksItsDevice)),)

    AsksItsDevice.heard.clear()
    FSDPParamGroup._validate_no_meta_params(Parameters())
    assert AsksItsDevice.heard == [Meant.FORWARD]


def test_an_optimizer_moves_the_state_that_it_loads_to_the_device_of_the_weight() -> None:
    """torch/optim/optimizer.py: _process_value_according_to_param_policy."""
    weight = nn.Parameter(torch.ones(2).as_subclass(AsksItsDevice))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    groups = optimizer.state_dict()["param_groups"]
    AsksItsDevice.heard.clear()
    optimizer.load_state_dict({"state": {0: {"sum": torch.ones(2)}}, "param_groups": groups})
    assert set(AsksItsDevice.heard) == {Meant.RECORDED}


class AsksItsDtype(torch.Tensor):
    """Notes what compares its dtype."""

    heard: ClassVar[list[str | None]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.dtype.__get__:
            cls.heard.append(collective_that_compares())
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["all_gather", "gather", "scatter"])
def test_a_collective_compares_the_dtypes_of_a_list_of_lists(name: str) -> None:
    """torch/distributed/distributed_c10d.py: _ensure_all_tensors_same_dtype."""
    tensor, listed = torch.ones(2), torch.ones(2).as_subclass(AsksItsDtype)
    given: dict[str, tuple[Any, Any]] = {
        "all_gather": ([listed], tensor),
        "gather": (tensor, [listed]),
        "scatter": (tensor, [listed]),
    }
    AsksItsDtype.heard.clear()
    with alone_as(0, 1):
        getattr(torch.distributed, name)(*given[name])
    assert name in AsksItsDtype.heard
    AsksItsDtype.heard.clear()
    assert listed.dtype == torch.float32
    assert AsksItsDtype.heard == [None]


class Listening(Tensor):
    """Notes whether who asks for ``is_cpu`` writes a distributed checkpoint, and who detaches."""

    heard: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cpu.__get__:
            cls.heard.append(is_dcp_writing())
        if func is torch.Tensor.detach:
            cls.heard.append(is_making_parameter())
        if func is torch.empty_like:
            cls.heard.append(is_module_converting())
        if func is torch.Tensor.data_ptr:
            cls.heard.append(is_pointer_followed())
        return super().__torch_function__(func, types, args, kwargs or {})

    @property
    def _is_param(self) -> bool:
        return True

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self.heard.append(class_of_new_parameter())


@pytest.fixture
def listening() -> Any:
    Listening.heard.clear()
    return torch.ones(2).as_subclass(Listening)


def test_writing_a_distributed_checkpoint_asks_for_is_cpu(listening: Any, tmp_path: Path) -> None:
    """torch/distributed/checkpoint/filesystem.py: _write_files_from_queue checks each tensor."""
    with alone_as(0, 1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"t": listening}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert True in Listening.heard
    Listening.heard.clear()
    assert listening.is_cpu
    assert Listening.heard == [False]


def test_a_parameter_of_a_tensor_of_another_class_is_its_detached_one(listening: Any) -> None:
    """torch/nn/parameter.py: Parameter.__new__ calls data.detach(), and sets ``_is_param``."""

    class Own(nn.Parameter):
        pass

    nn.Parameter(listening)
    Own(listening)
    listening.detach()
    assert Listening.heard == [True, nn.Parameter, True, Own, False]


def test_to_empty_calls_empty_like_below_apply(listening: Any) -> None:
    """torch/nn/modules/module.py: to_empty is _apply with torch.empty_like."""
    layer = nn.Module()
    layer.register_buffer("t", listening)
    layer.to_empty(device="cpu")
    torch.empty_like(listening)
    assert Listening.heard == [True, False]


def test_following_a_pointer_takes_ctypes(listening: Any) -> None:
    """safetensors/torch.py: _to_ndarray passes data_ptr() to ctypes."""
    assert ctypes.cast(listening.data_ptr(), ctypes.POINTER(ctypes.c_float))[0] == 1.0
    save({"t": listening})
    assert Listening.heard[0] is True
    assert True in Listening.heard[1:]
    Listening.heard.clear()
    address_only(listening)
    assert Listening.heard == [False]


def address_only(tensor: Tensor) -> int:
    return tensor.data_ptr()


class AskedStorage(torch.UntypedStorage):
    heard: ClassVar[list[bool]] = []

    @property
    def device(self) -> torch.device:
        self.heard.append(is_typed_storage_indexed())
        return torch.device("cpu")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_an_element_of_a_typed_storage_is_read_through_a_tensor_on_its_device() -> None:
    """torch/storage.py: _getitem and _setitem make a tensor on the device of the storage."""
    tensor = torch.ones(2)
    storage = tensor.untyped_storage()
    storage.__class__ = AskedStorage
    assert tensor.storage()[0] == 1.0
    assert True in AskedStorage.heard
    AskedStorage.heard.clear()
    tensor.storage()[1] = 2.0
    assert True in AskedStorage.heard
    AskedStorage.heard.clear()
    assert tensor.untyped_storage().device.type == "cpu"
    assert AskedStorage.heard == [False]


def test_an_inverse_asks_where_the_weight_is_and_may_lack_a_kernel_for_meta() -> None:
    """torch/nn/utils/parametrizations.py: _Orthogonal; parametrize.py: ParametrizationList."""

    class Asked(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func == torch.Tensor.device.__get__ and meant_by_device({}, ()) is Meant.INVERSE:
                raise LookupError
            return super().__torch_function__(func, types, args, kwargs)

    layer = nn.Linear(3, 5)
    layer.weight = nn.Parameter(torch.ones(5, 3).as_subclass(Asked))
    assert layer.weight.device.type == "cpu"
    with pytest.raises(LookupError):
        nn.utils.parametrizations.orthogonal(layer)
    with pytest.raises(NotImplementedError):
        torch.geqrf(torch.ones(5, 3, device="meta"))


def test_distributing_asks_for_meta_and_leaves_the_scatter_out_there() -> None:
    """torch/distributed/tensor/_collective_utils.py: mesh_scatter asks its ``output``."""
    with alone_as(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        distribute_tensor(asked_if_meta(4), mesh, [Shard(0)])
        (scatter,) = (asked for asked in AskedIfMeta.heard if asked.why == "scatter")
        assert scatter.given["output"].shape == (2,)
        assert [part.shape for part in scatter.given["scatter_list"]] == [(2,), (2,)]
        assert scatter.given["mesh"].get_local_rank(scatter.given["mesh_dim"]) == 1


@pytest.mark.parametrize("name", ["trunc_normal_", "orthogonal_", "sparse_", "dirac_"])
def test_initialisers_that_do_nothing_on_meta_ask_for_it(name: str) -> None:
    """torch/nn/init.py: ``if tensor.is_meta: return tensor``, or of a view of it."""
    if "is_meta" not in inspect.getsource(nn.init):
        pytest.skip("this torch has none")
    AskedIfMeta.heard.clear()
    arguments = {"sparse_": (0.5,)}.get(name, ())
    shape = (2, 2, 2) if name == "dirac_" else (2, 2)
    getattr(nn.init, name)(asked_if_meta(*shape), *arguments)
    assert Asked("init", {"function": f"nn.init.{name}"}) in AskedIfMeta.heard


def test_an_initialiser_s_arguments_are_the_locals_of_its_frame() -> None:
    """torch/nn/init.py: xavier_normal_ calls _no_grad_normal_, which calls the tensor's normal_."""
    found: list[Any] = []
    tensor = torch.ones(2, 3).as_subclass(type("Asking", (Tensor,), {}))
    ask, names = running_initialiser, {"xavier_normal_": 0, "normal_": 0}
    function = function_of(
        "lateinit", "found.append(ask(names))", found=found, ask=ask, names=names
    )
    type(tensor).normal_ = function
    nn.init.xavier_normal_(tensor, gain=3.0)
    nn.init.normal_(tensor, std=4.0)
    del names["xavier_normal_"]
    nn.init.xavier_normal_(tensor)
    tensor.normal_()
    assert [name for name, _ in found[:3]] == ["xavier_normal_", "normal_", "normal_"]
    assert (found[0][1]["tensor"] is tensor, found[0][1]["gain"], found[1][1]["std"]) == (
        *(True, 3.0),
        4.0,
    )
    assert found[3] is None


def test_a_mode_keeps_attention_off_its_fused_kernel_and_the_frame_says_so() -> None:
    """torch/nn/modules/activation.py: forward has a local ``why_not_fast_path``."""
    layer, x = nn.MultiheadAttention(2, 2, batch_first=True).eval(), torch.ones(1, 3, 2)
    with torch.no_grad():
        with Operators() as fused:
            layer(x, x, x)
        with Functions(attention_without_fused_kernel) as mode, Operators() as plain:
            layer(x, x, x)
            layer.train()(x, x, x)  # for which there is no fused kernel
    assert "aten::_native_multi_head_attention" in fused.heard
    assert "aten::_native_multi_head_attention" not in plain.heard
    heard = zip(mode.heard, mode.answers, strict=True)
    attention = functional.multi_head_attention_forward
    assert [module for func, module in heard if func is attention] == [layer, None]


def test_an_encoder_layer_says_that_a_mode_keeps_it_from_its_kernel() -> None:
    """torch/nn/modules/transformer.py: TransformerEncoderLayer.forward has a kernel of its own."""
    layer = nn.TransformerEncoderLayer(12, 2, 19, batch_first=True).eval()
    x, mask = torch.randn(3, 5, 12), torch.zeros(5, 5)
    with torch.no_grad():
        with Operators() as fused:
            layer(x, mask)
        with Functions(attention_without_fused_kernel) as mode, Operators() as plain:
            layer(x, mask)
    assert "aten::_transformer_encoder_layer_fwd" in fused.heard
    assert "aten::_transformer_encoder_layer_fwd" not in plain.heard
    assert layer in mode.answers


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_s_save_pickles_from_a_function_of_its_own(zipped: bool) -> None:
    """torch/serialization.py: _save and _legacy_save call the pickler, whose frames are in C."""
    found: list[bool] = []

    class Saved:
        def __reduce_ex__(self, _: Any) -> Any:
            found.append(is_torch_saving())
            return list, ()

    torch.save({"a": Saved()}, io.BytesIO(), _use_new_zipfile_serialization=zipped)
    pickle.dumps(Saved())
    assert found == [True, False]


def test_tensor_that_is_pickled_asks_for_its_storage() -> None:
    """torch/_tensor.py: _reduce_ex_internal asks for it by way of _typed_storage."""
    found = []

    class Storages(Functions):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is Tensor.untyped_storage:
                found.append(is_storage_pickled())
            return func(*args, **(kwargs or {}))

    with Storages():
        torch.ones(2).untyped_storage()
        torch.ones(2)._typed_storage()
        pickle.dumps(torch.ones(2))
        torch.save([nn.Parameter(torch.ones(2))], io.BytesIO())
        copy.copy(torch.ones(2))
    assert found == [False, False, True, True, False]


def test_shallow_copy_of_a_tensor_pickles_it() -> None:
    """copy.py: copy() calls ``__reduce_ex__``, since torch.Tensor has no ``__copy__``."""
    found = []

    class Copied(Tensor):
        def __reduce_ex__(self, proto: Any) -> Any:
            found.append(is_copying_shallowly())
            return super().__reduce_ex__(proto)

    copy.copy(torch.ones(2).as_subclass(Copied))
    torch.ones(2).as_subclass(Copied).__reduce_ex__(2)
    assert found == [True, False]


@pytest.mark.parametrize("optimizer", [c for c in OPTIMIZERS if c is not torch.optim.Optimizer])
def test_every_optimizer_reads_gradients_in_its_step(optimizer: Any) -> None:
    """torch/optim: ``step`` or ``_init_group`` of each optimizer reads ``grad``."""
    parameter = Noted(torch.ones(2, 2))
    made = optimizer([parameter], lr=0.1)
    assert set(Noted.leaves) == {True}  # torch/optim/optimizer.py: add_param_group asks is_leaf
    assert parameter.is_leaf
    assert Noted.leaves[-1] is False
    made.zero_grad()
    assert True not in Noted.steps
    made.step(*[lambda: torch.ones(())] * (optimizer is torch.optim.LBFGS))
    assert True in Noted.steps


class Asking(torch.Tensor):
    """Notes who asks for its number of dims, and who multiplies."""

    asked: ClassVar[list[bool]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.dim:
            cls.asked.append(is_batching())
        if func is torch.Tensor.mul:
            cls.asked.append(is_differentiating())
        return super().__torch_function__(func, types, args, kwargs or {})


def test_vmap_asks_for_the_dims_of_what_it_wraps() -> None:
    """torch/_functorch/vmap.py: _process_batched_inputs, the only call before it is wrapped."""
    Asking.asked = []
    tensor = torch.ones(3, 4).as_subclass(Asking)
    tensor.dim()
    torch.vmap(torch.neg)(tensor)
    assert (Asking.asked[0], Asking.asked[1]) == (False, True)


def test_what_torch_func_differentiates_is_called_below_its_transforms() -> None:
    """torch/_functorch/eager_transforms.py: grad_and_value_impl calls the function."""
    Asking.asked = []
    constant = torch.ones(4).as_subclass(Asking)
    constant.mul(2)
    torch.func.grad(lambda x: (x * constant.mul(2)).sum().as_subclass(torch.Tensor))(torch.ones(4))
    assert Asking.asked[:2] == [False, True]


def test_another_library_may_need_the_values_of_what_it_asks_the_device_of() -> None:
    """Told by the name of its module and its local variables."""
    heard: list[Meant] = []
    recorded: list[str] = []

    class Asked(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), named: Any = None
        ) -> Any:
            if func == torch.Tensor.device.__get__:
                values = {__name__: lambda given: "moved" in given}
                heard.append(meant_by_device(values, tuple(recorded)))
            return super().__torch_function__(func, types, args, named or {})

    def move(moved: Tensor) -> torch.device:
        return moved.device

    def ask(tensor: Tensor) -> torch.device:
        return tensor.device

    tensor = torch.ones(1).as_subclass(Asked)
    heard.clear()
    move(tensor)
    ask(tensor)
    recorded.append(__name__)
    ask(tensor)
    assert heard == [Meant.OTHERS, Meant.META, Meant.RECORDED]
    assert [meant for meant in Meant if not meant.needs_values] == [Meant.META, Meant.RECORDED]
