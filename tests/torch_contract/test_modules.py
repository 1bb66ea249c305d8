"""The dictionaries of ``nn.Module``, and the hooks that hang on them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lateinit._torch.modules import (
    ALLOWED_OF_PLACEHOLDERS,
    OWN_ATTRIBUTES,
    REGISTRATION_HOOKS,
    before_call,
    copy_into_state_dict,
    has_load_hook,
    load_state_dict_first,
    load_with_counter,
    name_of_class,
    not_persistent,
    own_buffers,
    own_modules,
    own_parameters,
    remove_hook,
    replace_forward_pre_hook,
)


def layer_with_all() -> nn.Module:
    layer = nn.Module()
    layer.register_parameter("none", None)
    layer.weight = layer.tied = nn.Parameter(torch.ones(1))
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("lost", torch.ones(1), persistent=False)
    layer.child = nn.Linear(1, 1)
    layer.register_module("nobody", None)
    return layer


def test_a_module_s_dict_has_torch_s_plumbing_and_what_its_class_sets() -> None:
    """torch/nn/modules/module.py: __init__ sets the same attributes for every module."""
    assert {"training", "_parameters", "_forward_hooks"} <= OWN_ATTRIBUTES
    assert vars(nn.Linear(1, 1)).keys() - OWN_ATTRIBUTES == {"in_features", "out_features"}
    assert vars(layer_with_all()).keys() >= OWN_ATTRIBUTES


def test_a_module_holds_ties_and_nones_in_dictionaries_of_its_own() -> None:
    """torch/nn/modules/module.py: __setattr__ puts parameters, buffers and children in dicts."""
    layer = layer_with_all()
    assert list(own_parameters(layer)) == ["none", "weight", "tied"]
    assert own_parameters(layer)["none"] is None
    assert own_parameters(layer)["tied"] is layer.weight
    assert list(own_buffers(layer)) == ["kept", "lost"]
    assert own_modules(layer) == {"child": layer.child, "nobody": None}
    assert dict(layer.named_parameters(recurse=False)).keys() == {"weight"}  # the public view
    own_buffers(layer)["kept"] = other = torch.zeros(1)
    assert layer.kept is other


def test_a_module_knows_which_buffers_are_not_persistent() -> None:
    """torch/nn/modules/module.py: _save_to_state_dict leaves out _non_persistent_buffers_set."""
    layer = layer_with_all()
    assert not_persistent(layer) == {"lost"}
    not_persistent(layer).add("kept")
    assert not {"kept", "lost"} & layer.state_dict().keys()


def test_global_registration_hooks_are_in_three_dictionaries() -> None:
    """torch/nn/modules/module.py: the three functions put a hook in, and handles take it out."""
    registers = (
        register_module_parameter_registration_hook,
        register_module_buffer_registration_hook,
        register_module_module_registration_hook,
    )
    before = [dict(hooks) for hooks in REGISTRATION_HOOKS]
    heard: list[str] = []
    handles = [r(lambda _, name, value: heard.append(name)) for r in registers]
    try:
        for hooks, handle in zip(REGISTRATION_HOOKS, handles, strict=True):
            assert handle.id in hooks
        layer_with_all()
    finally:
        for handle in handles:
            handle.remove()
    assert {"weight", "tied", "kept", "lost", "child", "nobody"} <= set(heard)
    assert "none" not in heard  # a parameter that is None is told to nobody
    assert [dict(hooks) for hooks in REGISTRATION_HOOKS] == before


def test_placeholders_allow_some_functions_and_refuse_the_others() -> None:
    """torch/nn/parameter.py: UninitializedTensorMixin._allowed_methods are those that it calls."""
    placeholder = nn.UninitializedParameter()
    assert {torch.Tensor.to, torch.Tensor.half, torch.Tensor.size} <= set(ALLOWED_OF_PLACEHOLDERS)
    assert torch.Tensor.neg not in ALLOWED_OF_PLACEHOLDERS
    assert placeholder.half().dtype is torch.half
    with pytest.raises(ValueError, match="uninitialized parameter"):
        placeholder.neg()


def test_each_module_puts_its_own_tensors_into_a_state_dict() -> None:
    """torch/nn/modules/module.py: state_dict calls _save_to_state_dict of each module."""
    layer, destination = layer_with_all(), dict[str, Any]()
    copy_into_state_dict(layer, destination, "a.", True)
    assert destination.keys() == {"a.weight", "a.tied", "a.kept"}
    assert destination["a.weight"] is layer.weight
    name = copy_into_state_dict.__name__
    heard: list[str] = []
    own = type("Own", (nn.Linear,), {name: lambda self, out, prefix, keep: heard.append(prefix)})
    nn.Sequential(own(1, 1)).state_dict()
    assert heard == ["0."]


def test_normalisations_alone_of_torch_s_layers_load_in_a_way_of_their_own() -> None:
    """torch/nn/modules/batchnorm.py: an old checkpoint has no num_batches_tracked, and gets one."""
    name = load_with_counter.__name__
    layers = [c for c in vars(nn.modules).values() if inspect.isclass(c)]
    own = {getattr(c, name) for c in layers if issubclass(c, nn.Module)}
    instance_norm = getattr(nn.modules.instancenorm._InstanceNorm, name)
    assert own == {getattr(nn.Module, name), load_with_counter, instance_norm}
    layer = nn.BatchNorm1d(2)
    old = {key: value for key, value in layer.state_dict().items() if "num" not in key}
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 0


def test_torch_s_lazy_layers_call_a_module_by_the_name_of_its_class() -> None:
    """torch/nn/modules/lazy.py: _infer_parameters says which is not initialised by _get_name."""
    ways = {"initialize_parameters": lambda *_: None}
    lazy = type("Own", (nn.LazyLinear,), ways)(1)
    assert name_of_class(lazy) == "Own"
    with pytest.raises(RuntimeError, match="module Own has not been fully initialized"):
        lazy(torch.ones(1))


def test_a_hook_that_removes_itself_is_an_error_where_another_one_follows() -> None:
    """torch/nn/modules/module.py: _load_from_state_dict iterates over the dict of hooks itself."""
    layer, order = nn.Linear(1, 1), list[str]()
    own = layer.register_load_state_dict_pre_hook(lambda *_: (order.append("its"), own.remove()))
    handle = load_state_dict_first(layer, lambda *_: order.append("ours"))
    layer.load_state_dict(layer.state_dict())
    assert order == ["ours", "its"]
    handle.remove()
    own = layer.register_load_state_dict_pre_hook(lambda *_: own.remove())
    layer.register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="mutated"):
        layer.load_state_dict(layer.state_dict())


def test_a_hook_in_another_s_place_runs_in_its_turn_with_kwargs() -> None:
    """torch/nn/modules/module.py: _forward_pre_hooks_with_kwargs says which are given kwargs."""
    layer, order = nn.Identity(), list[Any]()
    first = layer.register_forward_pre_hook(lambda *_: order.append("first"))
    layer.register_forward_pre_hook(lambda *_: order.append("second"))
    replace_forward_pre_hook(layer, first.id, lambda _, args, kwargs: order.append((args, kwargs)))
    layer(input=3)
    assert order == [((), {"input": 3}), "second"]


def test_hooks_can_be_removed_while_torch_goes_through_them() -> None:
    """torch/nn/modules/module.py: _call_impl and _load_from_state_dict iterate over dicts."""
    layer, order = nn.Linear(1, 1), list[str]()

    def once(*_: Any) -> None:
        order.append("once")
        for handle in handles:
            remove_hook(layer, handle.id)

    handles = [
        layer.register_load_state_dict_pre_hook(once),
        layer.register_forward_pre_hook(once, with_kwargs=True),
    ]
    layer.register_load_state_dict_pre_hook(lambda *_: order.append("always"))
    layer.register_forward_pre_hook(lambda *_: order.append("always"))
    layer.load_state_dict(layer.state_dict())
    handles[1] = layer.register_forward_pre_hook(once, with_kwargs=True, prepend=True)
    for _ in range(2):
        layer(torch.ones(1))
    assert order == ["once", "always", "once", "always", "always"]
    assert not layer._forward_pre_hooks_with_kwargs


def test_what_comes_before_a_call_comes_before_its_hooks() -> None:
    """torch/nn/modules/module.py: ``_wrapped_call_impl`` looks ``_call_impl`` up on the module."""
    layer, order = nn.Identity(), []
    layer.register_forward_pre_hook(lambda *_: order.append("hook"))
    before_call(layer, lambda module, args, kwargs: order.append((module, args, kwargs)))
    assert nn.Sequential(layer)(3) == 3
    assert order == [(layer, (3,), {}), "hook"]


def test_a_module_says_whether_it_has_a_hook_of_loading() -> None:
    """torch/nn/modules/module.py: ``_load_state_dict_pre_hooks``."""
    assert not has_load_hook(nn.Linear(1, 1))
    with_hook = nn.Linear(1, 1)
    with_hook.register_load_state_dict_pre_hook(lambda *_: None)
    assert has_load_hook(with_hook)
