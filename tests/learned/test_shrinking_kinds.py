"""`lrlora.shrink` after Trainers of every kind; each small adapter is loaded by PEFT alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)
from trl import RewardConfig, RewardTrainer

from lrlora import FittedRanksCallback, shrink
from lrlora.learned.held_out import LiveLosses, at_rest

from ..conftest import TinyModel
from ..train.small import GOOD, reviews, save_decoder, save_encoder, save_image_model, tokenizer
from .test_shrinking import Pairs, lora, trainer_of

OPTIONS: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def same_when_loaded(trainer: Any, base: Any, folder: Path, inputs: dict[str, Tensor]) -> None:
    """The saved adapter, loaded by PEFT, answers as the live model."""
    trainer.model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs)[0]
        assert torch.allclose(loaded(**inputs)[0], expected, atol=1e-5)


def guess_of_numbers(labels: Tensor) -> float:
    """Least mean squared error by one answer for each target."""
    return labels.var(0, unbiased=False).mean().item()


def guess_of_several(labels: Tensor) -> float:
    """Least binary cross-entropy by one answer for each label."""
    shares = labels.mean(0)
    return -(torch.xlogy(shares, shares) + torch.xlogy(1 - shares, 1 - shares)).mean().item()


@pytest.mark.parametrize(
    ("problem", "guess_of"),
    [("regression", guess_of_numbers), ("multi_label_classification", guess_of_several)],
)
def test_several_targets_or_labels_count_their_gain_from_guessing(
    problem: str, guess_of: Callable[[Tensor], float], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    options = {"num_labels": 5, "problem_type": problem}
    base = AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path / "base"), **options)
    generator = torch.Generator().manual_seed(0)
    ids, noise = torch.randint(5, 30, (420, 8), generator=generator), torch.rand(420, 5, generator=generator)
    # The first label is known from the text, the others are not.
    labels = (noise < torch.tensor([0.0, 0.5, 0.05, 0.05, 0.05])).float()
    labels[:, 0] = (ids[:, 1] < 18).float()
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    model = lora(base, task_type=TaskType.SEQ_CLS)
    trainer = trainer_of(tmp_path, model, train_dataset=rows[:240], eval_dataset=rows[240:])
    trainer.train()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(5)  # wild without the adapter
    with at_rest(trainer.model, trainer):
        losses = LiveLosses.of_trainer(trainer)
        guessed = losses.guess()(losses.held_out)
    assert losses.unit == "held-out examples"
    assert guessed is not None
    held_out = torch.cat([batch["labels"] for batch in losses.held_out])
    assert guessed.sum().item() / held_out.numel() == pytest.approx(guess_of(held_out), rel=0.05)


@pytest.mark.parametrize("name", ["_metrics", "_stored_metrics", "accum_loss_components"])
def test_what_a_trainer_counts_for_its_log_is_restored(name: str, tmp_path: Path) -> None:
    """TRL's trainers and that of sentence-transformers average it in their next line."""
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    setattr(trainer, name, {"train": {"loss": [2.0]}})
    with at_rest(trainer.model, trainer):
        getattr(trainer, name)["train"]["loss"].append(3.0)
    assert getattr(trainer, name) == {"train": {"loss": [2.0]}}


def test_a_model_is_no_trainer_for_its_method() -> None:
    tiny = TinyModel("llama")
    model = lora(tiny.build())
    model.get_base_model().compute_loss = lambda *inputs: None  # which PEFT's model has, too
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    batches = [{"input_ids": ids, "labels": ids} for ids in Pairs(512, 0).ids.split(16)]
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = [{"input_ids": ids, "labels": ids} for ids in Pairs(192, 1).ids.split(16)]
    found = shrink(model, batches[:8], held_out, keep=0.9)
    assert found.unit == "held-out examples"
    assert found.parameters < found.whole


def test_a_trainer_is_not_of_sentence_transformers_for_an_attribute(tmp_path: Path) -> None:
    trainer: Any = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    trainer.evaluator = None  # of one's own
    assert LiveLosses.of_trainer(trainer).unit == "held-out examples"


def test_a_classifier_counts_its_gain_from_guessing(tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path / "base"), num_labels=2)

    frame = reviews(420)
    encoded = tokenizer()(list(frame["review"]), padding=True, return_tensors="pt")
    labels = (frame["verdict"] == "fresh").astype(int)
    ids, masks = encoded["input_ids"], encoded["attention_mask"]
    rows = [
        {"input_ids": i, "attention_mask": mask, "labels": label}
        for i, mask, label in zip(ids, masks, labels, strict=True)
    ]
    model = lora(base(), task_type=TaskType.SEQ_CLS)

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    data = {"train_dataset": rows[:240], "eval_dataset": rows[240:]}
    trainer = trainer_of(tmp_path, model, compute_metrics=accuracy, **data)
    trainer.train()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(5)  # wild without the adapter
    found = shrink(trainer, keep=0.9)
    assert found.unit == "held-out examples"
    assert found.base < 0.75
    assert found.parameters < found.whole
    before, after = found.metrics["accuracy"]
    assert before > 0.8
    assert abs(after - before) < 0.1
    same_when_loaded(trainer, base(), tmp_path / "small", {"input_ids": ids[:8], "attention_mask": masks[:8]})


@pytest.mark.integration
def test_a_reward_model_is_measured_by_batch(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "base")
    pairs = [(f"a {word} film", f"a film {word}") for word in GOOD * 120]
    rows = Dataset.from_dict({"chosen": [a for a, _ in pairs], "rejected": [b for _, b in pairs]})
    splits = rows.train_test_split(0.5, seed=0)

    def base() -> Any:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = tokenizer().pad_token_id
        return model

    trainer = RewardTrainer(
        base(),
        args=RewardConfig(str(tmp_path / "out"), max_steps=30, learning_rate=1e-2, bf16=False, **OPTIONS, **BATCHES),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    trainer.train()
    found = shrink(trainer, keep=0.9)
    assert found.unit == "held-out batches"
    assert found.parameters < found.whole
    inputs = tokenizer()(["a good film", "a film bad"], return_tensors="pt", padding=True)
    same_when_loaded(trainer, base(), tmp_path / "small", dict(inputs))


BATCHES = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 1}


@pytest.mark.integration
def test_images(tmp_path: Path) -> None:
    folder = save_image_model(tmp_path / "vit")

    def base() -> Any:
        torch.manual_seed(0)
        return AutoModelForImageClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)

    size, channels = base().config.image_size, base().config.num_channels
    torch.manual_seed(0)
    pixels = torch.randn(420, channels, size, size) + torch.linspace(-3, 3, 420)[:, None, None, None]
    rows = [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in pixels[torch.randperm(420)]]
    model = lora(base(), task_type=None)
    trainer = trainer_of(tmp_path, model, train_dataset=rows[:240], eval_dataset=rows[240:])
    trainer.train()
    found = shrink(trainer, keep=0.9)
    assert found.unit == "held-out examples"
    assert found.parameters < found.whole
    same_when_loaded(trainer, base(), tmp_path / "small", {"pixel_values": pixels[:8]})


def embedding_model(folder: Path) -> Any:
    """SentenceTransformer with a LoRA."""
    st = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    model = st.SentenceTransformer(str(folder), device="cpu")
    model[0].model = get_peft_model(model[0].model, LoraConfig(r=4, target_modules="all-linear"))
    return model


def pairs_of_texts() -> Dataset:
    """1,728 pairs of a text and its paraphrase."""
    words = sorted(word for word in tokenizer().get_vocab() if word.isalpha())[:12]
    some = list(itertools.product(words, repeat=3))
    pairs = {
        "anchor": [f"a {a} {b} {c} film" for a, b, c in some],
        "positive": [f"{b} and {c} {a}" for a, b, c in some],
    }
    return Dataset.from_dict(pairs).shuffle(seed=0)


def embedding_trainer(folder: Path, model: Any, **options: Any) -> Any:
    """Trainer with in-batch negatives."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    arguments = {"max_steps": 200, "learning_rate": 1e-2, "per_device_eval_batch_size": 4, **OPTIONS}
    return SentenceTransformerTrainer(
        model=model, args=SentenceTransformerTrainingArguments(str(folder), **arguments), **options
    )


@pytest.mark.integration
def test_sentence_embeddings_with_negatives_in_the_batch(tmp_path: Path) -> None:
    folder, rows = save_encoder(tmp_path / "base"), pairs_of_texts()
    model = embedding_model(folder)
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    trainer = embedding_trainer(
        tmp_path / "out",
        model,
        train_dataset=rows.select(range(800)),
        eval_dataset=rows.select(range(800, 1400)),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    found = shrink(trainer, keep=0.9)
    assert found.unit == "held-out batches"
    assert found.parameters < found.whole
    assert trainer.evaluate()["eval_loss"] - before <= 0.15 * found.gain
    expected = model.encode(["a good film"])
    model[0].model.save_pretrained(tmp_path / "small")
    plain = st.SentenceTransformer(str(folder), device="cpu")
    plain[0].model = PeftModel.from_pretrained(plain[0].model, tmp_path / "small")
    assert abs(plain.encode(["a good film"]) - expected).max() < 1e-5


def test_sentence_embeddings_of_several_sets_count_every_pair_alike(tmp_path: Path) -> None:
    rows, model = pairs_of_texts(), embedding_model(save_encoder(tmp_path / "base"))
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model)
    names = ("a", "a_set_with_a_long_name")
    train, held_out = (
        DatasetDict({name: rows.select(range(at, at + number)) for name, at in zip(names, first, strict=True)})
        for first, number in (((0, 400), 400), ((800, 1040), 240))
    )
    trainer = embedding_trainer(
        tmp_path / "out", model, train_dataset=train, eval_dataset=held_out, loss=dict.fromkeys(names, loss)
    )
    trainer.train()
    live = LiveLosses.of_trainer(trainer, model[0].model)
    assert live.losses(live.held_out)[:, 1].tolist() == 120 * [4]  # pairs
    assert len(live.training) <= 32
    found = shrink(trainer, keep=0.9)
    assert found.parameters < found.whole


def test_too_few_batches_of_embeddings_are_refused_before_training(tmp_path: Path) -> None:
    rows, model = pairs_of_texts(), embedding_model(save_encoder(tmp_path / "base"))
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    trainer = embedding_trainer(
        tmp_path / "out",
        model,
        train_dataset=rows.select(range(100)),
        eval_dataset=rows.select(range(100, 300)),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.add_callback(FittedRanksCallback(keep=0.9, at=0.6, trainer=trainer))
    with pytest.raises(ValueError, match=r"50 held-out batches .*90 batches.*per_device_eval_batch_size"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.integration
def test_a_base_in_four_bits_and_a_half_precision(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = TinyModel("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path / "base")  # blocks of 64 weights

    def base() -> Any:
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options)

    trainer = trainer_of(tmp_path, lora(base()))
    trainer.train()
    found = shrink(trainer, keep=0.9)
    assert found.parameters < found.whole
    same_when_loaded(trainer, base(), tmp_path / "small", {"input_ids": Pairs(8, 2).ids})
    half = trainer_of(tmp_path / "half", lora(tiny.build()))
    half.args.bf16 = True
    half = Trainer(half.model, half.args, train_dataset=Pairs(512, 0), eval_dataset=Pairs(192, 1))
    half.train()
    assert shrink(half, keep=0.9).parameters < found.whole


def test_killed_in_the_search_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer() -> Trainer:
        made = trainer_of(tmp_path, lora(TinyModel("llama").build()))
        made.args.save_strategy, made.args.save_steps = "steps", 60
        return made

    first = trainer()
    first.train()
    whole = {name: p.detach().clone() for name, p in first.model.named_parameters() if p.requires_grad}
    monkeypatch.setattr("lrlora.learned.live_cut.find_smallest", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shrink(first, keep=0.9)
    assert all(torch.equal(p, whole[name]) for name, p in first.model.named_parameters() if p.requires_grad)
    monkeypatch.undo()
    again = trainer()
    again.train(resume_from_checkpoint=True)
    found = shrink(again, keep=0.9)
    assert found.ranks == shrink(first, keep=0.9).ranks
    assert [path.name for path in tmp_path.glob("whole*")] == ["whole"]
