"""`lrlora.shrink`: the smallest size that keeps a share of the gain, measured by the loss of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lrlora import FittedRanksCallback, shrink

from ..conftest import TinyModel
from ..train.small import GOOD, save_decoder, tokenizer
from .test_fitted_ranks import trained


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences that go on as they begin: each token follows from the one before."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(3, 99, (count, 1), generator=generator)
        self.ids = (start + 7 * torch.arange(8)) % 96 + 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer_of(folder: Path, model: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 2e-2, "use_cpu": True},
        **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
    )
    return Trainer(model, arguments, **{"train_dataset": Pairs(512, 0), "eval_dataset": Pairs(192, 1), **options})


def lora(model: nn.Module, **fields: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **fields}))


def loss_of(model: nn.Module, data: Pairs) -> float:
    with torch.no_grad():
        return model.eval()(input_ids=data.ids, labels=data.ids).loss.item()


def test_a_trainer_s_adapter_keeps_its_gain_at_the_size_that_is_told(tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    trainer = trainer_of(tmp_path, lora(tiny.build(), lora_dropout=0.1))
    trainer.train()
    model: Any = trainer.model
    new, without = Pairs(400, 2), loss_of(tiny.build(), Pairs(400, 2))
    whole = loss_of(model, new)
    found = shrink(trainer, keep=0.95)
    assert without - loss_of(model, new) >= 0.93 * (without - whole)
    assert found.kept.low <= found.kept.share <= 1.02
    assert found.unit == "held-out examples"
    assert found.parameters == sum(p.numel() for p in trained(model)) < found.whole
    assert f"{found.parameters:,} of {found.whole:,}" in str(found)

    trainer.save_model(str(tmp_path / "small"))
    small = PeftModel.from_pretrained(tiny.build(), tmp_path / "small").eval()
    assert torch.allclose(tiny.logits(small), tiny.logits(model), atol=1e-5)
    kept_beside = PeftModel.from_pretrained(tiny.build(), tmp_path / "whole").eval()
    assert loss_of(kept_beside, new) == pytest.approx(whole, rel=1e-5)
    shrink(trainer, keep=0.9)  # leaves the first whole adapter
    assert loss_of(PeftModel.from_pretrained(tiny.build(), tmp_path / "whole").eval(), new) == pytest.approx(whole)
    model.train()
    assert trainer.train().training_loss < without  # it can be trained further


def chats(count: int) -> Dataset:
    rows = [f"a {GOOD[number % 3]} film with plot" for number in range(count)]
    return Dataset.from_dict({"prompt": rows, "chosen": [" it is good"] * count, "rejected": [" it is bad"] * count})


@pytest.mark.integration  # hundreds of batches of two models
def test_the_reference_of_dpo_is_the_model_without_the_adapter(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    options = {"max_steps": 20, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 1, "use_cpu": True}
    options |= {"learning_rate": 1e-2, "report_to": "none", "bf16": False, "logging_steps": 50, "disable_tqdm": True}
    trainer = DPOTrainer(
        base,
        args=DPOConfig(str(tmp_path / "out"), **options),
        train_dataset=chats(32),
        eval_dataset=chats(93),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=3, target_modules="all-linear"),
    )
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    found = shrink(trainer, keep=0.9)
    assert found.unit == "held-out batches"
    gain = 0.6931 - before
    assert found.gain == pytest.approx(gain, rel=0.1)
    assert 0.6931 - trainer.evaluate()["eval_loss"] >= 0.85 * gain
    assert found.parameters < found.whole


def test_the_tokens_that_count_are_those_of_the_training(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"a {word} film"}, {"role": "assistant", "content": "it is good"}]}
        for word in GOOD * 40
    ]
    options = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    options |= {"report_to": "none", "bf16": False, "disable_tqdm": True, "loss_type": "nll"}
    trainer = SFTTrainer(
        base,
        args=SFTConfig(str(tmp_path / "out"), **options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:96]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    found = shrink(trainer, keep=0.95)
    assert found.unit == "held-out examples"
    assert trainer.evaluate()["eval_loss"] - before <= 0.07 * found.gain


@pytest.mark.refused
def test_what_cannot_be_measured_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    model = lora(tiny.build())
    for options, said in (
        ({"eval_dataset": None}, r"no eval_dataset\..*\bon='train'"),
        ({"eval_dataset": Pairs(40, 1)}, r"\b40 held-out .*\b90 "),
        ({"eval_dataset": Pairs(120, 1)}, r"updates are zero"),  # untrained
    ):
        trainer = trainer_of(tmp_path, model, **options)
        before = [p.detach().clone() for p in trained(model)]
        with pytest.raises(ValueError, match=said):
            shrink(trainer)
        assert all(map(torch.equal, before, trained(model)))
        assert all(p.grad is None for p in trained(model))
    with pytest.raises(ValueError, match=r"keep .*\(0, 1\).* got 99"):
        shrink(trainer, keep=99)
    trainer.reward_funcs = []  # as GRPO's Trainer has
    with pytest.raises(ValueError, match=r"export ADAPTER --keep 0\.99 --data"):
        shrink(trainer)


def test_the_callback_shrinks_the_best_checkpoint_and_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    tiny, losses = TinyModel("llama"), []
    for name in ("alone", "shrunk"):
        trainer = trainer_of(tmp_path / name, lora(tiny.build()))
        for field, value in {"eval_strategy": "steps", "save_strategy": "steps"}.items():
            setattr(trainer.args, field, value)
        trainer.args.eval_steps = trainer.args.save_steps = 20
        trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
        trainer.args.greater_is_better = True  # so that the best is not the last
        if name == "shrunk":
            callback = FittedRanksCallback(keep=0.9, trainer=trainer)
            trainer.add_callback(callback)
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert losses[0] == losses[1]
    assert callback.shrunk is not None
    model: Any = trainer.model
    assert callback.shrunk.parameters == sum(p.numel() for p in trained(model)) < callback.shrunk.whole
    best = losses[1][trainer.state.best_global_step // 20 - 1]
    assert 0 < trainer.evaluate()["eval_loss"] - best < 0.15 * callback.shrunk.gain


def test_a_callback_that_cannot_measure_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()), eval_dataset=Pairs(60, 1))
    trainer.add_callback(FittedRanksCallback(keep=0.9, trainer=trainer))
    with pytest.raises(ValueError, match=r"\b60 held-out .*few"):
        trainer.train()
    assert trainer.state.global_step == 0
    for options in ({}, {"keep": 0.9}):
        with pytest.raises(ValueError, match=r"keep=0\.99, trainer=trainer"):
            FittedRanksCallback(**options)
    with pytest.raises(ValueError, match=r"size='r4' and keep=0\.9"):
        FittedRanksCallback("r4", keep=0.9, trainer=trainer)


class Weighted(Trainer):
    """Another loss than the model's, which some batches do not show."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        weight = 1 + (inputs["labels"][:, 0] > 50).float()
        logits = outputs.logits[:, :-1].transpose(1, 2)
        terms = nn.functional.cross_entropy(logits, inputs["labels"][:, 1:], reduction="none").mean(1)
        loss = (weight * terms).sum() / weight.sum()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("kind", ["weighted", "smoothed"])
def test_a_loss_of_one_s_own_is_measured_by_batch(kind: str, tmp_path: Path) -> None:
    data = Pairs(192, 1)
    data.ids = data.ids[data.ids[:, 0].argsort()]  # batches have one weight
    made = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    made.args.per_device_eval_batch_size = 2
    if kind == "smoothed":
        made.args.label_smoothing_factor = 0.1
    trainer = (Weighted if kind == "weighted" else Trainer)(
        made.model, made.args, train_dataset=Pairs(512, 0), eval_dataset=data
    )
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    found = shrink(trainer, keep=0.9)
    assert found.unit == "held-out batches"
    assert found.loss == pytest.approx(before, rel=0.1)


def test_the_weights_of_a_schedule_free_optimizer_stay_small(tmp_path: Path) -> None:
    free = pytest.importorskip("schedulefree")
    model = lora(TinyModel("llama").build())
    optimizer = free.AdamWScheduleFree(trained(model), lr=2e-2)
    trainer = trainer_of(
        tmp_path, model, optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1))
    )
    trainer.train()
    shrink(trainer, keep=0.9)
    small = [p.detach().clone() for p in trained(model)]
    trainer.evaluate()
    assert all(map(torch.equal, small, trained(model)))


class Wrapped(nn.Module):
    """A PEFT model inside of another, with a head, dropout and running means."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = lora(TinyModel("mlp").build(), target_modules=["first", "last"])
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.head(self.drop(self.norm(self.inner(x))))[:, 0]
        return {"loss": (y - labels).square().mean(), "logits": y}


def test_all_around_the_adapter_rests(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 16)
    rows = [{"x": each, "labels": each[:4].sum()} for each in x]
    model = Wrapped()
    trainer = trainer_of(tmp_path, model, train_dataset=rows[:300], eval_dataset=rows[300:])
    trainer.args.per_device_eval_batch_size = 2
    trainer.args.max_steps = 200
    trainer.train()
    mean = model.norm.running_mean.clone()  # type: ignore[union-attr, operator]
    model.zero_grad()
    before = trainer.evaluate()["eval_loss"]
    found = shrink(trainer, keep=0.8)
    assert torch.equal(mean, model.norm.running_mean)  # type: ignore[arg-type]
    assert model.head.weight.grad is None
    assert trainer.evaluate()["eval_loss"] - before <= 0.3 * found.gain


def test_an_error_leaves_the_adapter_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(TinyModel("llama").build())
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    whole = [p.detach().clone() for p in trained(model)]
    monkeypatch.setattr("lrlora.learned.shrinking._metrics", lambda *given: {"accuracy": 1.0, "seen": [][0]})
    with pytest.raises(IndexError):
        shrink(trainer, keep=0.9)
    assert all(map(torch.equal, whole, trained(model)))
    again = trainer_of(tmp_path, model)
    again.add_callback(FittedRanksCallback(keep=0.9, trainer=again))
    with pytest.raises(IndexError):  # not a refusal: other processes may not have it
        again.train()
    assert sum(p.numel() for p in trained(model)) == sum(p.numel() for p in whole)


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    next(p for name, p in trainer.model.named_parameters() if "lora_A" in name).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"q_proj .*NaN"):
        shrink(trainer)
    assert list(tmp_path.glob("whole*")) == []


def test_training_data_is_not_held_out(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    trainer.eval_dataset = trainer.train_dataset
    with pytest.raises(ValueError, match=r"eval_dataset .*train_dataset.* on='train'"):
        shrink(trainer)


@pytest.mark.refused
@pytest.mark.parametrize("at", [0.5, None])
@pytest.mark.parametrize("data", [None, Pairs(512, 0)])
def test_the_callback_does_not_ask_for_an_option_of_shrink(data: Any, at: float | None, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()), train_dataset=data or Pairs(512, 0))
    trainer.eval_dataset = data
    trainer.add_callback(FittedRanksCallback(keep=0.9, at=at, trainer=trainer))
    with pytest.raises(ValueError, match=r"eval_dataset(?!.*\bon=)"):
        trainer.train()


def test_a_cut_while_training_and_one_at_the_end_resume_together(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        made = trainer_of(tmp_path, lora(TinyModel("llama").build()))
        made.args.save_strategy, made.args.save_steps = "steps", 30
        made.add_callback(FittedRanksCallback("r4", trainer=made))
        made.add_callback(FittedRanksCallback(keep=0.9, trainer=made))
        return made

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    data = Pairs(400, 2)
    assert loss_of(resumed.model, data) == pytest.approx(loss_of(whole.model, data), rel=1e-5)
    assert [p.shape for p in trained(resumed.model)] == [p.shape for p in trained(whole.model)]
