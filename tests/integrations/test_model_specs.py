"""Models named by a string: every form, and what is said when a name is wrong."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from lateinit._integrations import model_specs
from lateinit.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TINY_GPT2 = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 32, "n_positions": 16}
TINY_LLAMA = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


@pytest.fixture(autouse=True)
def imports_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a specification imports from a test's folder, and puts on the path, goes with it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


# -- callables -----------------------------------------------------------------------------------


def test_a_class_in_a_module() -> None:
    build = model_specs.load_spec("torch.nn:Linear", {"in_features": 3, "out_features": 2})
    first, second = build(), build()
    assert isinstance(first, nn.Linear)
    assert first is not second
    assert first.weight.shape == (2, 3)


def test_a_dotted_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dotted_models.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    @classmethod\n"
        "    def small(cls, width=1):\n"
        "        net = cls()\n"
        "        net.width = width\n"
        "        return net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert model_specs.load_spec("dotted_models:Net.small", {"width": 3})().width == 3


def test_a_file_that_imports_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_spec.py").write_text("WIDTH = 3\n")
    (tmp_path / "spec_file.py").write_text(
        "from torch import nn\n"
        "from neighbour_of_spec import WIDTH\n"
        "def make(depth=1):\n"
        "    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(depth)])\n"
    )
    model = model_specs.load_spec(f"{tmp_path}/spec_file.py:make", {"depth": 2})()
    assert len(model) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt2", "'gpt2' names no model: write transformers:MODEL_TYPE"),
        (":x", "names no model"),
        ("x:", "names no model"),
        ("no_such_module:x", "there is no module 'no_such_module' on the import path"),
        ("torch.nn.no_such:x", r"there is no module 'torch\.nn\.no_such'"),
        ("torch.nn:Liner", r"torch\.nn has no 'Liner'; it has: Linear"),
        ("torch.nn:Linear.nothing", "Linear has no 'nothing'"),
        ("math:pi", "is a float, which cannot be called"),
        ("no_such.py:make", r"there is no file no_such\.py"),
        ("torch.nn:Linear", "missing a required argument: 'in_features'"),
    ],
)
def test_a_bad_name_says_what_there_is(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        model_specs.load_spec(spec)


def test_unknown_arguments_are_refused_before_anything_is_built() -> None:
    with pytest.raises(SpecError, match=r"unexpected keyword argument 'width'.*in_features"):
        model_specs.load_spec("torch.nn:Linear", {"in_features": 1, "out_features": 1, "width": 3})


def test_near_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "models.py").touch()
    with pytest.raises(SpecError, match=r"there is no file .*model\.py; there are: models\.py"):
        model_specs.load_spec(f"{tmp_path}/model.py:make")


def test_a_module_that_cannot_import_something_says_so_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_much.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        model_specs.load_spec("needs_much:make")


def test_what_is_no_module_is_refused_when_built() -> None:
    with pytest.raises(SpecError, match=r"gave a OrderedDict and not an nn\.Module"):
        model_specs.load_spec("collections:OrderedDict")()


# -- arguments -----------------------------------------------------------------------------------


def test_kwargs_are_a_json_object() -> None:
    assert model_specs.parse_kwargs(None) == {}
    assert model_specs.parse_kwargs('{"a": [1, 2]}') == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": ', "is no JSON: .*line 1 column"), ("[1]", "must be a JSON object"), ("", "no JSON")],
)
def test_bad_kwargs_are_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        model_specs.parse_kwargs(text)


# -- transformers --------------------------------------------------------------------------------


def test_a_model_type_is_a_causal_model_where_there_is_one() -> None:
    assert (
        type(model_specs.load_spec("transformers:gpt2", TINY_GPT2)()).__name__ == "GPT2LMHeadModel"
    )


def test_a_model_type_is_the_bare_model_elsewhere() -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny |= {"intermediate_size": 8}
    assert type(model_specs.load_spec("transformers:vit", tiny)()).__name__ == "ViTModel"


def test_a_class_can_be_named() -> None:
    model = model_specs.load_spec("transformers:gpt2:GPT2Model", TINY_GPT2)()
    assert type(model).__name__ == "GPT2Model"


@pytest.mark.parametrize("folder", [False, True])
def test_a_configuration_file_and_its_architecture(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "config.json"
    config = {"model_type": "llama", "architectures": ["LlamaModel"], "dtype": "bfloat16"}
    path.write_text(json.dumps(config | TINY_LLAMA))
    build = model_specs.load_spec(
        f"transformers:{tmp_path if folder else path}", {"vocab_size": 48}
    )
    for model in (build(), build()):
        assert type(model).__name__ == "LlamaModel"
        assert model.embed_tokens.weight.shape == (48, 8)
        assert model.embed_tokens.weight.dtype is torch.bfloat16
    named = model_specs.load_spec(f"transformers:{path}:LlamaForCausalLM")()
    assert type(named).__name__ == "LlamaForCausalLM"


def test_a_configuration_without_an_architecture_is_a_causal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | TINY_LLAMA))
    model = model_specs.load_spec(f"transformers:{tmp_path}")()
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("what", "kwargs", "message"),
    [
        ("gpt3", {}, "has no model type 'gpt3'; near: .*gpt2"),
        ("gpt2:GPT2LMHead", {}, "has no model class 'GPT2LMHead'; near: GPT2LMHeadModel"),
        ("gpt2:GPT2Config", {}, "has no model class 'GPT2Config'"),
        ("gpt2", {"n_layers": 3}, "GPT2Config has no 'n_layers', near: n_layer"),
        ("no/config.json", {}, r"there is no configuration no/config\.json"),
        ("vision-encoder-decoder", {}, "name its class, as in .*:VisionEncoderDecoderModel"),
    ],
)
def test_a_bad_transformers_name(what: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        model_specs.load_spec(f"transformers:{what}", kwargs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON configuration"),
        ("[]", "holds no JSON object"),
        ("{}", "does not say its model_type"),
        ('{"model_type": "gpt3"}', "has no model type 'gpt3'"),
        (
            '{"model_type": "gpt2", "architectures": ["Mine"], "auto_map": {}}',
            "asks for code of its own",
        ),
        ('{"model_type": "gpt2", "architectures": ["Mine"]}', "has no model class 'Mine'"),
    ],
)
def test_a_bad_configuration_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        model_specs.load_spec(f"transformers:{path}")


# -- optional libraries --------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_an_absent_library_says_what_to_install(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SpecError, match=f"not installed: pip install {library}"):
        model_specs.load_spec(f"{library}:resnet18")


def test_timm_models_are_made_without_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text(
        "from torch import nn\n"
        "def is_model(name): return name == 'resnet18'\n"
        "def list_models(): return ['resnet18', 'vit_base']\n"
        "def create_model(name, pretrained, num_classes=10):\n"
        "    assert not pretrained\n"
        "    return nn.Linear(1, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    if "timm" in sys.modules:
        monkeypatch.delitem(sys.modules, "timm")
    assert model_specs.load_spec("timm:resnet18", {"num_classes": 3})().out_features == 3
    with pytest.raises(SpecError, match="timm has no model 'resnet19'; near: resnet18"):
        model_specs.load_spec("timm:resnet19")


def test_torchvision_models_are_made_without_any_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import models\n")
    (package / "models.py").write_text(
        "from torch import nn\n"
        "def fcn(*, weights='some', weights_backbone='some', num_classes=10):\n"
        "    assert weights is None and weights_backbone is None\n"
        "    return nn.Linear(1, num_classes)\n"
        "def list_models(): return ['fcn']\n"
        "def get_model_builder(name): return {'fcn': fcn}[name]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in {"torchvision", "torchvision.models"} & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    assert model_specs.load_spec("torchvision:fcn", {"num_classes": 3})().out_features == 3
    with pytest.raises(SpecError, match="torchvision has no model 'fcm'; near: fcn"):
        model_specs.load_spec("torchvision:fcm")


def test_the_optional_libraries_are_not_imported_unasked() -> None:
    code = (
        "import sys; from lateinit._integrations import model_specs; "
        "model_specs.load_spec('torch.nn:Identity'); "
        "assert not {'transformers', 'timm', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_of_specs_runs() -> None:
    found = doctest.testmod(model_specs, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
