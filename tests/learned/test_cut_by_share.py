"""Fitted ranks cut to a share of the gain, measured while training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from lrlora import FittedRanks, FittedRanksCallback, shrink
from lrlora.learned.live_cut import LiveCut
from lrlora.lora.live import lora_layers
from lrlora.shrunk import Kept, Shrunk

from ..conftest import TinyModel
from .test_fitted_ranks import trained
from .test_shrinking import Pairs, lora, loss_of, trainer_of


def share_of(folder: Path, callback: Any = None, **options: Any) -> Any:
    """Trainer of 60 steps that cuts to 90 % of the gain at half of them."""
    trainer = trainer_of(folder, lora(TinyModel("llama").build()), **options)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 10
    trainer.add_callback(FittedRanksCallback(keep=0.9, at=0.5, trainer=trainer))
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


def learned_of(trainer: Any) -> Any:
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, FittedRanksCallback))
    return callback.learned


def test_a_trainer_is_cut_to_a_share_of_the_gain_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = TinyModel("llama")
    whole = trainer_of(tmp_path / "whole", lora(tiny.build()))
    whole.train()
    capsys.readouterr()
    trainer = share_of(tmp_path / "cut")
    trainer.train()
    learned = learned_of(trainer)
    found = learned.shrunk
    assert found is not None
    assert learned.cut_step == 30
    assert found.ranks == learned.ranks
    assert found.parameters == sum(p.numel() for p in trained(trainer.model)) < found.whole
    assert learned.rate == pytest.approx((found.whole / found.parameters) ** 0.5)
    said = capsys.readouterr().out
    assert f"{found} From here, the adapter learns at {learned.rate:.3g} times" in said
    assert said.index(str(found)) < said.index("train_runtime") < said.index(f"{found.end_loss:.4g}")
    assert found.end_loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=5e-3)  # on a sample
    assert found.step == 30
    new = Pairs(400, 2)
    without, ideal, cut = (loss_of(model, new) for model in (tiny.build(), whole.model, trainer.model))
    assert without - cut > 0.8 * (without - ideal)
    trainer.save_model(str(tmp_path / "small"))
    small = PeftModel.from_pretrained(tiny.build(), tmp_path / "small").eval()
    assert torch.allclose(tiny.logits(small), tiny.logits(trainer.model.eval()), atol=1e-5)


def test_the_cost_of_a_cut_is_told_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passes = []

    class Counter(TrainerCallback):
        def on_train_begin(self, *event: Any, model: Any, **kwargs: Any) -> None:
            model.register_forward_hook(lambda module, inputs, output: passes.append(not module.training))
            (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("The cut after step"))
            self.told = [int(number) for number in re.findall(r"\d+", told)]

    counter = Counter()
    share_of(tmp_path, counter).train()
    step, expected, steps = counter.told
    assert (step, steps) == (30, 60)
    assert expected / 2 < sum(passes) < 2 * expected


@pytest.mark.parametrize(("rate", "is_early"), [(2e-2, False), (5e-4, True)])
def test_a_training_far_from_its_end_is_told(
    rate: float, is_early: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the growth of the update before the cut, which has a far too low rate to reach its end."""
    norms = {}

    class Norms(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            updates = [layer.get_delta_weight("default") for layer in lora_layers(model, "default").values()]
            norms[state.global_step] = torch.stack([update.norm() for update in updates]).norm().item()

    trainer = share_of(tmp_path, Norms())
    trainer.args.learning_rate = rate
    trainer.train()
    shrunk = learned_of(trainer).shrunk
    assert shrunk.growth == pytest.approx(norms[29] / norms[15], rel=0.1)
    assert shrunk.loss_before > shrunk.loss
    assert ("far from its end" in capsys.readouterr().out) == is_early


@pytest.mark.parametrize(
    ("share", "before", "advice"),
    [
        (1.166, 2.7, "lower rate"),
        (0.995, 2.7, None),
        (0.995, 3.2, "Raise the learning rate"),
    ],
)
def test_advice_follows_the_held_out_loss(share: float, before: float, advice: str | None) -> None:
    """A share above all is a sign of overfitting; only while the loss falls is a training far from its end."""
    record = Shrunk(
        keep=0.99,
        kept=Kept(share, share - 0.01, share + 0.01),
        **{"loss": 2.9, "base": 3.352, "ranks": {"module": 2}, "parameters": 200, "whole": 1_600},
        **{"parameters_per_rank": 100, "units": 150, "unit": "held-out examples", "equal_rank": 4},
        **{"step": 60, "growth": 2.0, "loss_before": before},
    )
    advices = [each for each in ("lower rate", "Raise the learning rate") if each in str(record)]
    assert advices == ([advice] if advice else [])
    assert ("higher learning rate" in str(record)) == (share < 1)


@pytest.mark.parametrize("step", [20, 40])  # before and after the cut
def test_it_is_resumed_with_the_same_ranks(step: int, tmp_path: Path) -> None:
    whole = share_of(tmp_path / "whole")
    whole.train()
    first = share_of(tmp_path / "first")
    first.train()
    again = share_of(tmp_path / "first")
    again.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{step}"))
    assert learned_of(again).ranks == learned_of(whole).ranks
    stored = json.loads((tmp_path / "first" / "checkpoint-60" / "trainer_state.json").read_text())
    assert "FittedRanksCallback" in stored["stateful_callbacks"]
    mine, theirs = ({n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (whole, again))
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)


@pytest.mark.parametrize("is_before", [True, False])
def test_the_best_checkpoint_stays_the_best_and_is_cut(
    is_before: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = share_of(tmp_path)
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 10
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
    trainer.args.greater_is_better = is_before  # the first evaluation, or the last
    trainer.train()
    best, cut_step = trainer.state.best_global_step, learned_of(trainer).cut_step
    assert best == (10 if is_before else 60)
    assert ("before the cut" in capsys.readouterr().out) == is_before
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, FittedRanksCallback))
    record = callback.shrunk
    assert record is not None
    assert record.step == (None if is_before else cut_step)
    assert sum(p.numel() for p in trained(trainer.model)) == record.parameters < record.whole
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert abs(trainer.evaluate()["eval_loss"] - logged[best]) < 0.2 * record.gain
    trainer.save_model(str(tmp_path / "small"))
    again = PeftModel.from_pretrained(TinyModel("llama").build(), str(tmp_path / "small"))
    assert loss_of(again, Pairs(400, 2)) == pytest.approx(loss_of(trainer.model, Pairs(400, 2)), rel=1e-5)


def test_without_a_gain_nothing_is_cut(tmp_path: Path) -> None:
    """Random labels are learned by heart."""
    tiny = TinyModel("llama")
    generator = torch.Generator().manual_seed(0)
    noise = Pairs(192, 1)
    noise.ids = torch.randint(3, 99, (192, 8), generator=generator)
    trainer = share_of(tmp_path, eval_dataset=noise)
    wide = sum(p.numel() for p in trained(trainer.model))
    trainer.train()
    learned = learned_of(trainer)
    assert learned.shrunk is None
    assert learned.summary.startswith("Nothing was cut at step 30: The adapter gains nothing")
    assert learned.rates == pytest.approx([group["lr"] for group in trainer.optimizer.param_groups])
    assert sum(p.numel() for p in trained(trainer.model)) == wide
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "adapter").eval()
    assert torch.allclose(tiny.logits(loaded), tiny.logits(trainer.model.eval()), atol=1e-5)


def test_what_is_no_refusal_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process alone, going on would let the others wait for ever."""

    def run_out(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LiveCut, "smallest", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        share_of(tmp_path).train()


def test_the_whole_adapter_keeps_its_gain_however_its_losses_round(tmp_path: Path) -> None:
    """In half precision, equal updates have unequal losses."""
    runs = []
    for folder, keep in (("plain", None), ("whole", 0.99999)):
        trainer = trainer_of(tmp_path / folder, lora(TinyModel("llama").build().bfloat16()))
        if keep is not None:
            trainer.add_callback(FittedRanksCallback(keep=keep, at=0.5, trainer=trainer))
        trainer.train()
        runs.append(trainer)
    learned = learned_of(runs[1])
    assert learned.summary.startswith("Nothing was cut at step 30: No smaller LoRA")
    assert learned.shrunk.kept == (1.0, 1.0, 1.0)
    assert learned.shrunk.sizes[0] == learned.shrunk.parameters == learned.shrunk.whole
    states = [{name: p for name, p in run.model.named_parameters() if p.requires_grad} for run in runs]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_in_a_loop_of_one_s_own() -> None:
    torch.manual_seed(0)
    model = lora(TinyModel("mlp").build(), target_modules=["first", "last"])
    target = nn.Linear(16, 2).weight.detach()
    x = torch.randn(600, 16)
    y = torch.zeros(600, 8)
    y[:, :2] = x @ target.T

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        errors = (model(batch[0]) - batch[1]).square()
        return errors.sum(1), torch.full((len(errors),), errors.shape[1])

    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    held_out = list(zip(x[300:].split(50), y[300:].split(50), strict=True))
    ranks = FittedRanks(model, optimizer, keep=0.9, held_out=held_out, loss=loss, steps=200)
    for _ in range(200):
        (model(x[:300]) - y[:300]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks.shrunk is not None
    assert ranks.parameters == sum(p.numel() for p in trained(model)) < ranks.shrunk.whole


def test_a_size_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    trainer.train()
    found = shrink(trainer, size="r1")
    assert found.keep is None
    assert found.kept is not None
    assert found.parameters <= found.parameters_per_rank
    other = trainer_of(tmp_path / "other", lora(TinyModel("llama").build()))
    other.add_callback(FittedRanksCallback("r1", at=1.0, trainer=other))
    other.train()
    assert sum(p.numel() for p in trained(other.model)) == found.parameters


@pytest.mark.refused
def test_options_that_do_not_fit(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
    with pytest.raises(ValueError, match=r"rate .*at=1\b"):
        FittedRanksCallback(keep=0.9, trainer=trainer, rate=2.0)
    with pytest.raises(ValueError, match=r"\(at=1\) .*needs trainer"):
        FittedRanksCallback("r1", at=1.0)
    model: Any = trainer.model
    optimizer = torch.optim.AdamW(trained(model))
    for options, said in (
        ({"size": "r1", "keep": 0.9}, "exactly one of"),
        ({}, "exactly one of"),
        ({"size": "r1", "rate": 0.0}, "rate must be a positive factor"),
    ):
        with pytest.raises(ValueError, match=said):
            FittedRanks(model, optimizer, steps=100, **options)


@pytest.mark.parametrize("options", [{"keep": 0.9, "at": 0.5}, {"keep": 0.9}, {"size": "r1", "at": 1.0}])
def test_a_run_that_restores_the_states_of_callbacks_is_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    def trainer() -> Any:
        made = trainer_of(tmp_path, lora(TinyModel("llama").build()))
        made.args.restore_callback_states_from_checkpoint = True
        made.args.save_strategy, made.args.save_steps = "steps", 20
        made.add_callback(FittedRanksCallback(trainer=made, **options))
        return made

    first = trainer()
    first.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    sizes = [sum(p.numel() for p in trained(each.model)) for each in (first, again)]
    assert sizes[0] == sizes[1] < sum(p.numel() for p in trained(lora(TinyModel("llama").build())))


def scalar(model: nn.Module, batch: Any) -> Any:
    return model(*batch).mean()


def drawn_anew(model: nn.Module, batch: Any) -> Any:
    errors = (model(*batch) - torch.randn(8, 8)).square()
    return errors.sum(1), torch.full((8,), 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": scalar}, r"loss .*\(examples,\).* shape \(\)"),
        ({"loss": drawn_anew}, r"loss .*the same each time.*Store"),
        ({}, r"Pass loss"),
    ],
)
def test_a_loss_that_cannot_be_measured_is_refused_before_training(options: Any, said: str) -> None:
    model = lora(TinyModel("mlp").build(), target_modules=["first", "last"])
    batches = 9 * [(torch.randn(8, 16),)]
    with pytest.raises(ValueError, match=said):
        FittedRanks(model, torch.optim.AdamW(trained(model)), keep=0.9, held_out=batches, steps=20, **options)
    with pytest.raises(ValueError, match=said):
        shrink(model, [(torch.randn(8, 16),)], batches, **options)


def detached(model: nn.Module, batch: Any) -> Any:
    errors = (model(*batch) - batch[0][:, :8]).square().detach()
    return errors.sum(1), torch.full((8,), 8)


def test_training_batches_are_not_held_out_and_a_loss_needs_a_graph() -> None:
    model = lora(TinyModel("mlp").build(), target_modules=["first", "last"])
    nn.init.normal_(model.get_base_model().last.lora_B["default"].weight)
    batches = [(torch.randn(8, 16),) for _ in range(24)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    for training, held_out in ((batches, batches), (batches[:12], batches[11:]), (loader, loader)):
        with pytest.raises(ValueError, match=r"held_out .*batches"):
            shrink(model, training, held_out, loss=detached)
    with pytest.raises(ValueError, match=r"loss .*graph.*detach\(\)"):
        shrink(model, batches[:12], batches[12:], loss=detached)


def test_a_size_needs_no_held_out_data(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()), eval_dataset=None)
    trainer.add_callback(FittedRanksCallback("r1", trainer=trainer))
    trainer.train()
    assert learned_of(trainer).ranks is not None


def test_a_loop_is_warned_that_nothing_was_cut() -> None:
    model = lora(TinyModel("llama").build())
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    ids = Pairs(16, 0).ids
    with pytest.raises(ValueError, match=r"keep .*held_out"):
        FittedRanks(model, optimizer, keep=0.9, steps=20)
    with pytest.raises(ValueError, match=r"criterion .*keep=0\.9 .*size"):
        FittedRanks(model, optimizer, keep=0.9, held_out=[ids], steps=20, criterion=lambda curve, *_: curve.within(9))
    held_out = [{"input_ids": part, "labels": part} for part in Pairs(120, 1).ids.split(10)]
    FittedRanks(model, optimizer, keep=0.9, held_out=held_out, steps=20)

    def train() -> None:
        for _ in range(20):
            noise = torch.randint(3, 99, (16, 8))
            model(input_ids=noise, labels=noise).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"Nothing was cut at step 6: The adapter gains nothing"):
        train()
