"""LoRA: adapters of peft on a deferred base, whose weights come from a checkpoint."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import lateinit

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=300,
    pad_token_id=None,
)
ADAPTERS = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
torch.manual_seed(7)
trained = LlamaForCausalLM(CONFIG)  # stands for what someone trained
lateinit.save_checkpoint(trained, folder / "base")

# The usual way: draw the base, overwrite it, draw the adapters.
torch.manual_seed(0)
eager = LlamaForCausalLM(CONFIG)
eager.load_state_dict(trained.state_dict())
eager = get_peft_model(eager, ADAPTERS)

# Deferred: only the adapters are drawn, and the base is the file, mapped.
torch.manual_seed(0)
with lateinit.deferred():
    base = LlamaForCausalLM(CONFIG)
print(str(lateinit.load_checkpoint(base, folder / "base")).replace(f"{folder}/", ""))
with lateinit.deferred():
    model = get_peft_model(base, ADAPTERS)
waiting = [p.numel() for p in model.parameters() if lateinit.is_deferred(p)]
print(f"then materialised: {len(waiting)} adapters, {sum(waiting):,} values")
lateinit.materialize(model)
expected = dict(eager.named_parameters()) | dict(eager.named_buffers())
found = dict(model.named_parameters()) | dict(model.named_buffers())
assert expected.keys() == found.keys()
for name, tensor in expected.items():
    assert torch.equal(tensor, found[name]), name
print("equal to eager:", len(found), "parameters and buffers of base and adapters")

before = {name: tensor.clone() for name, tensor in model.named_parameters()}
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
tokens = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(1))
for step in range(31):
    scores = model(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(scores.transpose(1, 2), tokens[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss:.3f}")
moved = [name for name, tensor in model.named_parameters() if not tensor.equal(before[name])]
assert moved
assert all("lora" in name for name in moved)
adapters = get_peft_model_state_dict(model)
torch.save(adapters, folder / "adapters.pt")
size = (folder / "adapters.pt").stat().st_size
print(f"trained and saved: {len(moved)} adapters of {len(before)} parameters, {size / 1e3:.0f} kB")
scratch.cleanup()
