"""torch's and other libraries' ways to train, save and rework a model, on one that is deferred."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree
from transformers import LlamaConfig, LlamaForCausalLM

import lateinit
from lateinit.errors import DeferredTensorError, LateinitError
from tests.support.tied import Net, X


def eager() -> Net:
    torch.manual_seed(0)
    return Net()


def late() -> Net:
    torch.manual_seed(0)
    return lateinit.deferred_init(Net)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_fills_a_deferred_model_by_materialize_alone(original: bool) -> None:
    given: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": original}
    with pytest.raises(
        DeferredTensorError, match=r"pass param_init_fn=lateinit\.materialize.*recipes\.md"
    ):
        FullyShardedDataParallel(late(), **given)
    wrapped = FullyShardedDataParallel(late(), param_init_fn=lateinit.materialize, **given)
    assert torch.equal(wrapped(X), eager()(X))


@pytest.mark.usefixtures("alone")
def test_data_parallel_training_needs_values() -> None:
    model = late()
    with pytest.raises(
        DeferredTensorError, match=r"DistributedDataParallel.*'up\.weight'.*recipes\.md"
    ):
        nn.parallel.DistributedDataParallel(model)
    wrapped = nn.parallel.DistributedDataParallel(lateinit.materialize(model))
    assert torch.equal(wrapped(X), eager()(X))


class Lookahead(torch.optim.SGD):
    """Keeps the weights that it began with, and a list of tensors, from the start."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for p in self.param_groups[0]["params"]:
            self.state[p] |= {"slow": p.detach().clone(), "sums": [torch.zeros_like(p)]}

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p, state in self.state.items():
            torch._foreach_add_(state["sums"], [p.grad])
            p.data = state["slow"].lerp_(p.detach(), 0.5).clone()


FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "amsgrad": {"amsgrad": True},
    "capturable": {"capturable": True},
    "differentiable": {"differentiable": True},
    "for loop": {"foreach": False},
    "foreach": {"foreach": True},
    "foreach, lr a tensor": {"foreach": True, "lr": torch.tensor(0.03), "capturable": True},
    "fused": {"fused": True},
    "momentum": {"momentum": 0.9},
}


def optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """Each optimizer of torch, in each of its ways to step; but SparseAdam needs sparse grads."""
    made: dict[str, Any] = {"Lookahead": lambda m: Lookahead(m.parameters())}
    for name, cls in vars(torch.optim).items():
        known = inspect.signature(cls).parameters if inspect.isclass(cls) else {}
        if "lr" not in known or name == "SparseAdam":
            continue
        for flag, given in FLAGS.items():
            if known.keys() >= given.keys():
                made[f"{name} {flag}"] = functools.partial(built, cls, {"lr": 0.01} | given)
    made["Adagrad from 0.3"] = functools.partial(built, torch.optim.Adagrad, FROM)
    return dict(sorted(made.items()))


FROM = {"initial_accumulator_value": 0.3, "foreach": True}


def built(cls: Any, given: dict[str, Any], model: nn.Module) -> Any:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return cls(matrices if cls.__name__ == "Muon" else model.parameters(), **given)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """What two steps leave of the weights and of the state, or that torch refuses the first."""

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(X).pow(2).sum()
        value.backward()
        return value

    try:
        for _ in range(2):
            loss()
            optimizer.step(loss if isinstance(optimizer, torch.optim.LBFGS) else None)
    except (AssertionError, RuntimeError) as error:
        return [str(error)]
    return [*model.parameters(), *pytree.tree_leaves(list(optimizer.state.values()))]


def assert_equal(expected: list[Any], found: list[Any]) -> None:
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert type(a) is type(b)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, (a, b)


@pytest.mark.parametrize("optimizer", optimizers())
def test_an_optimizer_that_came_first_steps_as_eagerly(optimizer: str) -> None:
    make, model, deferred = optimizers()[optimizer], eager(), late()
    expected, found = make(model), make(deferred)
    lateinit.materialize(deferred)
    assert_equal(stepped(model, expected), stepped(deferred, found))


@pytest.mark.parametrize("optimizer", ["Adagrad foreach", "Adam foreach", "Lookahead"])
@pytest.mark.parametrize("way", ["in the block", "deepcopy", "pickle"])
def test_an_optimizer_is_made_and_copied_with_a_deferred_model(optimizer: str, way: str) -> None:
    def made() -> Any:
        model = Net()
        return model, optimizers()[optimizer](model)

    copies = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
    torch.manual_seed(0)
    expected = made()
    torch.manual_seed(0)
    found = lateinit.deferred_init(made)
    if way != "in the block":
        found = copies[way](found)
    lateinit.materialize(found[0])
    assert_equal(stepped(*expected), stepped(*found))


@pytest.mark.parametrize("optimizer", ["Adagrad foreach", "Adam for loop", "Adam fused"])
def test_the_state_of_an_optimizer_is_loaded_before_there_are_weights(optimizer: str) -> None:
    make, model, deferred = optimizers()[optimizer], eager(), late()
    trained = make(model)
    stepped(model, trained)
    state = copy.deepcopy(trained.state_dict())
    loaded = make(deferred)
    loaded.load_state_dict(copy.deepcopy(state))
    lateinit.materialize(deferred)
    again = eager()
    expected = make(again)
    expected.load_state_dict(state)
    assert_equal(stepped(again, expected), stepped(deferred, loaded))


def test_the_state_of_weights_without_values_gets_none() -> None:
    model = late()
    steps = torch.optim.Adagrad(model.parameters(), foreach=True)
    lateinit.materialize(model.down)
    steps.step()
    waiting = [lateinit.is_deferred(steps.state[p]["sum"]) for p in model.parameters()]
    assert waiting == [lateinit.is_deferred(p) for p in model.parameters()]
    assert {False, True} == set(waiting)


def test_an_average_of_weights_is_kept_of_a_deferred_model() -> None:
    def averaged(model: Net) -> torch.Tensor:
        average = AveragedModel(model)
        for _ in range(2):
            lateinit.materialize(model)
            average.update_parameters(model)
            with torch.no_grad():
                model.up.bias.add_(1)
        return average(X)

    assert torch.equal(averaged(late()), averaged(eager()))


def test_a_target_network_takes_the_weights_of_another_while_both_are_deferred() -> None:
    online, target = late(), lateinit.deferred_init(Net)
    target.load_state_dict(online.state_dict())
    assert torch.equal(lateinit.materialize(target)(X), eager()(X))
    assert torch.equal(lateinit.materialize(online)(X), eager()(X))


def test_weights_become_a_vector_and_again_weights() -> None:
    def mixed(model: Net) -> torch.Tensor:
        vector = torch.linspace(-1, 1, sum(p.numel() for p in model.parameters()))
        nn.utils.vector_to_parameters(vector, model.parameters())
        vector[0] = 5.0  # the weights are views of it
        return lateinit.materialize(model)(X)

    assert torch.equal(mixed(late()), mixed(eager()))


def test_a_tied_model_is_loaded_from_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = Net()
    safetensors.torch.save_model(other, str(tmp_path / "a.safetensors"))
    model = late()
    safetensors.torch.load_model(model, tmp_path / "a.safetensors")
    assert model.down.weight is model.up.weight
    assert torch.equal(model(X), other(X))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 99}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4))


SAVES: dict[str, Callable[[nn.Module, Path], object]] = {
    "save_file": lambda m, path: safetensors.torch.save_file(dict(m.named_parameters()), path),
    "save_model": lambda m, path: safetensors.torch.save_model(m, str(path)),
}


@pytest.mark.parametrize("save", SAVES)
def test_saving_what_has_no_values_is_refused(save: str, tmp_path: Path) -> None:
    with pytest.raises(DeferredTensorError, match=r"reading the memory needs the values.*'"):
        SAVES[save](late(), tmp_path / "a.safetensors")


def test_save_pretrained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeferredTensorError, match="reading the memory needs the values"):
        lateinit.deferred_init(llama).save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_have_their_values_before_the_weights_do() -> None:
    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(1)
        made = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        return lateinit.materialize(made)

    torch.manual_seed(0)
    expected = adapted(llama())
    torch.manual_seed(0)
    found = adapted(lateinit.deferred_init(llama))
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resizing_embeddings_is_refused_and_done_in_a_block() -> None:
    torch.manual_seed(0)
    expected = llama()
    expected.resize_token_embeddings(120, mean_resizing=False)
    torch.manual_seed(0)
    model = lateinit.deferred_init(llama)
    with pytest.raises(DeferredTensorError, match=r"do this inside `with lateinit\.deferred\(\):`"):
        model.resize_token_embeddings(120, mean_resizing=False)
    torch.manual_seed(0)
    with lateinit.deferred():
        model = llama()
        model.resize_token_embeddings(120, mean_resizing=False)
    lateinit.materialize(model)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_quantising_needs_values() -> None:
    model = late()
    with pytest.raises(LateinitError, match=r"'(up|down)\..*lateinit\.materialize"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    lateinit.materialize(model)
    assert torch.equal(model(X), eager()(X))


def test_an_exported_program_is_filled_with_its_model() -> None:
    model = late()
    exported = torch.export.export(model, (X,))
    with pytest.raises(DeferredTensorError, match=r"lateinit\.materialize"):
        exported.module()(X)
    lateinit.materialize(model)
    assert torch.equal(exported.module()(X), eager()(X))


def test_a_copy_is_saved_and_filled_elsewhere() -> None:
    file = io.BytesIO()
    torch.save(copy.deepcopy(late()).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    lateinit.materialize(state)
    assert torch.equal(state["up.weight"], eager().up.weight)


def test_moving_a_model_to_where_it_is_keeps_what_shares_its_memory() -> None:
    def moved(model: Net) -> list[torch.Tensor]:
        row = model.up.weight.data[0]
        model.cpu().to("cpu").to(model.up.bias)
        lateinit.materialize(model)
        model.up.weight.data.fill_(5.0)
        return [row * 1, model.down(X)]

    assert all(map(torch.equal, moved(late()), moved(eager())))


def test_a_parameter_is_made_of_the_class_of_another() -> None:
    model = late()
    made = type(model.up.bias)(torch.ones(3), requires_grad=False)
    assert type(made) is nn.Parameter
    assert not made.requires_grad
