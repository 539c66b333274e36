"""Custom training loop with accelerate, and fitted ranks.

python examples/accelerate_loop.py [STEPS], or with `accelerate launch`
"""

import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import lrlora
from lrlora.train.embedded import load_movie_reviews
from lrlora.train.models import model_source

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
base = model_source("embedded:minilm")
tokenizer = AutoTokenizer.from_pretrained(base)
data = load_movie_reviews()["train"]
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=48), remove_columns=["text", "group"])
loader = torch.utils.data.DataLoader(data, 16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))

accelerator = Accelerator(cpu=True)
model = get_peft_model(
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2),
    LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"),
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
ranks = lrlora.FittedRanks(model, optimizer, size="r4", steps=steps)  # as many parameters as LoRA r = 4
model.train()
for step, batch in zip(range(steps), loader, strict=False):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        accelerator.print(step, round(loss.item(), 3))
accelerator.print(ranks.summary)
