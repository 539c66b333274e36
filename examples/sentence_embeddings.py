"""sentence-transformers: train an adapter of an embedding model on pairs, save and load it.

python examples/sentence_embeddings.py [STEPS]
"""

import sys
import tempfile

from datasets import Dataset
from peft import PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import lrlora
from lrlora.train.embedded import load_movie_reviews
from lrlora.train.models import model_source

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
base = model_source("embedded:minilm")
# Pairs of snippets about one film, which should be close.
reviews = load_movie_reviews()["train"].to_pandas()
films = [texts for texts in reviews.groupby("group")["text"].apply(list) if len(texts) > 1][: 16 * steps]
pairs = Dataset.from_dict({"anchor": [texts[0] for texts in films], "positive": [texts[1] for texts in films]})

model = SentenceTransformer(base, device="cpu")
model[0].model = get_peft_model(
    model[0].model, lrlora.LrLoraConfig(r=8, target_modules="all-linear", exclude_modules=["pooler.dense"])
)
with tempfile.TemporaryDirectory() as folder:
    trainer = SentenceTransformerTrainer(
        model=model,
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
        args=SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-3,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
    )
    trainer.train()
    before = model.encode("A film that stays with you.")
    model[0].model.save_pretrained(f"{folder}/adapter")

    loaded = SentenceTransformer(base, device="cpu")
    loaded[0].model = PeftModel.from_pretrained(loaded[0].model, f"{folder}/adapter")
    after = loaded.encode("A film that stays with you.")
    print("largest difference after loading:", abs(before - after).max())
    print(lrlora.rank_report(loaded[0].model).to_frame()[["module", "stable_rank", "energy99_rank"]].head())
