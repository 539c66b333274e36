"""LoRA that fits its ranks: cut while it trains, in one's own loop and in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from lrlora import FittedRanks, FittedRanksCallback
from lrlora.adapters import factorize

from ..conftest import TinyModel, save_quantizable
from .test_moments import curve_of

STEPS, CUT = 30, 9


def with_lora(family: str, **fields: Any) -> tuple[TinyModel, Any]:
    tiny = TinyModel(family)
    torch.manual_seed(1)
    return tiny, get_peft_model(tiny.build(), LoraConfig(**{"r": 8, "lora_alpha": 16, **tiny.targets, **fields}))


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fit(
    tiny: TinyModel, model: Any, size: str = "r2", steps: int = STEPS, stopped: int | None = None, **options: Any
) -> FittedRanks:
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
    learned = FittedRanks(model, optimizer, size=size, steps=steps, **options)
    model.train()
    for _ in range(stopped or steps):
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return learned


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "vit"])
def test_a_plain_lora_of_the_size_remains(family: str, tmp_path: Path) -> None:
    tiny, model = with_lora(family)
    size = sum(p.numel() for p in trained(model)) // 4  # of r = 2
    learned = fit(tiny, model)
    assert learned.ranks is not None
    assert len(set(learned.ranks.values())) > 1
    parameters = sum(p.numel() for p in trained(model))
    assert 0.9 * size < parameters <= size
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert sum(p.numel() for n, p in again.named_parameters() if "lora_" in n) == parameters


@pytest.mark.parametrize(("steps", "first"), [(40, 6), (400, 88)])
def test_moments_are_not_those_of_the_first_steps(steps: int, first: int) -> None:
    """Their metric is that of B, which is nearly 0 in the first steps."""
    tiny, model = with_lora("llama")
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    learned = FittedRanks(model, optimizer, size="r2", steps=steps)
    begun = []
    for _ in range(first + 2):
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        begun.append(bool(learned.state_dict()["moments"]))
    assert begun.index(True) == first - 1


class Parallel(nn.Module):
    """The output depends on one of two branches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.needed, self.idle = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.needed(x) + 1e-4 * self.idle(x)


def test_the_rank_goes_where_the_loss_needs_it() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Parallel(), LoraConfig(r=6, lora_alpha=6, target_modules=["needed", "idle"]))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    learned = FittedRanks(model, optimizer, size="r2", steps=100)
    x = torch.randn(64, 12)
    target = x @ (torch.randn(12, 4) @ torch.randn(4, 12))
    for _ in range(100):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned.ranks == {"needed": 4, "idle": 0}
    assert model.peft_config["default"].target_modules == {"needed"} or list(
        model.peft_config["default"].target_modules
    ) == ["needed"]
    assert type(model.get_base_model().idle) is nn.Linear
    assert (model(x) - target).square().mean() < 0.5 * target.square().mean()


def test_the_cut_is_that_of_the_curve_by_loss() -> None:
    tiny, model = with_lora("llama", init_lora_weights=False)
    tokens = tiny.inputs()["input_ids"]
    batch = {"input_ids": tokens, "labels": tokens}
    whole = factorize(model, energy=1.0)
    budget = sum(2 * part.parameters_per_rank for part in whole)
    expected = curve_of(model, [batch]).within(budget)
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    learned = FittedRanks(model, optimizer, size="r2", steps=10)
    model.eval()
    for _ in range(learned.cut_step):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned.ranks == {part.module: part.rank for part in expected}
    assert min(learned.ranks.values()) != max(learned.ranks.values())
    for part in expected:
        if part.rank:
            layer: Any = model.get_base_model().get_submodule(part.module)
            found, wanted = layer.get_delta_weight("default"), part.B @ part.A
            assert (found - wanted).norm() <= 1e-4 * wanted.norm()
            assert layer.scaling["default"] == 2.0


def shares_of(model: Any, optimizer: Any, factor: nn.Parameter) -> list[float]:
    """Fills with the share of the rate at which a factor is trained, of SGD, at every step."""
    shares: list[float] = []

    def before(optimizer: Any, *rest: Any) -> None:
        optimizer.old = factor.detach().clone()

    def after(optimizer: Any, *rest: Any) -> None:
        if factor.grad is not None:
            moved = (optimizer.old - factor.detach()).norm() / optimizer.param_groups[0]["lr"]
            shares.append((moved / factor.grad.norm()).item())

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return shares


class AnotherSGD(torch.optim.SGD):
    """Begins anew at the cut, since only PyTorch's own moments are carried over."""


@pytest.mark.parametrize(("kind", "warm_up"), [(torch.optim.SGD, 1), (AnotherSGD, 20)])
@pytest.mark.parametrize("rate", [None, 3.0])
def test_the_rate_rises_after_the_cut(rate: float | None, kind: type[torch.optim.SGD], warm_up: int) -> None:
    _, model = with_lora("mlp")
    optimizer = kind(trained(model), lr=1e-3)
    learned = FittedRanks(model, optimizer, size="r2", steps=400, at=0.25, rate=rate)
    expected = rate or (sum(p.numel() for p in trained(model)) / learned.parameters) ** 0.5
    shares = shares_of(model, optimizer, model.get_base_model().last.lora_B["default"].weight)
    for step in range(learned.cut_step + 25):
        warm = learned.rate * min(1.0, (step - 99) / warm_up)
        assert learned.rates == [pytest.approx(1e-3 * (1.0 if step < 100 else warm))]
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned.cut_step == 100
    assert shares[:99] == pytest.approx([1.0] * 99, rel=1e-3)
    assert shares[100:] == pytest.approx(
        [learned.rate * min(1.0, (step + 1) / warm_up) for step in range(25)], rel=5e-3
    )
    assert learned.rate == pytest.approx(expected, rel=0.1)  # the size is a limit


def test_a_head_in_the_same_group_keeps_its_rate() -> None:
    tiny, model = with_lora("bert", modules_to_save=["classifier"])
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    learned = FittedRanks(model, optimizer, size="r2", steps=100)
    model.eval()
    for step in range(learned.cut_step + 2):
        tiny.loss(model).backward()
        before = [p.detach().clone() for p in head]
        optimizer.step()
        assert len(optimizer.param_groups) == 1
        for parameter, old in zip(head, before, strict=True):
            assert parameter.grad is not None
            assert torch.allclose(old - parameter, 1e-3 * parameter.grad, atol=1e-8), step
        optimizer.zero_grad()
    assert learned.ranks is not None


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random sequences."""

    def __init__(self, count: int = 48) -> None:
        self.ids = torch.randint(3, 99, (count, 8), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class StopAfter(TrainerCallback):
    """Stops as if the process was killed after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def trainer_of(folder: Path, *callbacks: TrainerCallback, dropout: float = 0.1, **settings: Any) -> Trainer:
    _, model = with_lora("llama", lora_dropout=dropout)
    common = {"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 1, "use_cpu": True}
    arguments = TrainingArguments(**{**common, **quiet, **settings})
    return Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts(8), callbacks=list(callbacks))


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of a run that is never stopped."""
    trainer = trainer_of(tmp_path_factory.mktemp("whole"), FittedRanksCallback("r2"))
    trainer.train()
    return weights_of(trainer)


@pytest.mark.parametrize("step", [3, 6, CUT, CUT + 1, 25])
def test_a_stopped_run_resumes_to_the_bit(step: int, tmp_path: Path, whole: dict[str, Tensor]) -> None:
    stopped = trainer_of(tmp_path, FittedRanksCallback("r2"), StopAfter(step))
    if step < CUT:
        with pytest.warns(UserWarning, match=f"at step {step}, .*step {CUT}: .*wide"):
            stopped.train()
    else:
        stopped.train()
    callback = FittedRanksCallback("r2")
    resumed = trainer_of(tmp_path, callback)
    resumed.train(resume_from_checkpoint=True)
    found = weights_of(resumed)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert callback.learned is not None
    assert callback.learned.ranks is not None
    assert sum(callback.learned.ranks.values()) == sum(len(p) for n, p in whole.items() if "lora_A" in n)


def test_the_best_checkpoint_is_from_after_the_cut(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
    trainer = trainer_of(
        tmp_path,
        FittedRanksCallback("r1"),
        load_best_model_at_end=True,
        metric_for_best_model="eval_runtime",  # which may be best at any step
        greater_is_better=False,
        **settings,
    )
    trainer.train()
    assert trainer.state.best_global_step >= CUT
    cut, wide = (sum(p.numel() for p in weights_of(each).values()) for each in (trainer, trainer_of(tmp_path)))
    assert cut <= wide / 8


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"optim": "adafactor"},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine"},
    ],
)
def test_ways_to_train(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = FittedRanksCallback("r2")
    trainer = trainer_of(tmp_path, callback, dropout=0.0, **settings)
    wide = sum(p.numel() for p in weights_of(trainer).values())
    trainer.train()
    assert callback.learned is not None
    assert callback.learned.ranks is not None
    assert sum(p.numel() for p in weights_of(trainer).values()) <= wide / 4
    assert trainer.state.log_history[-1]["train_loss"] < 4.7
    if settings.get("gradient_checkpointing"):
        other = FittedRanksCallback("r2")
        trainer_of(tmp_path, other, dropout=0.0).train()
        assert other.learned is not None
        assert other.learned.ranks == callback.learned.ranks


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_skips_what_overflows(fused: bool) -> None:
    tiny, model = with_lora("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=4)
    learned = FittedRanks(model, optimizer, size="r2", steps=80, scaler=scaler)
    for step in range(80):
        with torch.autocast("cpu", torch.float16):
            loss = tiny.loss(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert step > learned.cut_step or learned.ranks is None  # all of these have overflowed
    assert learned.ranks is not None
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = TinyModel("llama")
    save_quantizable(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized)

    model = get_peft_model(base(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    learned = fit(tiny, model)
    assert learned.ranks is not None
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_another_adapter_stays(tmp_path: Path) -> None:
    tiny, model = with_lora("llama")
    model.add_adapter("other", LoraConfig(r=3, init_lora_weights=False, target_modules=["q_proj"]))
    model.set_adapter("other")
    expected = tiny.logits(model)
    model.set_adapter("default")
    learned = fit(tiny, model, "r1", steps=60)
    assert learned.ranks is not None
    assert 0 in learned.ranks.values()
    after = tiny.logits(model)
    model.set_adapter("default")  # as it is
    assert torch.equal(tiny.logits(model), after)
    assert learned.rates == pytest.approx([5e-3 * learned.rate])
    model.set_adapter("other")
    assert torch.equal(tiny.logits(model), expected)
    model.save_pretrained(tmp_path)
    assert {
        len(v) for n, v in load_file(tmp_path / "other" / "adapter_model.safetensors").items() if "lora_A" in n
    } == {3}


def test_two_adapters_learn_their_ranks_one_after_the_other(tmp_path: Path) -> None:
    tiny, model = with_lora("llama")
    model.add_adapter("other", LoraConfig(r=8, **tiny.targets))
    for name in ("default", "other"):
        model.set_adapter(name)
        learned = fit(tiny, model, "r1", steps=60)
        assert learned.ranks is not None
        assert 0 in learned.ranks.values()
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.build(), tmp_path / "other")), tiny.logits(model))


def test_an_adapter_of_the_same_name_is_saved_as_it_is(tmp_path: Path) -> None:
    tiny, model = with_lora("mlp")
    fit(tiny, model, stopped=20)  # after the cut
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=8, init_lora_weights=False, **tiny.targets))
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.build(), tmp_path)), tiny.logits(model))


def test_a_part_of_a_state_changes_that_part_alone() -> None:
    for stopped in (10, 20, STEPS):  # before the cut, after it, and when it is over
        tiny, model = with_lora("llama")
        fit(tiny, model, stopped=stopped)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        (name, *_) = (name for name in before if "lora_A" in name)
        model.load_state_dict({name: before[name] + 1}, strict=False)
        changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
        assert changed == [name]
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({key: tensor for key, tensor in before.items() if key != name})


def test_an_adapter_is_not_saved_wide_in_silence(tmp_path: Path) -> None:
    tiny, model = with_lora("mlp")
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    FittedRanks(model, optimizer, size="r2", steps=100)
    for _ in range(20):
        tiny.loss(model).backward()
        optimizer.step()
    with pytest.warns(UserWarning, match=r"saved .*step 30: .*wide"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="all LoRA parameters"):
        FittedRanks(model, torch.optim.SGD(trained(model)[:1], lr=1e-3), size="r2", steps=100)


def test_the_trainer_refuses_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model with LoRA"):
        Trainer(TinyModel("llama").build(), callbacks=[FittedRanksCallback("r2")])
    with pytest.raises(ValueError, match=r"size .* got 'four'"):
        FittedRanksCallback("four")


def test_a_kernel_that_bypasses_lora_is_refused_at_the_first_step() -> None:
    _, model = with_lora("mlp")
    layer: Any = model.get_base_model().first
    layer.forward = lambda x: layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    FittedRanks(model, optimizer, size="r2", steps=10)
    model(torch.randn(4, 16)).square().mean().backward()
    with pytest.raises(ValueError, match=r"\bfirst .*lora_A: .*kernel"):
        optimizer.step()


def test_a_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))  # noqa: E731
    base = build()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "3"]))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    learned = FittedRanks(model, optimizer, size="600", steps=40)
    x, target = torch.randn(16, 3, 8, 8), torch.randn(16, 4)
    for _ in range(40):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned.ranks is not None
    assert sum(p.numel() for p in trained(model)) <= 600
    model.save_pretrained(tmp_path)
    other = build()
    other.load_state_dict(state)
    assert torch.allclose(PeftModel.from_pretrained(other, tmp_path)(x), model(x))
