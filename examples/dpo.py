"""TRL's DPOTrainer with a new adapter (`peft_config=`), and with an adapter that is already trained.

In the second case TRL keeps a copy of the trained adapter, named "ref", as the reference.

python examples/dpo.py [STEPS]
"""

import sys
import tempfile
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import lrlora
from lrlora.train.embedded import load_movie_reviews
from lrlora.train.models import model_source

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
base = model_source("embedded:smollm2")  # or any chat model on the hub, by name
labels = ("rotten", "fresh")
data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"Is this review fresh or rotten? {review['text']}"}],
            "chosen": [{"role": "assistant", "content": labels[review["label"]]}],
            "rejected": [{"role": "assistant", "content": labels[1 - review["label"]]}],
        }
        for review in load_movie_reviews()["train"].select(range(100))
    ]
)


def dpo(model: Any, folder: str, **options: Any) -> DPOTrainer:
    trainer = DPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=data,
        args=DPOConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=5e-4,
            per_device_train_batch_size=2,
            max_length=96,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        **options,
    )
    trainer.train()
    return trainer


with tempfile.TemporaryDirectory() as folder:
    config = lrlora.LrLoraConfig(r=4, task_type="CAUSAL_LM")
    trainer = dpo(AutoModelForCausalLM.from_pretrained(base), folder, peft_config=config)
    trainer.save_model(f"{folder}/adapter")

    trained = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), f"{folder}/adapter", is_trainable=True
    )
    again = dpo(trained, folder)
    start = again.state.log_history[0]
    print("loss at the first step of the second run:", start["loss"], "(log 2 = 0.6931: policy = reference)")
    print("adapters:", ", ".join(again.model.peft_config))
