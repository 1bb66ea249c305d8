"""A published architecture against a checkpoint: what differs is named, and nothing is built."""

import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import lateinit

SIZES = {"n_embd": 96, "n_layer": 3, "n_head": 4, "vocab_size": 1000, "n_positions": 64}
CONFIG = GPT2Config(**SIZES, bos_token_id=None, eos_token_id=None)


def diff(config: Path, checkpoint: Path) -> subprocess.CompletedProcess[str]:
    """Compare names, shapes and dtypes; of both files only headers are read."""
    command = [sys.executable, "-m", "lateinit", "diff", f"transformers:{config}", checkpoint]
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([*command, "--no-values"], **options)  # noqa: S603, PLW1510
    print(f"$ lateinit diff transformers:{config.name} {checkpoint.name} --no-values")
    print((done.stdout + done.stderr).replace(f"{config.parent}/", ""))
    return done


scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
logging.disable_progress_bar()
GPT2LMHeadModel(CONFIG).save_pretrained(folder)  # stands for what is published
published = folder / "model.safetensors"
done = diff(folder / "config.json", published)
assert done.returncode == 0

# Somebody's version of it: a name, a shape and a dtype are others, and a bias is not there.
weights = load_file(published)
weights["transformer.h.0.attn.proj.weight"] = weights.pop("transformer.h.0.attn.c_proj.weight")
weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:48].clone()
weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"].bfloat16()
del weights["transformer.h.2.mlp.c_fc.bias"]
save_file(weights, folder / "theirs.safetensors")
done = diff(folder / "config.json", folder / "theirs.safetensors")
assert done.returncode == 1
assert "DIFFERENT: 5 of 42 names" in done.stdout

# The same before loading: all problems in one error, and the model is as it was.
model = lateinit.deferred_init(GPT2LMHeadModel, CONFIG)
try:
    lateinit.load_checkpoint(model, folder / "theirs.safetensors")
except lateinit.errors.MismatchError as error:
    print(str(error).replace(f"{folder}/", ""))
assert all(lateinit.is_deferred(parameter) for parameter in model.parameters())

# The published one fits, and is what was published.
lateinit.load_checkpoint(model, published)
for name, tensor in load_file(published).items():
    assert tensor.equal(model.get_parameter(name)), name
print("the published checkpoint is loaded: equal to eager loading")
scratch.cleanup()
