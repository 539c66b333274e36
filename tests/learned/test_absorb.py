"""What was cut stays zero, whatever trains; and is left out of what is saved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lrlora import FittedRanks, FittedRanksCallback
from lrlora.adapters import Factors
from lrlora.learned import LossCurve

from ..conftest import TinyModel
from ..train.small import size_of
from .test_fitted_ranks import CUT, STEPS, StopAfter, fit, trained, trainer_of, weights_of, with_lora


def until(learned: FittedRanks, tiny: TinyModel, model: Any, optimizer: Any, step: int) -> None:
    while learned._done < step:
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("lr", [1e-4, 0.3])
def test_no_row_of_a_is_smaller_after_the_cut_so_that_b_keeps_its_speed(lr: float) -> None:
    tiny, model = with_lora("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=lr)

    def norms(path: str) -> list[Tensor]:
        layer = model.get_base_model().get_submodule(path)
        return [
            layer.lora_A["default"].weight.detach().norm(dim=1),
            layer.lora_B["default"].weight.detach().norm(dim=0),
        ]

    wide: dict[str, float] = {}

    def noted(curve: LossCurve, budget: int, max_rank: int | None) -> list[Factors]:
        paths = [of.whole.module for of in curve.modules]
        wide.update({path: norms(path)[0].square().mean().sqrt().item() for path in paths})
        return curve.within(budget, max_rank)

    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS, criterion=noted)
    until(learned, tiny, model, optimizer, learned.cut_step)
    grown = False
    for path, rank in (learned.ranks or {}).items():
        rows, columns = (norm[:rank] for norm in norms(path))
        assert torch.allclose(rows, columns.clamp(min=wide[path]), rtol=1e-3)
        grown |= bool((rows > 1.01 * wide[path]).any())
    assert grown == (lr > 0.1)  # where B has grown, both have equal norms


def test_an_ema_is_saved_if_it_began_after_the_cut(tmp_path: Path) -> None:
    tiny, model = with_lora("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    averages = []
    for step in range(STEPS - 1):
        if step in (1, learned.cut_step):
            averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
        until(learned, tiny, model, optimizer, step + 1)
        for each in averages:
            each.update_parameters(model)
    early, late = (each.module for each in averages)
    late.save_pretrained(tmp_path / "late")
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "late").eval()
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(late.eval()))
    assert size_of(tmp_path / "late") <= 2176
    with pytest.warns(UserWarning, match="it is wide"):
        early.save_pretrained(tmp_path / "early")


def test_what_is_saved_in_the_midst_of_training_is_small_and_the_same(tmp_path: Path) -> None:
    tiny, model = with_lora("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    until(learned, tiny, model, optimizer, 25)
    model.eval()
    gathered = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    assert model.peft_config["default"].r == 8  # the model trains on
    for name in ("own", "gathered"):
        assert size_of(tmp_path / name) <= 2176
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / name).eval()
        torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model))
        # And what was saved is loaded back, into the wide model.
        other = with_lora("llama")[1]
        FittedRanks(other, torch.optim.SGD(trained(other), lr=0.1), size="r2", steps=STEPS)
        other.load_adapter(tmp_path / name, "default", is_trainable=True)
        assert torch.equal(tiny.logits(other.eval()), tiny.logits(model))


def test_an_own_loop_resumes_to_the_bit() -> None:
    states: dict[int, Any] = {}

    def run(begin: int, end: int) -> list[Tensor]:
        tiny, model = with_lora("llama")
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
        learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
        if begin:
            model.load_state_dict(states[begin]["model"])
            optimizer.load_state_dict(states[begin]["optimizer"])
            learned.load_state_dict(states[begin]["ranks"])
        for step in range(begin + 1, end + 1):
            until(learned, tiny, model, optimizer, step)
            if step in (5, CUT, 25) and not begin:
                parts = {"model": model, "optimizer": optimizer, "ranks": learned}
                states[step] = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        return [p.detach().clone() for p in trained(model)]

    expected = run(0, STEPS)
    for step in states:
        assert all(map(torch.equal, run(step, STEPS), expected)), step


def test_a_state_from_before_the_cut_is_loaded_after_it() -> None:
    tiny, model = with_lora("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    parts = {"model": model, "optimizer": optimizer, "ranks": learned}
    until(learned, tiny, model, optimizer, CUT - 4)
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    results = []
    for _ in range(2):
        until(learned, tiny, model, optimizer, 25)
        results.append([p.detach().clone() for p in trained(model)])
        for name, part in parts.items():
            part.load_state_dict(before[name])
        assert learned.ranks is None
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("has_another", [False, True])
def test_a_state_from_after_the_end_is_loaded(has_another: bool) -> None:
    def build() -> tuple[TinyModel, Any]:
        tiny, model = with_lora("llama")
        if has_another:
            model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear"))
            model.set_adapter("default")
        return tiny, model

    tiny, model = build()
    learned = fit(tiny, model, "r1", steps=80)
    assert learned.ranks is not None
    assert 0 in learned.ranks.values()
    _, other = build()
    again = FittedRanks(other, torch.optim.AdamW(trained(other), lr=5e-3), size="r1", steps=80)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(learned.state_dict())
    assert torch.allclose(tiny.logits(other.eval()), tiny.logits(model), atol=1e-6)


def test_a_state_of_the_base_model_leaves_the_adapter_as_it_is() -> None:
    _, model = with_lora("llama")
    FittedRanks(model, torch.optim.AdamW(trained(model), lr=5e-3), size="r2", steps=STEPS)
    before = [weight.detach().clone() for weight in trained(model)]
    model.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "lora_" not in name}, strict=False
    )
    assert all(map(torch.equal, before, trained(model)))


def test_a_small_adapter_is_loaded_while_another_is_active(tmp_path: Path) -> None:
    tiny, model = with_lora("llama")
    fit(tiny, model, "r2")
    model.save_pretrained(tmp_path)
    _, other = with_lora("llama")
    other.add_adapter("other", LoraConfig(r=3, target_modules="all-linear"))
    FittedRanks(other, torch.optim.AdamW(trained(other), lr=5e-3), size="r2", steps=STEPS)
    other.set_adapter("other")
    other.load_adapter(tmp_path, "default", is_trainable=True)
    other.set_adapter("default")
    assert torch.allclose(tiny.logits(other.eval()), tiny.logits(model), atol=1e-6)


def test_a_moved_checkpoint_resumes_with_its_own_moments(tmp_path: Path) -> None:
    """Not with those of another run in the output folder."""
    results = []
    for name, seed in (("a", 1), ("b", 2)):
        whole = trainer_of(tmp_path / f"whole-{name}", FittedRanksCallback("r2"), seed=seed, dropout=0.0)
        whole.train()
        results.append(weights_of(whole))
        stopped = trainer_of(tmp_path / name, FittedRanksCallback("r2"), StopAfter(5), seed=seed, dropout=0.0)
        with pytest.warns(UserWarning, match="before the cut"):
            stopped.train()
    (tmp_path / "a" / "checkpoint-5").rename(tmp_path / "moved")
    resumed = trainer_of(tmp_path / "b", FittedRanksCallback("r2"), seed=1, dropout=0.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert all(torch.equal(results[0][name], value) for name, value in weights_of(resumed).items())


@pytest.mark.parametrize(
    ("options", "warm_up"), [({"at": 0.001, "steps": 100}, 0), ({"at": 0.05, "steps": 20}, 0), ({"steps": 20}, 10)]
)
def test_the_ranks_are_not_those_of_the_first_modules(options: dict[str, Any], warm_up: int) -> None:
    tiny, model = with_lora("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= warm_up))
    learned = FittedRanks(model, optimizer, size="r2", **options)

    def run() -> None:
        for _ in range(10):
            tiny.loss(model).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    if warm_up:
        with pytest.raises(ValueError, match=r"No gradient .*\bstep 6\b"):
            run()
        return
    run()
    assert learned.ranks is not None
    assert learned.cut_step == 3
    ranks = list(learned.ranks.values())
    assert ranks != sorted(ranks, reverse=True)


def test_the_largest_rank() -> None:
    tiny, model = with_lora("llama")
    learned = fit(tiny, model, max_rank=3)
    assert learned.ranks is not None
    assert max(learned.ranks.values()) == 3


def test_one_dimensional_inputs() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    learned = FittedRanks(model, optimizer, size="r1", steps=20)
    for _ in range(20):
        model(torch.randn(6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned.ranks is not None


def test_a_model_that_learns_is_pickled_and_copied_without_the_optimizer(tmp_path: Path) -> None:
    tiny, model = with_lora("mlp")
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    for step in (1, 10, 30):  # before, in and after the steps that give moments
        until(learned, tiny, model, optimizer, step)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(tiny.logits(other.eval()), tiny.logits(model.eval()))
            tiny.loss(other).backward()
        model.train()
        largest = 4 * sum(p.numel() for p in model.parameters()) + 100_000
        assert (tmp_path / "model.pt").stat().st_size < largest  # no state of the optimizer
    until(learned, tiny, model, optimizer, STEPS)
    assert learned.ranks is not None
