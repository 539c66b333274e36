"""Adapters on a transformers model, without a PeftModel: add, train, save, load, switch, delete.

From transformers 5.24 on, these methods require peft 0.22; with peft 0.21 use transformers up to 5.23, or
`get_peft_model`.

python examples/transformers_adapters.py
"""

import tempfile

import torch
from transformers import AutoModel, AutoTokenizer

import lrlora
from lrlora.train.models import model_source

base = model_source("embedded:minilm")
batch = AutoTokenizer.from_pretrained(base)(["A film that stays with you."], return_tensors="pt")
config = lrlora.LrLoraConfig(r=4, target_modules=["query", "value"])


def embed(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).last_hidden_state


model = AutoModel.from_pretrained(base)
plain = embed(model)
model.add_adapter(config, adapter_name="first")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3):
    optimizer.zero_grad()
    model(**batch).last_hidden_state.square().mean().backward()
    optimizer.step()
trained = embed(model)
model.add_adapter(config, adapter_name="second")
model.set_adapter("second")
print("a new adapter changes nothing:", torch.equal(embed(model), plain))
model.set_adapter("first")
model.delete_adapter("second")
model.disable_adapters()
print("disabled, it is the base model:", torch.equal(embed(model), plain))
model.enable_adapters()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(base)
    loaded.load_adapter(folder)
    print("loaded, it is what was trained:", torch.equal(embed(loaded), trained))
