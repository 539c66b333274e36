"""`lrlora.find_learning_rate`: the rate of short trainings, and a Trainer that is left as it was."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames
from trl import RewardConfig, RewardTrainer

from lrlora import FittedRanksCallback, LearningRate, LrLoraConfig, find_learning_rate

from .conftest import TinyModel
from .distributed.test_distributed import torchrun
from .learned.test_fitted_ranks import trained
from .learned.test_shrinking import Pairs, Weighted, lora, trainer_of
from .learned.test_shrinking_kinds import embedding_model, embedding_trainer, pairs_of_texts
from .learned.test_trl import COMMON, dpo, grpo, sft
from .train.small import save_decoder, save_encoder, tokenizer

# Trainings of several epochs over a few rows, whose rates are not asked to be good ones.
pytestmark = pytest.mark.filterwarnings("ignore:The training sees each example:UserWarning")


class Buffered(nn.Module):
    """A model of one's own, with statistics, dropout and a trained head outside of the adapter's host."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = lora(TinyModel("llama").build(), lora_dropout=0.2)
        self.register_buffer("mean", torch.zeros(()))
        self.norm, self.drop, self.head = nn.BatchNorm1d(100), nn.Dropout(0.1), nn.Linear(100, 100)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.drop(self.norm(self.inner(input_ids=input_ids).logits.flatten(0, 1))))
        self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean()
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten()), "logits": logits}


def plain(folder: Path) -> Any:
    return trainer_of(folder, lora(TinyModel("llama").build(), lora_dropout=0.1))


def wrapped(folder: Path) -> Any:
    return trainer_of(folder, Buffered())


def weighted(folder: Path) -> Any:
    trainer = trainer_of(folder, lora(TinyModel("llama").build()))
    trainer.__class__ = Weighted
    return trainer


def accumulated(folder: Path) -> Any:
    trainer = plain(folder)
    trainer.args.gradient_accumulation_steps, trainer.args.per_device_train_batch_size = 3, 4
    return trainer


def own_optimizer(folder: Path) -> Any:
    model = lora(TinyModel("llama").build())
    first, *others = trained(model)
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 1e-3}, {"params": others, "lr": 4e-3}])
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 100)
    return trainer_of(folder, model, optimizers=(optimizer, schedule))


def own_class(folder: Path) -> Any:
    model = lora(TinyModel("llama").build())
    first, *others = trained(model)
    groups = [{"params": [first], "lr": 4e-3}, {"params": others}]
    return trainer_of(folder, model, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 1e-3}))


def learning_ranks(folder: Path) -> Any:
    trainer = plain(folder)
    trainer.add_callback(FittedRanksCallback("r2", trainer=trainer))
    return trainer


def learned_function(folder: Path) -> Any:
    torch.manual_seed(0)
    tiny = TinyModel("llama")
    return trainer_of(folder, get_peft_model(tiny.build(), LrLoraConfig(r=4, **tiny.targets)))


def ia3(folder: Path) -> Any:
    torch.manual_seed(0)
    config = IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
    return trainer_of(folder, get_peft_model(TinyModel("llama").build(), config))


def half(folder: Path) -> Any:
    return trainer_of(folder, lora(TinyModel("llama").build()), bf16=True)


def of_trl(build: Callable[..., Any]) -> Callable[[Path], Any]:
    def create(folder: Path) -> Any:
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return build(save_decoder(folder / "base"), str(folder / "out"), peft_config=config)

    create.__name__ = build.__name__
    return create


def reward(base: str, output: str, peft_config: LoraConfig) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer().pad_token_id
    peft_config.task_type = "SEQ_CLS"
    rows = Dataset.from_dict({"chosen": ["a good film"] * 60, "rejected": ["a film bad"] * 60})
    return RewardTrainer(
        model, RewardConfig(output, **COMMON), train_dataset=rows, processing_class=tokenizer(), peft_config=peft_config
    )


def embeddings(folder: Path) -> Any:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = embedding_model(save_encoder(folder / "base"))
    data = pairs_of_texts().select(range(300))
    return embedding_trainer(folder, model, train_dataset=data, loss=MultipleNegativesRankingLoss(model))


def classified_embeddings(folder: Path) -> Any:
    """A loss with a classifier, which is trained beside the model."""
    from sentence_transformers.sentence_transformer.losses import SoftmaxLoss

    model, pairs = embedding_model(save_encoder(folder / "base")), pairs_of_texts().select(range(300))
    data = pairs.add_column("label", [index % 3 for index in range(300)])
    torch.manual_seed(0)
    loss = SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=3)
    return embedding_trainer(folder, model, train_dataset=data, loss=loss)


class Tempered(Trainer):
    """A trained temperature beside the model, and a list of what was seen."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.temperature, self.seen = nn.Parameter(torch.zeros(())), list[float]()

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        optimizer = super().create_optimizer(*args, **options)
        optimizer.add_param_group({"params": [self.temperature]})
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1] * self.temperature.exp()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
        self.seen.append(loss.item())
        return (loss, outputs) if return_outputs else loss


def tempered(folder: Path) -> Any:
    trainer = plain(folder)
    return Tempered(trainer.model, trainer.args, train_dataset=trainer.train_dataset)


class Momentum(torch.optim.Optimizer):
    """Momenta in an attribute, and one that the first step creates."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.momenta: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps = getattr(self, "steps", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.momenta.setdefault(parameter, torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] / self.steps**0.5 * momentum / (momentum.abs().max() + 1e-8))


def own_state(folder: Path) -> Any:
    trainer = plain(folder)
    optimizer = Momentum(trained(trainer.model), 1e-2)
    trainer.optimizer, trainer.lr_scheduler = optimizer, LambdaLR(optimizer, lambda step: 1.0)
    return trainer


class Tracker(nn.Module):
    """A module, as a loss may be, whose state is in no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.parts = torch.zeros(1), {"losses": [0.0]}

    def forward(self) -> Tensor:
        return self.total + self.parts["losses"][0]


class Annealed(Trainer):
    """A loss with a term and a weight that fall with each batch, and metrics for the log, as some of TRL's have."""

    calls = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stored_metrics = defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
        self.weight, self.recent, self.seen = torch.ones(()), deque[float](maxlen=3), {"kinds": Counter[str]()}
        self.sums = (np.zeros(1), [0.0])
        self.tracker = Tracker()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss * self.weight.clone() + 0.1 / (1 + self.calls)
        self.calls += 1
        self.weight.mul_(0.99)
        self.recent.append(loss.item())
        self.seen["kinds"]["batch"] += 1
        for part in (*self.sums, self.tracker.total, self.tracker.parts["losses"]):
            part[0] += loss.item()
        self._stored_metrics["train"]["loss"].append(loss.item())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        stored = self._stored_metrics.pop("train", {})
        own = {"recent": sum(self.recent), "seen": float(self.seen["kinds"]["batch"])}
        own |= {"sums": float(sum(map(sum, self.sums))), "tracked": self.tracker().item()}
        super().log({**logs, **own, **{key: sum(values) for key, values in stored.items()}}, *args, **options)


def annealed(folder: Path) -> Any:
    trainer = plain(folder)
    return Annealed(trainer.model, trainer.args, train_dataset=trainer.train_dataset)


class Fading:
    """A loss function that counts its calls."""

    calls = 0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / self.calls


def own_function(folder: Path) -> Any:
    return trainer_of(folder, lora(TinyModel("llama").build()), compute_loss_func=Fading())


KINDS = [
    *(plain, wrapped, weighted, accumulated, own_optimizer, own_class, learning_ranks, of_trl(sft), of_trl(dpo)),
    *(tempered, own_state, annealed, own_function),
    *(
        pytest.param(each, marks=pytest.mark.integration)
        for each in (learned_function, ia3, of_trl(reward), embeddings, classified_embeddings)
    ),
]


@pytest.mark.parametrize("build", KINDS)
def test_a_training_is_the_same_to_the_bit(build: Callable[[Path], Any], tmp_path: Path) -> None:
    results = []
    for name in ("without", "with"):
        trainer = build(tmp_path / name)
        trainer.args.logging_steps, trainer.args.max_steps = 1, 24
        if name == "with":
            attributes, state = copy.copy(vars(trainer)), copy.deepcopy(trainer.model.state_dict())
            hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
            modes = [module.training for module in trainer.model.modules()]
            states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
            find_learning_rate(trainer, update=False)
            assert vars(trainer).keys() == attributes.keys()
            counted = ("_metrics", "_stored_metrics", "accum_loss_components")
            assert all(vars(trainer)[key] is value for key, value in attributes.items() if key not in counted)
            assert all(torch.equal(value, state[key]) for key, value in trainer.model.state_dict().items())
            assert hooks == [len(module._forward_hooks) for module in trainer.model.modules()]
            assert modes == [module.training for module in trainer.model.modules()]
            assert torch.equal(states[0], torch.get_rng_state())
            assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        trainer.train()
        changing = ("runtime", "per_second", "flos", "time")
        log = [
            {key: value for key, value in entry.items() if not any(part in key for part in changing)}
            for entry in trainer.state.log_history
        ]
        results.append((log, trainer.model.state_dict()))
    (log, values), (other_log, other_values) = results
    assert log == other_log
    assert values.keys() == other_values.keys()
    assert all(torch.equal(value, other_values[key]) for key, value in values.items())


def test_each_probe_begins_with_the_state_of_the_trainer(tmp_path: Path) -> None:
    class Falling(Trainer):
        calls = 0

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            self.calls += 1
            self.model.tracked = getattr(self.model, "tracked", 0) + 1
            return super().compute_loss(*args, **options) + 1 / self.calls + 1 / self.model.tracked

    trainer, other = plain(tmp_path), plain(tmp_path)
    other.__class__ = Falling
    (first, untrained), (second, other_untrained) = (
        (found.losses, found.untrained) for found in map(find_learning_rate, (trainer, other))
    )
    assert first.keys() == second.keys()
    for rate, loss in first.items():
        assert second[rate] - loss == pytest.approx(other_untrained - untrained, abs=1e-5)


def test_the_rate_is_better_than_one_that_is_far_too_low(tmp_path: Path) -> None:
    losses = []
    for name in ("given", "found"):
        trainer = plain(tmp_path / name)
        trainer.args.learning_rate, trainer.args.max_steps = 2e-5, 100
        if name == "found":
            found = find_learning_rate(trainer)
            assert found.rate == found.best / 2
            assert found.current == 2e-5
            assert list(found.losses) == sorted(found.losses)
            neighbours = [found.losses[found.best * factor] for factor in (0.5, 2)]
            assert min(neighbours) > found.losses[found.best]
            assert found.losses[found.best] < found.untrained
            assert f"{found.rate:.3g}" in str(found)
            assert all(f"{rate:.3g}" in str(found) for rate in found.losses)
            assert trainer.args.learning_rate == found.rate
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] < losses[0] - 0.2


class Rates(TrainerCallback):
    """Counts events."""

    events = 0

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.events += 1


def recorded(trainer: Any, rates: list[list[float]]) -> None:
    """Record the rates of the parameter groups at each step."""
    create = trainer.create_optimizer

    def create_optimizer(*arguments: Any) -> Any:
        is_new = trainer.optimizer is None
        optimizer = create(*arguments)
        if is_new:
            optimizer.register_step_pre_hook(
                lambda *given: rates.append([group["lr"] for group in optimizer.param_groups])
            )
        return optimizer

    trainer.create_optimizer = create_optimizer


SCHEDULES: list[tuple[str, int, dict[str, Any]]] = [
    ("linear", 0, {}),
    ("cosine", 30, {}),
    ("constant_with_warmup", 20, {}),
    ("cosine_with_min_lr", 5, {"min_lr": 5e-4}),
    ("polynomial", 0, {"lr_end": 3e-4}),
    ("warmup_stable_decay", 10, {"num_decay_steps": 40}),
]


@pytest.mark.parametrize(("schedule", "warm_up", "options"), SCHEDULES)
def test_a_probe_has_the_schedule_of_the_training(
    schedule: str, warm_up: int, options: dict[str, Any], tmp_path: Path
) -> None:
    trainer, events = plain(tmp_path), Rates()
    trainer.add_callback(events)
    arguments = trainer.args
    arguments.max_steps, arguments.lr_scheduler_type, arguments.warmup_steps = 100, schedule, warm_up
    arguments.lr_scheduler_kwargs, arguments.learning_rate = options, 1e-3
    rates: list[list[float]] = []
    recorded(trainer, rates)
    found = find_learning_rate(trainer, rates=[1e-3], steps=10, update=False)
    probe = [rate for rate, *_ in rates[:10]]
    assert len(rates) == 10 * len(found.losses)
    assert events.events == trainer.state.global_step == 0
    assert trainer.optimizer is trainer.lr_scheduler is None
    rates.clear()
    trainer.train()
    assert probe == pytest.approx([rate for rate, *_ in rates[5::10]])


def test_groups_keep_their_ratio(tmp_path: Path) -> None:
    trainer = own_optimizer(tmp_path)
    rates: list[list[float]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *given: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    found = find_learning_rate(trainer)
    assert found.current == 1e-3
    assert all(other == pytest.approx(4 * rate) for rate, other in rates)
    assert {round(rate / (1 - 2 / 100), 6) for rate, _ in rates[:: found.steps]} >= {1e-3, 2e-3, 4e-3}
    assert not trainer.optimizer.state
    rates.clear()
    trainer.train()
    assert rates[0] == pytest.approx([found.rate, 4 * found.rate])
    assert rates[10] == pytest.approx([0.9 * found.rate, 3.6 * found.rate])


def test_the_rate_is_not_set_where_it_is_not_asked_for(tmp_path: Path) -> None:
    for trainer in (plain(tmp_path), own_optimizer(tmp_path)):
        rate, base = trainer.args.learning_rate, copy.copy(trainer.lr_scheduler and trainer.lr_scheduler.base_lrs)
        found = find_learning_rate(trainer, update=False)
        assert not found.is_set
        assert trainer.args.learning_rate == rate != found.rate
        assert trainer.lr_scheduler is None or trainer.lr_scheduler.base_lrs == base == [1e-3, 4e-3]
        assert trainer.optimizer is None or [g["lr"] for g in trainer.optimizer.param_groups] == [1e-3, 4e-3]


def test_generators_begin_anew_and_a_loss_that_anneals_knows_the_step(tmp_path: Path) -> None:
    class Noisy(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            noise = torch.rand((), generator=self.own).item() + self.numpys["own"].random()
            seen.append((self.state.global_step / max(1, self.state.max_steps), noise))
            return super().compute_loss(*args, **options) * (1 + 0.01 * noise)

    trainer, seen = plain(tmp_path), list[tuple[float, float]]()
    trainer.__class__ = Noisy
    trainer.own, trainer.numpys = torch.Generator().manual_seed(3), {"own": np.random.default_rng(3)}
    states = trainer.own.get_state(), trainer.numpys["own"].bit_generator.state
    steps = find_learning_rate(trainer, update=False).steps
    assert torch.equal(states[0], trainer.own.get_state())
    assert states[1] == trainer.numpys["own"].bit_generator.state
    probes = [seen[start : start + steps] for start in range(steps, len(seen), steps)]  # the first is untrained
    assert len(probes) >= 3
    assert all(probe == probes[0] for probe in probes)
    assert [share for share, _ in probes[0]] == sorted({share for share, _ in probes[0]})
    assert probes[0][-1][0] > 0.9


def test_the_rate_is_that_of_the_groups_that_the_arguments_set(tmp_path: Path) -> None:
    """Another group, with a multiple of it, is the first."""

    class Grouped(Trainer):
        def create_optimizer(self, *args: Any, **options: Any) -> Any:
            first, *others = trained(self.model)
            rate = self.args.learning_rate
            self.optimizer = torch.optim.AdamW([{"params": [first], "lr": 10 * rate}, {"params": others}], lr=rate)
            return self.optimizer

    plain_trainer = plain(tmp_path)
    trainer = Grouped(plain_trainer.model, plain_trainer.args, train_dataset=plain_trainer.train_dataset)
    rates: list[list[float]] = []
    recorded(trainer, rates)
    current = trainer.args.learning_rate
    found = find_learning_rate(trainer)
    assert found.is_set
    assert found.current == current
    assert found.rate == trainer.args.learning_rate
    assert {round(rate / (1 - 2 / 60), 6) for _, rate in rates[:: found.steps]} >= {1e-3, 2e-3, 4e-3}


def test_a_rate_that_diverges_is_told(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    trainer.args.max_grad_norm = 0.0
    model = trainer.model
    model.register_forward_hook(  # not finite where the update is large
        lambda module, inputs, output: output.__setitem__(
            "loss", output.loss + torch.where(largest(module) > 0.06, math.nan, 0.0)
        )
    )
    found = find_learning_rate(trainer)
    assert math.inf in found.losses.values()
    assert math.isfinite(found.losses[found.best])
    assert "diverged" in str(found)
    assert largest(model) == 0


def largest(model: Any) -> Tensor:
    """Largest entry of B."""
    return torch.stack(
        [value.detach().abs().max() for name, value in model.named_parameters() if "lora_B" in name]
    ).max()


def test_an_interruption_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    trainer = own_optimizer(tmp_path)
    before, steps = copy.deepcopy(trainer.model.state_dict()), 0

    def interrupt(*given: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 30:
            raise KeyboardInterrupt

    trainer.optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(trainer)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    assert not trainer.optimizer.state
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 4e-3]
    assert "compute_loss_context_manager" not in vars(trainer)


def test_the_rate_of_an_optimizer_with_its_own_is_told(tmp_path: Path) -> None:
    for build, current in ((own_class, 4e-3), (own_optimizer, 1e-3)):
        trainer = build(tmp_path)
        found = find_learning_rate(trainer)
        assert found.current == current
        assert found.is_set == (trainer.optimizer is not None)
        assert f"{found.rate / current:.3g} times" in str(found)


def test_batches_are_seen_once(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()), train_dataset=Pairs(16 * 12, 0))
    assert find_learning_rate(trainer).steps == 12


def test_lower_precision_and_checkpointing_are_those_of_the_training(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    name = "activation" if hasattr(trainer.model, "activation_checkpointing_enable") else "gradient"
    setattr(trainer.args, f"{name}_checkpointing", True)
    kinds: set[Any] = set()
    inner = trainer.model.get_base_model()
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("q_proj"))
    layer.register_forward_hook(
        lambda module, inputs, output: kinds.add((output.dtype, getattr(inner, f"is_{name}_checkpointing")))
    )
    trainer.accelerator.state._mixed_precision = "bf16"
    trainer.accelerator.native_amp = True
    try:
        find_learning_rate(trainer)
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    assert kinds == {(torch.bfloat16, True)}
    assert not getattr(inner, f"is_{name}_checkpointing")


def test_a_scaled_loss_finds_the_same(tmp_path: Path) -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()))
        trainer.accelerator.scaler = scaler
        results.append(find_learning_rate(trainer, steps=10).losses)
        assert trainer.accelerator.scaler is scaler
        assert scaler is None or scaler.get_scale() == 2.0**10
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_new_head_keeps_its_factor(tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path / "base"), num_labels=2)
    ids = torch.randint(5, 20, (400, 6))
    rows = [
        {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": int(row[0] > 12)} for row in ids
    ]
    model = lora(base, task_type="SEQ_CLS")
    head = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    others = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": head, "lr": 16e-3}])
    trainer = trainer_of(tmp_path, model, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None))
    rates: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda opt, *given: rates.append([group["lr"] for group in opt.param_groups]))
    find_learning_rate(trainer)
    assert all(other == pytest.approx(16 * rate) for rate, other in rates)
    assert trainer.optimizer is optimizer
    assert trainer.lr_scheduler is None
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 16e-3]


PROCESSES = """
import sys
from pathlib import Path
import torch
from lrlora import find_learning_rate
from tests.conftest import TinyModel
from tests.learned.test_shrinking import lora, trainer_of
trainer = trainer_of(Path(sys.argv[1]), lora(TinyModel("llama").build()))
trainer.args.gradient_accumulation_steps = int(sys.argv[2])
found = find_learning_rate(trainer)
if trainer.is_world_process_zero():
    print(found.rate, *found.losses.values(), file=open(sys.argv[3], "w"))
"""


@pytest.mark.integration
def test_two_processes_find_the_rate_of_one(tmp_path: Path) -> None:
    results = []
    for count in (1, 2):
        target = tmp_path / f"{count}.txt"
        script = tmp_path / "script.py"
        script.write_text(PROCESSES)
        torchrun(count, script, tmp_path / "out", 2 // count, target)
        results.append([float(value) for value in target.read_text().split()])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def stream() -> Iterator[dict[str, Any]]:
    yield {"input_ids": [1], "labels": [1]}


@pytest.mark.refused
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda trainer: setattr(trainer.args, "max_steps", 19), ["19 steps", "20"]),
        (lambda trainer: setattr(trainer.args, "learning_rate", 0.0), ["learning_rate", "0.0"]),
        (lambda trainer: setattr(trainer, "train_dataset", None), ["train_dataset", "NoneType"]),
        (
            lambda trainer: setattr(trainer, "train_dataset", IterableDataset.from_generator(stream)),
            ["IterableDataset", "take"],
        ),
        (lambda trainer: setattr(trainer.args, "_n_gpu", 2), ["DataParallel"]),
        (lambda trainer: setattr(trainer, "is_fsdp_enabled", True), ["FSDP"]),
        (lambda trainer: setattr(trainer, "is_deepspeed_enabled", True), ["DeepSpeed"]),
        (lambda trainer: setattr(trainer.args, "lr_scheduler_type", "reduce_lr_on_plateau"), ["ReduceLROnPlateau"]),
        (lambda trainer: setattr(trainer.state, "global_step", 7), ["7 steps"]),
        (lambda trainer: setattr(trainer.args, "optim", OptimizerNames.LOMO), ["'lomo'", "adamw_torch"]),
        (lambda trainer: setattr(trainer.args, "optim", "galore_adamw_layerwise"), ["layerwise"]),
    ],
)
def test_trainers_whose_rate_cannot_be_found_are_refused(
    change: Callable[[Any], None], words: list[str], tmp_path: Path
) -> None:
    trainer = plain(tmp_path)
    change(trainer)
    before, is_called = copy.deepcopy(trainer.model.state_dict()), []
    trainer.model.register_forward_hook(lambda *given: is_called.append(True))
    with pytest.raises(ValueError, match=".*".join(words)):
        find_learning_rate(trainer)
    assert not is_called
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.refused
@pytest.mark.parametrize(("examples", "steps"), [(16 * 4, 4), (8, 0)])
def test_too_few_examples_are_told(examples: int, steps: int, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()), train_dataset=Pairs(examples, 0))
    trainer.args.dataloader_drop_last = True
    with pytest.raises(ValueError, match=f"epoch of {steps} steps"):
        find_learning_rate(trainer)


@pytest.mark.refused
@pytest.mark.parametrize(
    "options", [{"rates": [2e-3, 1e-3]}, {"rates": [0.0]}, {"rates": [math.nan]}, {"steps": 4}, {"steps": 7.5}]
)
def test_rates_and_steps_are_checked(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        find_learning_rate(plain(tmp_path), **options)


@pytest.mark.refused
def test_a_schedule_that_depends_on_more_than_the_step_is_refused(tmp_path: Path) -> None:
    model = lora(TinyModel("llama").build())
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    trainer = trainer_of(tmp_path, model, optimizers=(optimizer, StepLR(optimizer, 10)))
    with pytest.raises(ValueError, match="StepLR"):
        find_learning_rate(trainer)


@pytest.mark.refused
def test_rewards_are_refused(tmp_path: Path) -> None:
    trainer = grpo(save_decoder(tmp_path / "base"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="rewards"):
        find_learning_rate(trainer)


def test_a_loss_that_rises_while_the_model_learns_is_refused(tmp_path: Path) -> None:
    trainer = of_trl(sft)(tmp_path)
    trainer.args.loss_type = "dft"
    with pytest.raises(ValueError, match="nll"):
        find_learning_rate(trainer)


@pytest.mark.filterwarnings("error:The training sees each example:UserWarning")
def test_a_rate_for_several_epochs_is_warned_of_unless_the_best_one_is_kept(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    trainer.args.max_steps = 3 * len(trainer.get_train_dataloader())
    with pytest.warns(UserWarning, match=r"each example 3 times.*load_best_model_at_end=True"):
        find_learning_rate(trainer)
    trainer.args.load_best_model_at_end = True
    find_learning_rate(trainer)  # warnings are errors


@pytest.mark.refused
def test_data_that_teach_nothing_are_told(tmp_path: Path) -> None:
    data = Pairs(512, 0)
    trainer = trainer_of(tmp_path, lora(TinyModel("llama").build()), train_dataset=data)
    for parameter in trainer.model.parameters():
        parameter.requires_grad = parameter.requires_grad and parameter.dim() < 2
    next(trainer.model.parameters()).requires_grad = True
    trainer.model.register_forward_hook(
        lambda module, inputs, output: output.__setitem__(
            "loss", output.loss.detach() + 0 * next(module.parameters()).sum()
        )
    )
    with pytest.raises(ValueError, match="No rate from"):
        find_learning_rate(trainer)


def test_the_result_is_plain_data() -> None:
    found = LearningRate(1e-3, 2e-5, {1e-3: 2.0, 2e-3: 1.5, 4e-3: math.inf}, 3.0, 25, True)
    assert found.best == 2e-3
    assert "diverged" in str(found)
    assert "lowest" in str(found).splitlines()[3]
