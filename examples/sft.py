"""TRL's SFTTrainer: train a chat model on prompts and completions, with fitted ranks.

python examples/sft.py [STEPS]
"""

import sys
import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lrlora
from lrlora.train.embedded import load_movie_reviews
from lrlora.train.models import model_source

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
base = model_source("embedded:smollm2")  # or any chat model on the hub, by name
reviews = load_movie_reviews()["train"].select(range(200))
data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"Is this review fresh or rotten? {review['text']}"}],
            "completion": [{"role": "assistant", "content": ("rotten", "fresh")[review["label"]]}],
        }
        for review in reviews
    ]
)

with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=data,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[lrlora.FittedRanksCallback("r4")],  # as many parameters as LoRA r = 4
        args=SFTConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_length=96,
            logging_steps=max(1, steps // 4),
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    print(lrlora.rank_report(trainer.model).to_frame()[["module", "stable_rank", "energy99_rank"]].head())
