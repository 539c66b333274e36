"""What cannot be done is refused before the first step; what was asked for is what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lrlora import FittedRanks, FittedRanksCallback, shrink
from lrlora.learned import held_out
from lrlora.lora.live import lora_layers

from ..conftest import TinyModel
from ..processes import run
from .test_cut_by_share import learned_of, share_of
from .test_fitted_ranks import STEPS, trained, with_lora
from .test_misuse import adam, size_of, step
from .test_shrinking import Pairs, Weighted, lora, trainer_of


def largest_rank(model: Any) -> int:
    return max(layer.r["default"] for layer in lora_layers(model, "default").values())


@pytest.mark.parametrize("options", [{"keep": 0.9}, {"keep": 0.9, "at": 0.5}, {"size": "r1"}])
def test_a_callback_belongs_to_one_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    first, second = (trainer_of(tmp_path / name, lora(TinyModel("llama").build())) for name in "ab")
    second.add_callback(FittedRanksCallback(trainer=first, **options))
    with pytest.raises(ValueError, match="belongs to another Trainer"):
        second.train()
    assert second.state.global_step == 0


def test_a_second_training_logs_the_rate_at_which_it_trains(tmp_path: Path) -> None:
    model = lora(TinyModel("llama").build())
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    trainer = trainer_of(tmp_path, model, optimizers=(optimizer, schedule))
    trainer.args.logging_steps = 1
    trainer.add_callback(FittedRanksCallback("r1", trainer=trainer))
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
    trainer.add_callback(FittedRanksCallback(keep=0.9999, at=0.5, max_rank=1, trainer=trainer))
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
    FittedRanks(model, optimizer, size="r4", steps=60, at=0.1)
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
    trainer.add_callback(FittedRanksCallback(keep=0.9, at=at, trainer=trainer))
    with pytest.raises(ValueError, match=r"\b24 held-out batches .*90 batches"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.refused
def test_fitted_ranks_ask_for_what_they_take() -> None:
    _, model = with_lora("mlp")
    for options in ({}, {"size": "r1", "keep": 0.9}):
        with pytest.raises(ValueError, match=r"exactly one of size and keep") as error:
            FittedRanks(model, adam(model), steps=100, **options)  # type: ignore[arg-type]
        assert "energy" not in str(error.value)
    for keep in ("99%", 99, float("nan"), True):
        with pytest.raises(ValueError, match=r"keep .*\(0, 1\).* got"):
            FittedRanks(model, adam(model), steps=100, keep=keep, held_out=[1])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"keep .*\(0, 1\).* got"):
            shrink(model, [1], [1], keep=keep)  # type: ignore[arg-type]


def test_a_callback_that_was_added_twice_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    for _ in range(2):
        trainer.add_callback(FittedRanksCallback("r1", trainer=trainer))
    with pytest.raises(ValueError, match="two callbacks"):
        trainer.train()
    trainer.pop_callback(FittedRanksCallback)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("options", [{"size": "r1", "at": 0.8}, {"keep": 0.9, "at": 0.8}])
def test_a_plain_run_goes_on_with_fitted_ranks(options: dict[str, Any], tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    plain.args.save_strategy, plain.args.save_steps = "steps", 20
    plain.train()
    again = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    again.add_callback(FittedRanksCallback(trainer=again, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert learned_of(again).cut_step == 48
    assert size_of(again.model) < size_of(plain.model)
    late = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    late.add_callback(FittedRanksCallback(trainer=late, **options))
    with pytest.raises(ValueError, match=r"40 steps without fitted ranks.* at=1\b"):
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
    trainer.add_callback(FittedRanksCallback(keep=0.9, trainer=trainer))
    with pytest.raises(TypeError, match="no mask"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_out_of_memory_is_not_taken_for_a_loss_that_the_model_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB.")

    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    monkeypatch.setattr(held_out, "model_loss", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        shrink(trainer)


def test_the_bar_promises_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = share_of(tmp_path)
    trainer.train()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Shrinking")]
    assert said
    assert not any("%|" in line or "/" in line.partition("batch")[0] for line in said)


def test_too_few_examples_of_a_loop_are_refused_before_training() -> None:
    _, model = with_lora("llama")
    ids = Pairs(16, 0).ids
    batches = [{"input_ids": ids, "labels": ids}] * 3
    with pytest.raises(ValueError, match="48 held-out examples are too few"):
        FittedRanks(model, adam(model), keep=0.9, held_out=batches, steps=STEPS)


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


def test_a_refused_shrink_leaves_the_learning_as_it_was() -> None:
    tiny, model = with_lora("llama")
    optimizer = adam(model)
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    step(tiny, model, optimizer, 5)
    for options in ({}, {"keep": 99}):
        with pytest.raises(ValueError, match=r"batches|keep"):
            shrink(model, **options)  # type: ignore[arg-type]
    step(tiny, model, optimizer, STEPS - 5)
    assert learned.ranks is not None


@pytest.mark.refused
def test_what_a_trainer_has_itself_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    batch = {"input_ids": Pairs(8, 0).ids, "labels": Pairs(8, 0).ids}
    for options in ({"batches": [batch]}, {"held_out": [batch]}, {"loss": lambda model, batch: None}):
        with pytest.raises(ValueError, match="own batches and loss"):
            shrink(trainer, **options)  # type: ignore[arg-type]
    model: Any = trainer.model
    with pytest.raises(ValueError, match="loss of its own"):
        FittedRanks(model, adam(model), keep=0.9, held_out=trainer, steps=60, loss=lambda *_: (torch.ones(1),) * 2)


@pytest.mark.parametrize("options", [{"keep": 0.9}, {"size": "r1"}])
def test_one_callback_that_was_added_twice_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    callback = FittedRanksCallback(trainer=trainer, **options)
    for _ in range(2):
        trainer.add_callback(callback)
    with pytest.raises(ValueError, match="added to the Trainer twice"):
        trainer.train()


class Numbers(nn.Module):
    """One number for each example, and the loss of a function."""

    def __init__(self, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.inner, self.shape = lora(TinyModel("mlp").build(), target_modules=["first", "last"]), shape
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.inner(x)).reshape(len(x), *self.shape)
        loss = None if labels is None else (logits.flatten() - labels.flatten()).square().mean()
        return SequenceClassifierOutput(loss, logits)


def numbers_trainer(folder: Path, labels: Tensor, loss: Any = None, shape: tuple[int, ...] = (1,)) -> Any:
    torch.manual_seed(0)
    x = torch.randn(len(labels), 16)
    rows = [{"x": each, "labels": label} for each, label in zip(x, labels, strict=True)]
    made = trainer_of(folder, Numbers(shape), train_dataset=rows[:64], eval_dataset=rows[64:], compute_loss_func=loss)
    made.args.per_device_eval_batch_size = 2
    return made


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (None, ()),
        (None, (1,)),
        (lambda out, labels, num_items_in_batch: (out.logits.flatten() - labels.flatten()).abs().mean(), (1,)),
    ],
)
def test_noise_gains_nothing_over_the_best_constant(loss: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    """For labels (examples, 1), outputs (examples,), and a loss whose best constant is the median."""
    generator = torch.Generator().manual_seed(0)
    labels = 3 + 10 * (torch.rand(464, 1, generator=generator) < 0.15).float()
    trainer = numbers_trainer(tmp_path, labels, loss, shape)
    trainer.train()
    with pytest.raises(ValueError, match="gains nothing"):
        shrink(trainer, keep=0.9)


def test_logits_may_be_edited_in_place_by_a_loss(tmp_path: Path) -> None:
    def scaled(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        return (outputs.logits.mul_(2).flatten() - labels).square().mean()

    trainer = numbers_trainer(tmp_path, torch.randn(464, generator=torch.Generator().manual_seed(0)), scaled)
    trainer.add_callback(FittedRanksCallback(keep=0.9, trainer=trainer))
    with pytest.warns(UserWarning, match="gains nothing"):
        trainer.train()


def test_labels_without_a_constant_answer_are_measured(tmp_path: Path) -> None:
    """Such as lists of boxes."""
    tiny = TinyModel("llama")
    trainer = trainer_of(tmp_path, lora(tiny.build()))

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trainer.model

        def forward(self, input_ids: Tensor, labels: Any) -> Any:
            return {"loss": self.inner(input_ids=input_ids, labels=torch.stack(labels)).loss}

    def collated(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        ids = [row["input_ids"] for row in rows]
        return {"input_ids": torch.stack(ids), "labels": ids}

    made = trainer_of(tmp_path, Listed(), data_collator=collated)
    made.args.per_device_eval_batch_size, made.args.remove_unused_columns = 2, False
    made.train()
    assert shrink(made, keep=0.9).unit == "held-out batches"


class Choices(nn.Module):
    """Scores of the choices of an example, each a row of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 16)
        self.inner, self.head = lora(TinyModel("mlp").build(), target_modules=["first", "last"]), nn.Linear(8, 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.inner(self.embed(input_ids).mean(2)))[..., 0]
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


def test_the_place_of_the_right_choice_is_no_guess(tmp_path: Path) -> None:
    """A model that scores each choice alone cannot answer by its place."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (464, 3, 6), generator=generator)
    ids[:, 0, :4] = 7  # of the right one, which is always first
    rows = [{"input_ids": each, "labels": torch.tensor(0)} for each in ids]
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, Choices(), train_dataset=rows[:300], eval_dataset=rows[300:])
    trainer.train()
    found = shrink(trainer, keep=0.9)
    assert found.base > 0.5  # of a uniform answer, 1.1, or less without the adapter
    assert found.gain > 0.3


class WeightedInside(nn.Module):
    """A new head, and class weights in the model's own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = lora(TinyModel("mlp").build(), target_modules=["first", "last"]), nn.Linear(8, 2)
        self.head.weight.data.mul_(1e-3)
        self.head.bias.data.zero_()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.inner(x))
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels, torch.tensor([1.0, 4.0])), logits)


def test_weights_inside_the_model_are_seen_before_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(440, 16)
    rows = [{"x": each, "labels": (each[0] > 0).long()} for each in x]
    trainer = trainer_of(tmp_path, WeightedInside(), train_dataset=rows[:200], eval_dataset=rows[200:])
    trainer.add_callback(FittedRanksCallback(keep=0.9, trainer=trainer))
    with pytest.raises(ValueError, match="30 held-out batches"):
        trainer.train()
    assert trainer.state.global_step == 0
