"""What cannot be done is refused before the first step; what was asked for is what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lrlora import LearnedRanks, LearnedRanksCallback, shrink
from lrlora.lora.live import lora_layers

from ..conftest import TinyModel
from ..processes import run
from .test_cut_by_share import learned_of, share_of
from .test_learned_ranks import STEPS, trained, with_lora
from .test_misuse import adam, size_of, step
from .test_shrinking import Pairs, Weighted, lora, trainer_of


def largest_rank(model: Any) -> int:
    return max(layer.r["default"] for layer in lora_layers(model, "default").values())


@pytest.mark.parametrize("options", [{"keep": 0.9}, {"keep": 0.9, "at": 0.5}, {"size": "r1"}])
def test_a_callback_belongs_to_one_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    first, second = (trainer_of(tmp_path / name, lora(TinyModel("llama").build())) for name in "ab")
    second.add_callback(LearnedRanksCallback(trainer=first, **options))
    with pytest.raises(ValueError, match="belongs to another Trainer"):
        second.train()
    assert second.state.global_step == 0


def test_a_second_training_logs_the_rate_at_which_it_trains(tmp_path: Path) -> None:
    model = lora(TinyModel("llama").build())
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    trainer = trainer_of(tmp_path, model, optimizers=(optimizer, schedule))
    trainer.args.logging_steps = 1
    trainer.add_callback(LearnedRanksCallback("r1", trainer=trainer))
    trainer.train()
    trainer.args.max_steps = 1
    rate: list[float] = []
    before: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *given: before.extend(p.detach().clone() for p in trained(model)))
    optimizer.register_step_post_hook(
        lambda *given: rate.extend(
            ((was - now).norm() / now.grad.norm()).item()  # type: ignore[union-attr]
            for was, now in zip(before, trained(model), strict=True)
            if now.grad is not None and now.grad.any()
        )
    )
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == [0.05]
    assert rate == pytest.approx([0.05] * len(rate), rel=1e-2)


def test_a_gain_that_is_not_seen_when_printed_is_none(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    trainer.args.learning_rate = 1e-7
    trainer.train()
    with pytest.raises(ValueError, match="gains nothing"):
        shrink(trainer)
    assert size_of(trainer.model) == size_of(lora(TinyModel("llama").build()))


@pytest.mark.parametrize("eval_dataset", [Pairs(192, 1), "noise"])
def test_the_largest_rank_holds_where_no_share_is_kept(eval_dataset: Any, tmp_path: Path) -> None:
    """Neither where less rank keeps too little, nor where nothing is gained."""
    if eval_dataset == "noise":
        eval_dataset = Pairs(192, 1)
        eval_dataset.ids = torch.randint(3, 99, (192, 8), generator=torch.Generator().manual_seed(0))
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()), eval_dataset=eval_dataset)
    trainer.add_callback(LearnedRanksCallback(keep=0.9999, at=0.5, max_rank=1, trainer=trainer))
    trainer.train()
    assert learned_of(trainer).shrunk is None
    assert "max_rank=1" in learned_of(trainer).summary
    assert largest_rank(trainer.model) == 1
    trainer.save_model(str(tmp_path / "small"))
    tiny = TinyModel("llama")
    small = PeftModel.from_pretrained(tiny.build(), tmp_path / "small").eval()
    assert torch.allclose(tiny.logits(small), tiny.logits(trainer.model.eval()), atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("stop", [4, 20])  # before and after the cut
def test_a_loop_that_ends_early_can_be_shrunk_and_saved(stop: int, tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    model = lora(tiny.build())
    optimizer = torch.optim.AdamW(trained(model), lr=2e-2)
    LearnedRanks(model, optimizer, size="r4", steps=60, at=0.1)
    batches = [{"input_ids": ids, "labels": ids} for ids in Pairs(240, 0).ids.split(16)]
    for batch in batches[:stop]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = shrink(model, batches[:4], batches[4:], keep=0.9)
    assert found.parameters == size_of(model) < size_of(lora(TinyModel("llama").build()))
    model.save_pretrained(tmp_path)
    small = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert torch.allclose(tiny.logits(small), tiny.logits(model.eval()), atol=1e-5)


@pytest.mark.refused
@pytest.mark.parametrize("at", [0.5, None])
def test_batches_that_are_too_few_are_refused_before_training(at: float | None, tmp_path: Path) -> None:
    """Of a loss that only the Trainer's own code tells from the model's."""
    made = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    trainer = Weighted(made.model, made.args, train_dataset=made.train_dataset, eval_dataset=made.eval_dataset)
    trainer.add_callback(LearnedRanksCallback(keep=0.9, at=at, trainer=trainer))
    with pytest.raises(ValueError, match=r"\b24 held-out batches .*90 batches"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.refused
def test_learned_ranks_ask_for_what_they_take() -> None:
    _, model = with_lora("mlp")
    for options in ({}, {"size": "r1", "keep": 0.9}):
        with pytest.raises(ValueError, match=r"exactly one of size and keep") as error:
            LearnedRanks(model, adam(model), steps=100, **options)  # type: ignore[arg-type]
        assert "energy" not in str(error.value)
    for keep in ("99%", 99, float("nan"), True):
        with pytest.raises(ValueError, match=r"keep .*\(0, 1\).* got"):
            LearnedRanks(model, adam(model), steps=100, keep=keep, held_out=[1])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"keep .*\(0, 1\).* got"):
            shrink(model, [1], [1], keep=keep)  # type: ignore[arg-type]


def test_a_callback_that_was_added_twice_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    for _ in range(2):
        trainer.add_callback(LearnedRanksCallback("r1", trainer=trainer))
    with pytest.raises(ValueError, match="two callbacks"):
        trainer.train()
    trainer.pop_callback(LearnedRanksCallback)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("options", [{"size": "r1", "at": 0.8}, {"keep": 0.9, "at": 0.8}])
def test_a_plain_run_goes_on_with_learned_ranks(options: dict[str, Any], tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    plain.args.save_strategy, plain.args.save_steps = "steps", 20
    plain.train()
    again = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    again.add_callback(LearnedRanksCallback(trainer=again, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert learned_of(again).cut_step == 48
    assert size_of(again.model) < size_of(plain.model)
    late = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    late.add_callback(LearnedRanksCallback(trainer=late, **options))
    with pytest.raises(ValueError, match=r"40 steps without learned ranks.* at=1\b"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))


class Faulty(nn.Module):
    """Fails in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = lora(TinyModel("llama").build())

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        if not self.training:
            raise TypeError("no mask")
        return self.inner(input_ids=input_ids, labels=labels)


def test_an_error_of_the_model_is_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Faulty())
    trainer.add_callback(LearnedRanksCallback(keep=0.9, trainer=trainer))
    with pytest.raises(TypeError, match="no mask"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_bar_promises_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = share_of(tmp_path)
    trainer.train()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Shrinking")]
    assert said
    assert not any("%|" in line or "/" in line.partition("batch")[0] for line in said)


def test_too_few_examples_of_a_loop_are_refused_before_training() -> None:
    tiny, model = with_lora("llama")
    ids = Pairs(16, 0).ids
    batches = [{"input_ids": ids, "labels": ids}] * 3
    with pytest.raises(ValueError, match="48 held-out examples are too few"):
        LearnedRanks(model, adam(model), keep=0.9, held_out=batches, steps=STEPS)
    step(tiny, model, adam(model), 1)


def test_a_gain_of_many_units_takes_little_memory() -> None:
    code = (
        "import resource, torch; from lrlora.learned import Gain; w = torch.rand(10_000, 2).double() + 0.5; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; Gain(w, 0.9 * w).kept(0.91 * w); "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    assert int(run(code)) < 128  # MiB


def test_the_loss_is_not_taken_for_the_model_s_own_in_batches_of_one(tmp_path: Path) -> None:
    """In batches of one example, weights cancel: the loss of the training is not the model's own."""
    made = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    made.args.per_device_eval_batch_size = 1
    trainer = Weighted(made.model, made.args, train_dataset=made.train_dataset, eval_dataset=made.eval_dataset)
    trainer.train()
    assert shrink(trainer, keep=0.9).unit == "held-out batches"
