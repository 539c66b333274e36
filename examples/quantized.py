"""QLoRA-style training: an adapter on a 4-bit base with TRL, then loaded on the 4-bit and a full-precision base.

python examples/quantized.py [STEPS]
"""

import sys
import tempfile

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import lrlora
from lrlora.train.embedded import load_movie_reviews
from lrlora.train.models import model_source

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
base = model_source("embedded:smollm2")
tokenizer = AutoTokenizer.from_pretrained(base)
reviews = load_movie_reviews()["train"].select(range(200))
batch = tokenizer(reviews[-1]["text"], return_tensors="pt")


def load(is_quantized: bool) -> torch.nn.Module:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": nf4, "device_map": "cpu"} if is_quantized else {}
    return AutoModelForCausalLM.from_pretrained(base, **options)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model=load(True),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": reviews["text"]}),
        peft_config=lrlora.LrLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_length=64,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    print("dtypes of φ:", {p.dtype for name, p in trainer.model.named_parameters() if "lrlora_phi" in name})
    trainer.save_model(f"{folder}/adapter")
    on_4_bit = logits(PeftModel.from_pretrained(load(True), f"{folder}/adapter"))
    on_float = logits(PeftModel.from_pretrained(load(False), f"{folder}/adapter"))
    print("4-bit base, as trained and as loaded:", difference(on_4_bit, logits(trainer.model)))
    print("full-precision and 4-bit base, with the adapter:", difference(on_float, on_4_bit))
    print("full-precision and 4-bit base, without it:", difference(logits(load(False)), logits(load(True))))
