"""Fitted ranks where the training loop, the optimizer or a restart does something unusual."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import EarlyStoppingCallback, Trainer

from lrlora import FittedRanks, FittedRanksCallback
from lrlora.lora.live import lora_layers

from ..conftest import TinyModel
from .test_fitted_ranks import CUT, STEPS, StopAfter, fit, shares_of, trained, trainer_of, weights_of, with_lora


def size_of(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=5e-3)


def step(tiny: TinyModel, model: Any, optimizer: Any, count: int) -> None:
    for _ in range(count):
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("settings", "stop"), [({"max_steps": 300}, 15), ({"max_steps": 24}, 5)])
def test_a_run_resumed_with_other_steps_logs_its_rates(tmp_path: Path, settings: dict[str, Any], stop: int) -> None:
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    best |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant", "logging_steps": 1}
    told = pytest.warns(UserWarning, match="before the cut") if stop < CUT else nullcontext()
    with told:
        trainer_of(tmp_path, FittedRanksCallback("r2"), StopAfter(stop), **best).train()
    callback = FittedRanksCallback("r2")
    trainer = trainer_of(tmp_path, callback, StopAfter(STEPS), **best, **settings)
    trainer.train(resume_from_checkpoint=True)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert callback.learned is not None
    wide = callback.learned.cut_step
    # The warm-up is a twentieth of the steps of the run that was cut: one.
    after = 5e-3 * callback.learned.rate
    assert callback.learned.rate == pytest.approx(2, rel=0.1)  # r = 8 to the size of r = 2
    assert logged == pytest.approx([5e-3] * wide + [after] * (len(logged) - wide))
    assert callback.learned.ranks is not None
    assert size_of(trainer.model) <= 2176


def test_a_resumed_schedule_does_not_take_the_rate_of_the_factors_for_that_of_the_optimizer(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    with pytest.warns(UserWarning, match="before the cut"):
        trainer_of(tmp_path, FittedRanksCallback("r2"), StopAfter(6), save_steps=5, **settings).train()
    resumed = trainer_of(tmp_path, FittedRanksCallback("r2"), StopAfter(7), save_steps=5, **settings)
    with pytest.warns(UserWarning, match="before the cut"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.optimizer is not None
    assert resumed.optimizer.param_groups[0]["lr"] == 5e-3


def test_a_configuration_serves_several_models() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    sizes = []
    for _ in range(2):
        tiny = TinyModel("llama")
        torch.manual_seed(1)
        model = get_peft_model(tiny.build(), config)
        fit(tiny, model, "r1")
        sizes.append(size_of(model))
    assert sizes[0] == sizes[1]
    assert (config.r, config.rank_pattern) == (8, {})


def test_an_adapter_with_the_same_configuration_keeps_its_own(tmp_path: Path) -> None:
    tiny, model = with_lora("llama")
    model.add_adapter("ref", model.peft_config["default"])
    fit(tiny, model, "r1")
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny.build(), tmp_path / "ref").peft_config["default"].r == 8


def test_a_start_that_does_not_allow_odd_ranks_is_no_hindrance(tmp_path: Path) -> None:
    tiny, model = with_lora("llama", init_lora_weights="orthogonal")
    learned = fit(tiny, model)
    assert learned.ranks is not None
    assert any(rank % 2 for rank in learned.ranks.values())
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.build(), tmp_path).eval()), tiny.logits(model))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_list_of_parameters_and_a_kept_loss_go_on(set_to_none: bool) -> None:
    tiny, model = with_lora("llama")
    parameters = trained(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    learned = FittedRanks(model, optimizer, size="r1", steps=STEPS)
    losses = []
    wide = size_of(model)
    for _ in range(STEPS + 2):
        loss = tiny.loss(model)  # is alive at the cut and at the end, and its graph with it
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
        assert norm > 0
        used = [p.grad for p in trained(model) if p.grad is not None]
        assert torch.stack([grad.norm() for grad in used]).norm() <= 1.1e-3
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        losses.append(loss)
    assert learned.ranks is not None
    assert {id(p) for p in trained(model)} <= {id(p) for p in parameters}
    assert size_of(model) < wide / 6


def test_a_failed_step_leaves_the_rate_as_it_was() -> None:
    tiny, model = with_lora("mlp")
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    learned = FittedRanks(model, optimizer, size="r2", steps=100)
    shares = shares_of(model, optimizer, model.get_base_model().last.lora_B["default"].weight)

    def fails() -> float:
        raise KeyError

    tiny.loss(model).backward()
    with pytest.raises(KeyError):
        optimizer.step(fails)
    for _ in range(60):
        optimizer.zero_grad()
        tiny.loss(model).backward()
        optimizer.step()
    assert shares[:29] == pytest.approx([1.0] * 29, rel=1e-3)
    assert shares[-1] == pytest.approx(learned.rate, rel=1e-3)
    assert learned.rate > 1.5
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_training_again_keeps_the_ranks(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, FittedRanksCallback("r2"))
    trainer.train()
    size, before = size_of(trainer.model), weights_of(trainer)
    trainer.train()
    assert size_of(trainer.model) == size
    assert all((before[name] != after).any() for name, after in weights_of(trainer).items())


def test_a_start_over_in_the_same_process(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, FittedRanksCallback("r2"), StopAfter(8))
    with pytest.warns(UserWarning, match="before the cut"):
        trainer.train()
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if type(c) is not StopAfter]
    trainer.train(resume_from_checkpoint=True)
    assert 0 < size_of(trainer.model) <= 2176


def test_a_run_stopped_after_the_cut_goes_on_in_the_same_process(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, FittedRanksCallback("r1"), StopAfter(20), dropout=0.0)
    trainer.train()
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if type(c) is not StopAfter]
    trainer.add_callback(StopAfter(25))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(tmp_path / "adapter"))
    assert size_of(PeftModel.from_pretrained(TinyModel("llama").build(), tmp_path / "adapter")) <= 1088
    again = trainer_of(tmp_path, FittedRanksCallback("r1"), dropout=0.0)  # in a new process
    assert again.train(resume_from_checkpoint=True).global_step == STEPS
    assert size_of(again.model) <= 1088
    whole = trainer_of(tmp_path / "whole", FittedRanksCallback("r1"), dropout=0.0)
    whole.train()
    expected, found = weights_of(whole), weights_of(again)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_a_finished_model_does_not_go_back() -> None:
    tiny, model = with_lora("llama")
    optimizer = adam(model)
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    before = learned.state_dict()
    step(tiny, model, optimizer, STEPS)
    with pytest.raises(ValueError, match=r"other ranks .*state"):
        learned.load_state_dict(before)
    assert learned.ranks is not None


def test_the_last_one_learns() -> None:
    tiny, model = with_lora("llama")
    first = FittedRanks(model, adam(model), size="r2", steps=STEPS)
    optimizer = adam(model)
    second = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    step(tiny, model, optimizer, STEPS)
    assert second.ranks is not None
    assert first.ranks is None


def test_a_state_of_another_size_or_for_another_adapter_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, FittedRanksCallback("r2"), StopAfter(30)).train()
    with pytest.raises(ValueError, match=r"size='r2', got 'r1'"):
        trainer_of(tmp_path, FittedRanksCallback("r1")).train(resume_from_checkpoint=True)
    _, model = with_lora("llama")
    learned = FittedRanks(model, adam(model), size="r2", steps=STEPS)
    state = {**learned.state_dict(), "ranks": {"model.layers.0.self_attn.q_proj": 9}}
    refused = r"other ranks .*state"
    with pytest.raises(ValueError, match=refused):
        learned.load_state_dict(state)
    step(*with_lora("llama")[:1], model, learned._inner, CUT - 2)
    for fields in ({"r": 6}, {"target_modules": ["q_proj"]}):
        _, model = with_lora("llama", **fields)
        other = FittedRanks(model, adam(model), size="r1", steps=STEPS)
        with pytest.raises(ValueError, match=refused):
            other.load_state_dict(learned.state_dict() | {"size": "r1"})


def test_a_copy_of_the_model_gives_no_moments() -> None:
    ranks = []
    for copies in (False, True):
        tiny, model = with_lora("llama")
        optimizer = adam(model)
        learned = FittedRanks(model, optimizer, size="r1", steps=STEPS)
        for at in range(STEPS):
            if copies and at < CUT:
                other = copy.deepcopy(model)
                (100 * tiny.loss(other) ** 3).backward()
            step(tiny, model, optimizer, 1)
        ranks.append(learned.ranks)
    assert ranks[0] == ranks[1]


def test_a_gradient_penalty() -> None:
    tiny, model = with_lora("mlp")
    optimizer = adam(model)
    learned = FittedRanks(model, optimizer, size="r2", steps=40)
    for _ in range(40):
        loss = tiny.loss(model)
        gradients = torch.autograd.grad(loss, trained(model), create_graph=True)
        (loss + 1e-3 * sum(each.square().sum() for each in gradients)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned.ranks is not None


def test_a_convolution_without_a_batch() -> None:
    ranks = []
    for shape in ((1, 3, 4), (3, 4)):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 5, 1))
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
        optimizer = adam(model)
        learned = FittedRanks(model, optimizer, size="60", steps=40)
        generator = torch.Generator().manual_seed(1)
        for _ in range(40):
            model(torch.randn(*shape, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ranks.append(learned.ranks)
    assert ranks[0] == ranks[1]


class Sam(torch.optim.Optimizer):
    """Steps with an optimizer of its own, as sharpness-aware minimization does."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=1e-2)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step()


def test_an_optimizer_around_another() -> None:
    tiny, model = with_lora("mlp")
    optimizer = Sam(trained(model))
    learned = FittedRanks(model, optimizer, size="r2", steps=40)
    shares = shares_of(model, optimizer.base_optimizer, model.get_base_model().last.lora_B["default"].weight)
    step(tiny, model, optimizer, 40)
    assert learned.ranks is not None
    assert shares[0] == pytest.approx(1)
    assert shares[-1] == pytest.approx(learned.rate, rel=1e-3)


@pytest.mark.filterwarnings(r"ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning:peft\.")
@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (lambda: with_lora("mlp", lora_alpha=-1)[1], {}, r"lora_alpha > 0, got -1 .*\bfirst\b"),
        (
            lambda: get_peft_model(
                TinyModel("mlp").build(), IA3Config(target_modules=["first"], feedforward_modules=["first"])
            ),
            {},
            r"one active LoRA adapter, got default \(IA3Config\)",
        ),
        (
            lambda: get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 1, groups=2)), LoraConfig(r=4, target_modules=["0"])),
            {},
            r"groups, .*\b0 has",
        ),
        (lambda: with_lora("llama", use_dora=True)[1], {}, r"Fitted ranks .*\buse_dora=True\b"),
        (lambda: with_lora("llama", bias="lora_only")[1], {}, r"Fitted ranks .*\bbias='lora_only'"),
        (
            lambda: with_lora("llama", init_lora_weights="pissa")[1],
            {},
            r"init_lora_weights='pissa', .*base weights",
        ),
        (
            lambda: with_lora("llama", init_lora_weights="OLoRA")[1],
            {},
            r"init_lora_weights='OLoRA', .*base weights",
        ),
        (
            lambda: with_lora("llama", target_modules=["q_proj", "embed_tokens"])[1],
            {},
            r"\bmodel\.embed_tokens ",
        ),
        (lambda: with_lora("llama")[1], {"size": "r8"}, r"size=r8 .*\bbelow the adapter's"),
        (lambda: with_lora("llama")[1], {"size": "1"}, r"size=1 .*\b64\. .*\br1\?"),
        (lambda: with_lora("mlp")[1], {"at": 0.99, "steps": 10}, r"\bat=0\.99 .*\bstep of 10\b"),
        (lambda: with_lora("mlp")[1], {"max_rank": 0}, r"max_rank .*≥ 1, got 0"),
        (lambda: with_lora("mlp")[1], {"size": "big"}, r"\bsize .*250000.* got 'big'"),
        (lambda: with_lora("mlp")[1], {"steps": 5}, r"\bsteps .*\b10 .*got 5"),
        (lambda: with_lora("mlp")[1], {"at": 1.0}, r"\bat .*between 0 and 1, got 1\.0"),
    ],
)
def test_models_and_arguments_that_are_refused(build: Any, options: dict[str, Any], said: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=said):
        FittedRanks(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"size": "r1", "steps": STEPS, **options})


def test_frozen_factors_are_refused() -> None:
    _, model = with_lora("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.get_base_model().first.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\bfirst .*is_trainable=True"):
        FittedRanks(model, optimizer, size="r2", steps=STEPS)


def test_an_adapter_with_a_weight_is_refused() -> None:
    """It would become part of α, and be applied twice."""
    _, model = with_lora("mlp")
    for layer in lora_layers(model, "default").values():
        layer.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"weight 1, but first has 0\.5"):
        FittedRanks(model, torch.optim.SGD(model.parameters(), lr=0.1), size="r2", steps=STEPS)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, rare: bool) -> Tensor:
        return self.rare(self.first(x)) if rare else self.first(x)


def test_a_module_that_was_not_used_before_the_cut_is_named() -> None:
    model = get_peft_model(Branches(), LoraConfig(r=4, target_modules=["first", "rare"]))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    FittedRanks(model, optimizer, size="r1", steps=200)
    with pytest.raises(ValueError, match=r"lora_A of rare .*target_modules"):  # noqa: PT012
        for at in range(60):
            model(torch.randn(2, 8), at < 10).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings(r"ignore:FSDP is switching to use `NO_SHARD`:UserWarning:torch\.")  # with one process
def test_wrappers_that_replace_parameters_are_refused_by_name() -> None:
    _, model = with_lora("mlp")
    with pytest.raises(ValueError, match=r"support DataParallel.*\bDDP\b"):
        FittedRanks(nn.DataParallel(model), adam(model), size="r2", steps=STEPS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        for each in (sharded, model):
            with pytest.raises(ValueError, match=r"support FSDP1 .*\bFSDP2\b"):
                FittedRanks(each, adam(sharded), size="r2", steps=STEPS)
    finally:
        dist.destroy_process_group()


def test_a_state_from_before_the_cut_in_the_live_model_is_refused_at_the_end() -> None:
    tiny, model = with_lora("llama")
    optimizer = adam(model)
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    step(tiny, model, optimizer, CUT - 2)
    wide = {name: value.clone() for name, value in model.state_dict().items()}
    step(tiny, model, optimizer, STEPS - CUT + 1)
    model.load_state_dict(wide)
    loss = tiny.loss(model).item()
    with pytest.raises(ValueError, match=r"cut from \S+ .*zero"):
        step(tiny, model, optimizer, 1)
    assert learned.ranks is not None
    assert tiny.loss(model).item() == pytest.approx(loss, rel=0.05)  # nothing was truncated


@pytest.mark.parametrize("skips", [False, True])
def test_a_scale_of_the_loss_does_not_change_the_cut(skips: bool) -> None:
    """It changes within the window of the moments; a step that overflows is dropped."""
    found = []
    for has_scaler in (False, True):
        tiny, model = with_lora("llama")
        optimizer = adam(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4, enabled=has_scaler)
        learned = FittedRanks(model, optimizer, size="r2", steps=80, scaler=scaler if has_scaler else None)
        for at in range(30):
            if has_scaler and skips and at in (15, 20):
                scaler.scale(tiny.loss(model)).backward()
                trained(model)[0].grad.fill_(torch.inf)  # type: ignore[union-attr]
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            scaler.scale(tiny.loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(learned.ranks)
    assert found[0] == found[1]


def test_float16_without_its_scaler_is_refused() -> None:
    tiny, model = with_lora("llama")
    FittedRanks(model, adam(model), size="r2", steps=STEPS)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"float16 .*scaler=scaler"):
        tiny.loss(model)


def test_a_second_trainer_logs_its_own_rates(tmp_path: Path) -> None:
    callback = FittedRanksCallback("r2")
    first = trainer_of(tmp_path, callback)
    first.train()
    arguments = copy.copy(first.args)
    arguments.learning_rate, arguments.logging_steps, arguments.lr_scheduler_type = 1e-4, 5, "constant"
    second = Trainer(first.model, arguments, train_dataset=first.train_dataset, callbacks=[callback])
    second.train()
    logged = [entry["learning_rate"] for entry in second.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([1e-4] * len(logged))
    model: Any = second.model
    state = {name: value[:1] if "lora_A" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)


def test_patience_begins_after_the_cut(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        tmp_path,
        FittedRanksCallback("r2"),
        EarlyStoppingCallback(1),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # never better: the loss falls
        **settings,
    )
    trainer.train()
    assert CUT < trainer.state.global_step < STEPS
    assert size_of(trainer.model) <= 2176


def test_a_wrapped_step_stays_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an optimizer without hooks of its own, such as DeepSpeed's, which a scheduler has wrapped."""
    monkeypatch.setattr("lrlora.learned.fitted_ranks.is_deepspeed", lambda optimizer: isinstance(optimizer, Outer))

    class Outer:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.steps = optimizer, 0

        def step(self) -> None:
            self.optimizer.step()

    tiny, model = with_lora("mlp")
    outer = Outer(adam(model))
    first = FittedRanks(model, outer, size="r2", steps=STEPS)
    inner_step = outer.step

    def counted() -> None:
        outer.steps += 1
        inner_step()

    outer.step = counted  # type: ignore[method-assign]
    FittedRanks(model, outer, size="r2", steps=STEPS)  # removes the hooks of the first
    tiny.loss(model).backward()
    outer.step()
    assert outer.steps == 1
    assert first.state_dict()["done"] == 0
