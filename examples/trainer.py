"""transformers' Trainer: train, resume from a checkpoint, keep the best model, and reload it.

python examples/trainer.py [STEPS]
"""

import sys
import tempfile
from pathlib import Path

from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import lrlora
from lrlora.train.embedded import load_movie_reviews
from lrlora.train.models import model_source

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
base = model_source("embedded:minilm")  # or any model on the hub, by name
tokenizer = AutoTokenizer.from_pretrained(base)
data = load_movie_reviews()
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=48), remove_columns=["text", "group"])


def new_trainer(folder: str) -> Trainer:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = lrlora.LrLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=2e-3,
        per_device_train_batch_size=32,
        eval_strategy="steps",
        eval_steps=max(1, steps // 2),
        save_steps=max(1, steps // 2),
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
    )
    return Trainer(
        model=get_peft_model(model, config),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"].select(range(min(512, 8 * steps))),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[lrlora.RankLogger(every=max(1, steps // 2))],
    )


with tempfile.TemporaryDirectory() as folder:
    new_trainer(folder).train()
    first = Path(folder) / f"checkpoint-{max(1, steps // 2)}"
    trainer = new_trainer(folder)
    trainer.train(resume_from_checkpoint=str(first))
    print("best evaluation loss:", trainer.state.best_metric)

    trainer.save_model(f"{folder}/adapter")
    model = AutoPeftModelForSequenceClassification.from_pretrained(f"{folder}/adapter", num_labels=2)
    print(lrlora.rank_report(model).to_frame()[["module", "stable_rank", "energy99_rank"]].head())
