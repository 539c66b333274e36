"""Benefit of choosing ranks by loss during training: all rank-selection methods at the size of LoRA r = 4.

python benchmarks/rank_gate.py                    # some 15 hours of one core; resumes
python benchmarks/rank_gate.py --only german      # some of the tasks; several processes share the work
python benchmarks/rank_gate.py --report           # only render rank_gate.md from the stored results
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

from lrlora.adapters import Factors, factorize  # noqa: E402
from lrlora.adapters.factorize import best_per_parameter  # noqa: E402
from lrlora.learned.directions import LossCurve, directions  # noqa: E402
from lrlora.learned.moments import collect_moments, model_loss  # noqa: E402
from lrlora_lab.statistics import holm, paired_difference  # noqa: E402

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "rank_gate.md", HERE / "rank_gate" / "results.jsonl"
PICTURE = DOCS / "ranks.png"
CLAIMS = Path("lrlora-compress") / "gate"
SEEDS = (0, 1, 2)
STUDY_SEEDS = (0, 1, 2, 3, 4)
STUDY = {2: ("lora-2", "library-2"), 4: ("lora", "library"), 8: ("lora-8", "library-8")}  # LoRA, LearnedRanks
RANK, WIDE = 4, 16
SCALING = 4.0
MOMENT_BATCHES = 8
CUT_AT = 0.3  # share of the steps
WARM_UP = 20  # steps after a cut; at the start, a twentieth of all
EDGE = 3  # maximum extensions of the rate grid while the best is at the edge

Batch = dict[str, Any]
Ranks = dict[str, int]


@dataclass(frozen=True)
class Task:
    """A task and its base model.

    Args:
        model: creates the base model.
        targets: regular expression of modules.
        batches: seed → endless training batches.
        validation, test, forgotten: batches; `forgotten` measures the loss on text like the base model's.
        steps: of training.
        rate: initial rate of LoRA's search.
        head: name part of parameters trained with the adapter, and their rate.

    """

    model: Callable[[], Any]
    targets: str
    batches: Callable[[int], Iterator[Batch]]
    validation: Callable[[], list[Batch]]
    test: Callable[[], list[Batch]]
    forgotten: Callable[[], list[Batch]] | None
    steps: int
    rate: float
    head: tuple[str, float] | None = None


def windows(data: Tensor, count: int, length: int) -> list[Batch]:
    """Evenly spaced, non-overlapping windows."""
    held = len(data) // length
    chosen = data[: held * length].view(held, length)[torch.arange(count) * held // count].long()
    return [{"input_ids": some, "labels": some} for some in chosen.split(64)]


def byte_task(name: str) -> Task:
    """The byte model on a corpus."""
    from lrlora_lab.byte_model import CONTEXT, base_model, load_corpus, sample_batch

    corpus = cache(load_corpus)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            some = sample_batch(corpus(name).train, generator, 16)
            yield {"input_ids": some, "labels": some}

    return Task(
        base_model,
        r".*\.(\w+_proj|fc\d)",
        batches,
        lambda: windows(corpus(name).validation, 512, CONTEXT),
        lambda: windows(corpus(name).test, 512, CONTEXT),
        lambda: windows(corpus("english").test, 128, CONTEXT),
        steps=500,
        rate=1e-2,
    )


def smollm2_task() -> Task:
    """SmolLM2 on German speeches, in windows of 64 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lrlora.train.models import model_source
    from lrlora_lab.byte_model import load_corpus

    @cache
    def tokens(corpus: str, part: int, count: int) -> Tensor:
        tokenizer = AutoTokenizer.from_pretrained(model_source("embedded:smollm2"))
        text = load_corpus(corpus)[part].numpy().tobytes()
        pieces = [text[len(text) * i // count :][:1_000].decode(errors="ignore") for i in range(count)]
        return torch.tensor([tokenizer(piece)["input_ids"][1:65] for piece in pieces])

    def held(corpus: str, part: int, count: int) -> list[Batch]:
        return [{"input_ids": some, "labels": some} for some in tokens(corpus, part, count).split(8)]

    def batches(seed: int) -> Iterator[Batch]:
        generator, data = torch.Generator().manual_seed(seed), tokens("german", 0, 2_000)
        while True:
            for chosen in torch.randperm(len(data), generator=generator).split(4):
                yield {"input_ids": data[chosen], "labels": data[chosen]}

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_source("embedded:smollm2"), dtype=torch.float32)

    return Task(
        model,
        r".*\.\w+_proj",
        batches,
        lambda: held("german", 1, 96),
        lambda: held("german", 2, 160),
        lambda: held("english", 2, 64),
        steps=100,
        rate=4e-3,
    )


class Labelled(nn.Module):
    """Last two layers of MiniLM with a fixed random head, on precomputed inputs of these layers."""

    def __init__(self, encoder: Any, head: Tensor, inputs: Tensor) -> None:
        super().__init__()
        self.layers = encoder.encoder.layer[-2:]
        self.register_buffer("head", head)
        with torch.no_grad():
            pooled = torch.cat([self.pooled(some) for some in inputs.split(256)])
        self.register_buffer("mean", pooled.mean(0))
        self.register_buffer("deviation", pooled.std(0))

    def pooled(self, inputs: Tensor) -> Tensor:
        """(examples, tokens, 384) → (examples, 384)."""
        for layer in self.layers:
            inputs = layer(inputs)
            inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        return inputs.mean(1)

    def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = ((self.pooled(inputs) - self.mean) / self.deviation) @ self.head.T
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def labels_task(texts: int = 2_048, classes: int = 64) -> Task:
    """Random labels of texts, a measure of adapter capacity: all data is training data."""
    from transformers import AutoModel, AutoTokenizer

    from lrlora.train.embedded import load_movie_reviews
    from lrlora.train.packages import MINILM, checkpoint

    @cache
    def encoder() -> Any:
        return AutoModel.from_pretrained(checkpoint(MINILM)).eval()

    @cache
    def data() -> tuple[Tensor, Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(MINILM))
        found = tokenizer(list(load_movie_reviews()["train"]["text"]), truncation=True, max_length=8)["input_ids"]
        ids = torch.tensor([each for each in found if len(each) == 8][:texts])
        hidden = []
        with torch.no_grad():
            for some in ids.split(256):
                hidden.append(encoder()(some, output_hidden_states=True).hidden_states[-3])
        return torch.cat(hidden), torch.randint(0, classes, (texts,), generator=torch.Generator().manual_seed(0))

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for some in torch.randperm(texts, generator=generator).split(64):
                yield {"inputs": data()[0][some], "labels": data()[1][some]}

    def all_data() -> list[Batch]:
        return [{"inputs": x, "labels": y} for x, y in zip(data()[0].split(256), data()[1].split(256), strict=True)]

    def model() -> Any:
        import copy

        head = torch.randn(classes, 384, generator=torch.Generator().manual_seed(1)) * (4 / math.sqrt(384))
        return Labelled(copy.deepcopy(encoder()), head, data()[0]).eval()

    return Task(model, r".*\.(query|key|value|dense)", batches, all_data, all_data, None, steps=600, rate=4e-3)


def news_task() -> Task:
    """20 Newsgroups, with all linear layers of MiniLM."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lrlora.train.packages import MINILM, checkpoint
    from lrlora_lab.inputs import DATA

    @cache
    def data() -> dict[str, list[tuple[list[int], int]]]:
        tokenizer, found = AutoTokenizer.from_pretrained(checkpoint(MINILM)), DATA["20-newsgroups"]()
        training, testing = found["train"].shuffle(seed=1), found["test"].shuffle(seed=1)
        parts = {
            "validation": training.select(range(1_024)),
            "train": training.select(range(1_024, len(training))),
            "test": testing.select(range(2_048)),
        }
        known: dict[str, list[tuple[list[int], int]]] = {}
        for part, rows in parts.items():
            ids = tokenizer(list(rows["text"]), truncation=True, max_length=48)["input_ids"]
            known[part] = list(zip(ids, list(rows["label"]), strict=True))
        return known

    def padded(rows: list[tuple[list[int], int]]) -> Batch:
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([each + [0] * (longest - len(each)) for each, _ in rows])
        mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each, _ in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}

    def batches(seed: int) -> Iterator[Batch]:
        generator, rows = torch.Generator().manual_seed(seed), data()["train"]
        while True:
            for some in torch.randperm(len(rows), generator=generator).split(32):
                yield padded([rows[index] for index in some.tolist()])

    def held(part: str) -> list[Batch]:
        rows = data()[part]
        return [padded(rows[start : start + 64]) for start in range(0, len(rows), 64)]

    def model() -> Any:
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_pretrained(checkpoint(MINILM), num_labels=20).eval()

    return Task(
        model,
        r".*\.(query|key|value|(?<!pooler\.)dense)",
        batches,
        lambda: held("validation"),
        lambda: held("test"),
        None,
        steps=150,
        rate=4e-3,
        head=("classifier", 1e-3),
    )


TASKS: dict[str, Callable[[], Task]] = {
    "german": lambda: byte_task("german"),
    "source-code": lambda: byte_task("source-code"),
    "news": news_task,
    "labels": labels_task,
    "smollm2": smollm2_task,
}


def task_of(name: str) -> Task:
    """A task, with its data cached."""
    return TASKS[name]()


@cache
def shapes(task: Task) -> dict[str, int]:
    """Modules to adapt, in order, with their parameters per rank."""
    linear = {name: module for name, module in task.model().named_modules() if isinstance(module, nn.Linear)}
    return {name: sum(module.weight.shape) for name, module in linear.items() if re.fullmatch(task.targets, name)}


def filled(weights: dict[str, float], costs: dict[str, int], size: int) -> Ranks:
    """Ranks in proportion to the weights, rounded to use up the size."""
    most = int(2 * size / min(costs.values()))
    # The k-th rank of a module is granted when the common factor reaches (k − ½) / weight.
    worth = [costs[n] * weights[n] / (torch.arange(1, most + 1) - 0.5).double() for n in costs]
    ranks = dict(zip(costs, best_per_parameter(worth, list(costs.values()), size), strict=True))
    for name in sorted(costs, key=lambda n: (-weights[n], -costs[n])):
        rest = size - sum(costs[n] * r for n, r in ranks.items())
        if weights[name] and rest >= costs[name]:
            ranks[name] += 1
    return ranks


def kind_of(module: str) -> str:
    """Module name without layer numbers, shared by modules of one type."""
    return ".".join(part for part in module.split(".") if not part.isdigit())


def layer_of(module: str) -> str:
    """Its layer number."""
    return next((part for part in module.split(".") if part.isdigit()), "")


def averaged(ranks: Ranks, group: Callable[[str], str]) -> dict[str, float]:
    """Replace every module's rank by the mean of its group."""
    members: dict[str, list[int]] = {}
    for module, rank in ranks.items():
        members.setdefault(group(module), []).append(rank)
    return {module: sum(members[group(module)]) / len(members[group(module)]) for module in ranks}


def shuffled(ranks: Ranks, seed: int) -> Ranks:
    """Permute ranks between modules of one type."""
    members: dict[str, list[str]] = {}
    for module in ranks:
        members.setdefault(kind_of(module), []).append(module)
    found, source = dict(ranks), random.Random(seed)
    for modules in members.values():
        order = modules[1:] + modules[:1] if len(modules) == 2 else source.sample(modules, len(modules))
        found |= {module: ranks[other] for module, other in zip(modules, order, strict=True)}
    return found


def with_lora(task: Task, ranks: Ranks, seed: int, factors: list[Factors] | None = None, **options: Any) -> Any:
    """PEFT model with LoRA of these ranks, new or from factors."""
    from peft import LoraConfig, get_peft_model

    kept = {module: rank for module, rank in ranks.items() if rank}
    config = LoraConfig(
        r=1,
        lora_alpha=SCALING,
        target_modules=list(kept),
        rank_pattern=kept,
        alpha_pattern={module: SCALING * rank for module, rank in kept.items()},
        init_lora_weights=factors is None,
        **options,
    )
    torch.manual_seed(seed)
    model = get_peft_model(task.model(), config)
    for part in factors or ():
        if part.rank:
            layer = model.base_model.model.get_submodule(part.module)
            layer.lora_A["default"].weight.data.copy_(part.A / math.sqrt(SCALING))
            layer.lora_B["default"].weight.data.copy_(part.B / math.sqrt(SCALING))
    return model


@dataclass
class Course:
    """Training with one seed: remaining batches, current step, and learned head."""

    task: Task
    seed: int
    total: int

    def __post_init__(self) -> None:
        self.batches, self.step = self.task.batches(self.seed), 0
        self.head: dict[str, Tensor] = {}

    def train(
        self,
        model: Any,
        rate: float,
        until: int,
        after: Callable[[int], None] = lambda step: None,
        watch: Callable[[Any], None] = lambda optimizer: None,
    ) -> None:
        """AdamW with a new state and warm-up, on one linear decay over the whole course."""
        begin, adapter, head = self.step, [], []
        warm = max(1, self.total // 20 if begin == 0 else WARM_UP * self.total // 500)
        for name, parameter in model.named_parameters():
            if self.task.head and self.task.head[0] in name:
                parameter.requires_grad_(True)
                head.append(parameter)
                if name in self.head:
                    parameter.data.copy_(self.head[name])
            elif parameter.requires_grad:
                adapter.append(parameter)
        groups = [{"params": adapter, "lr": rate}]
        if self.task.head:
            groups.append({"params": head, "lr": self.task.head[1]})
        optimizer = torch.optim.AdamW(groups, weight_decay=0)
        watch(optimizer)

        def share(done: int) -> float:
            return min(1.0, (done + 1) / warm) * (1 - (begin + done) / self.total)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        model.train()
        while self.step < until:
            optimizer.zero_grad()
            loss = model.base_model(**next(self.batches)).loss
            if not torch.isfinite(loss):
                raise FloatingPointError
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
            self.step += 1
            after(self.step)
        model.eval()
        if self.task.head:
            self.head = {n: p.data.clone() for n, p in model.named_parameters() if self.task.head[0] in n}

    def moments(self, model: Any) -> tuple[list[Factors], dict[str, Any], int]:
        """Factors of a model, and moments of the next batches."""
        whole = factorize(model, energy=1.0)
        batches = [next(self.batches) for _ in range(MOMENT_BATCHES)]
        return whole, *collect_moments(model, whole, batches)


def cut_by_loss(whole: list[Factors], moments: Any, terms: int, size: int) -> list[Factors]:
    """Directions and ranks by the quadratic model."""
    return LossCurve([directions(part, moments[part.module], terms) for part in whole]).within(size)


def cut_by_scalar(whole: list[Factors], moments: Any, terms: int, size: int) -> list[Factors]:
    """SVD directions, with energies scaled by one scalar per module: E‖x‖² E‖g‖² within the update's span."""
    worth = []
    for part in whole:
        sigma = part.A.double().square().sum(1)
        of = moments[part.module]
        inputs, gradients = ((m.diagonal() / sigma).mean() for m in (of.inputs / of.weight, of.gradients / terms))
        worth.append(sigma.square() * inputs * gradients)
    return kept(whole, best_per_parameter(worth, [part.parameters_per_rank for part in whole], size))


def cut_by_energy(whole: list[Factors], moments: Any, terms: int, size: int) -> list[Factors]:
    """Largest σ² of all modules."""
    worth = [part.A.double().square().sum(1).square() for part in whole]
    return kept(whole, best_per_parameter(worth, [part.parameters_per_rank for part in whole], size))


def cut_equally(whole: list[Factors], moments: Any, terms: int, size: int) -> list[Factors]:
    """SVD of every module at r = 4, as in LoRA-Squeeze."""
    return kept(whole, [RANK] * len(whole))


def kept(whole: list[Factors], ranks: list[int]) -> list[Factors]:
    """Leading SVD directions."""
    return [replace(part, A=part.A[:r], B=part.B[:, :r]) for part, r in zip(whole, ranks, strict=True)]


CUTS = {"loss": cut_by_loss, "scalar": cut_by_scalar, "energy": cut_by_energy, "equal": cut_equally}


@dataclass
class Outcome:
    """A trained model, and its final ranks."""

    model: Any
    ranks: Ranks


def by_cut(cut: str, shares: tuple[float, ...], widths: tuple[int, ...], wide_rate: float) -> Callable[..., Outcome]:
    """LoRA that starts wide and is cut, at shares of the steps, to the sizes of these widths; the last is final."""

    def train(task: Task, seed: int, rate: float, known: Callable[[str], Ranks]) -> Outcome:
        course, costs = Course(task, seed, task.steps), shapes(task)
        model, ranks = with_lora(task, dict.fromkeys(costs, WIDE), seed), dict.fromkeys(costs, WIDE)
        for share, width in zip(shares, widths, strict=True):
            course.train(model, rate * wide_rate, int(share * task.steps))
            whole, moments, terms = course.moments(model)
            factors = CUTS[cut](whole, moments, terms, width * sum(costs.values()))
            ranks = {part.module: part.rank for part in factors}
            model = with_lora(task, ranks, seed, factors)
        course.train(model, rate, task.steps)
        return Outcome(model, ranks)

    return train


def by_library(rank: int, max_rank: int | None = None) -> Callable[..., Outcome]:
    """`lrlora.LearnedRanks` at the size of LoRA with this rank, and at most a rank of each module."""
    from lrlora import LearnedRanks

    def train(task: Task, seed: int, rate: float, known: Callable[[str], Ranks]) -> Outcome:
        costs, found = shapes(task), []
        model = with_lora(task, dict.fromkeys(costs, 4 * rank), seed)

        def watch(optimizer: Any) -> None:
            found.append(LearnedRanks(model, optimizer, size=f"r{rank}", steps=task.steps, max_rank=max_rank))

        Course(task, seed, task.steps).train(model, rate, task.steps, watch=watch)
        return Outcome(model, found[0].ranks)

    return train


def by_ranks(choose: Callable[[Task, int, Callable[[str], Ranks]], dict[str, float]]) -> Callable[..., Outcome]:
    """LoRA with ranks in proportion to given weights from the first step on."""

    def train(task: Task, seed: int, rate: float, known: Callable[[str], Ranks]) -> Outcome:
        costs = shapes(task)
        ranks = filled(choose(task, seed, known), costs, RANK * sum(costs.values()))
        model, course = with_lora(task, ranks, seed), Course(task, seed, task.steps)
        course.train(model, rate, task.steps)
        return Outcome(model, ranks)

    return train


def by_pilot(share: float) -> Callable[..., Outcome]:
    """Ranks by loss from a short LoRA r = 16, then a new LoRA for the remaining steps."""

    def train(task: Task, seed: int, rate: float, known: Callable[[str], Ranks]) -> Outcome:
        costs, steps = shapes(task), int(share * task.steps)
        size, pilot = RANK * sum(costs.values()), Course(task, seed + 100, steps)
        model = with_lora(task, dict.fromkeys(costs, WIDE), seed)
        pilot.train(model, rate / 2, steps)
        ranks = {part.module: part.rank for part in cut_by_loss(*pilot.moments(model), size)}
        course = Course(task, seed, task.steps - steps)
        model = with_lora(task, ranks, seed)
        course.head = pilot.head
        course.train(model, rate, course.total)
        return Outcome(model, ranks)

    return train


def tokens_of(layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
    """Inputs of a layer without padding: (tokens, features)."""
    found = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    found = found.flatten(0, -2)
    return found if mask is None else found[mask.flatten().bool()]


def by_eva(rank: int) -> Callable[..., Outcome]:
    """EVA: directions and ranks from input variance, before training."""

    def train(task: Task, seed: int, rate: float, known: Callable[[str], Ranks]) -> Outcome:
        from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

        costs, batches = shapes(task), task.batches(seed + 100)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=SCALING * rank,
            target_modules=list(costs),
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=2.0, adjust_scaling_factors=True),
        )
        model = get_peft_model(task.model(), config)
        initialize_lora_eva_weights(
            model,
            [next(batches) for _ in range(24)],
            prepare_model_inputs_fn=lambda batch, config: batch.get("attention_mask"),
            prepare_layer_inputs_fn=tokens_of,
            show_progress_bar=False,
        )
        found = dict.fromkeys(costs, 0)
        for name, module in model.base_model.model.named_modules():
            if name in costs and hasattr(module, "r"):
                found[name] = module.r["default"]
        Course(task, seed, task.steps).train(model, rate, task.steps)
        return Outcome(model, found)

    return train


def by_adalora(target: int, per_parameter: bool) -> Callable[..., Outcome]:
    """PEFT's AdaLoRA with its call and penalty; optionally with rank importance per parameter."""

    def train(task: Task, seed: int, rate: float, known: Callable[[str], Ranks]) -> Outcome:
        from peft import AdaLoraConfig, get_peft_model

        costs, steps = shapes(task), task.steps
        torch.manual_seed(seed)
        config = AdaLoraConfig(
            init_r=WIDE,
            target_r=target,
            lora_alpha=SCALING * WIDE,
            target_modules=list(costs),
            total_step=steps,
            tinit=steps // 10,
            tfinal=steps // 2,
            deltaT=max(1, steps // 50),
        )
        model = get_peft_model(task.model(), config)
        if per_parameter:
            allocator = model.base_model.rankallocator
            score = allocator._element_score
            # All three parts of a rank's importance are sums of these.
            allocator._element_score = lambda name: score(name) / costs[name.split(".lora_")[0]]
        Course(task, seed, steps).train(model, rate, steps, after=model.base_model.update_and_allocate)
        pattern = config.rank_pattern
        ranks = {name: int(sum(pattern[f"{name}.lora_E.default"])) for name in costs}
        return Outcome(model, ranks)

    return train


def is_mlp(module: str) -> bool:
    """Whether in the feed-forward part of a layer."""
    return any(part in module for part in ("fc1", "fc2", "gate_", "up_", "down_", "intermediate")) or (
        "output.dense" in module and "attention" not in module
    )


def equal(task: Task, seed: int, known: Callable[[str], Ranks]) -> dict[str, float]:
    """Equal ranks."""
    return dict.fromkeys(shapes(task), 1.0)


def mlp(task: Task, seed: int, known: Callable[[str], Ranks]) -> dict[str, float]:
    """Equal ranks for the feed-forward parts, none elsewhere."""
    return {module: float(is_mlp(module)) for module in shapes(task)}


class NotYetError(Exception):
    """A dependency of the run is not done."""


@dataclass(frozen=True)
class Method:
    """A rank-selection method.

    Args:
        train: task, seed, rate and the ranks of other methods with this seed → a trained model.
        name: name in the table.
        rate_of: method whose tuned rate is used; None: its own.

    """

    train: Callable[..., Outcome]
    name: str
    rate_of: str | None = None


METHODS = {
    "lora": Method(by_ranks(equal), "LoRA"),
    "loss": Method(by_cut("loss", (CUT_AT,), (RANK,), 0.5), "**16 → 4 at 30 %, by loss**"),
    "scalar": Method(by_cut("scalar", (CUT_AT,), (RANK,), 0.5), "16 → 4 at 30 %, energy × one scalar a module"),
    "learned": Method(by_ranks(lambda t, s, known: known("loss")), "the ranks by loss, in a new run"),
    "pilot-5": Method(by_pilot(0.05), "ranks of a pilot of 5 % of the steps", "learned"),
    "mlp": Method(by_ranks(mlp), "LoRA on the MLP only"),
    "steps": Method(by_cut("loss", (0.1, CUT_AT), (8, RANK), 0.5), "**16 → 8 → 4 at 10 and 30 %, by loss**", "loss"),
    "adalora-3": Method(by_adalora(3, False), "AdaLoRA, target_r = 3"),
    "adalora-2": Method(by_adalora(2, False), "AdaLoRA, target_r = 2", "adalora-3"),
    "per-parameter-4": Method(by_adalora(4, True), "AdaLoRA, importance over m + n, target_r = 4", "adalora-3"),
    "per-parameter-3": Method(by_adalora(3, True), "AdaLoRA, importance over m + n, target_r = 3", "adalora-3"),
    "pilot-10": Method(by_pilot(0.1), "ranks of a pilot of 10 % of the steps", "learned"),
    "equal": Method(by_cut("equal", (CUT_AT,), (RANK,), 0.5), "16 → 4 at 30 %, every module 4", "loss"),
    "energy": Method(by_cut("energy", (CUT_AT,), (RANK,), 0.5), "16 → 4 at 30 %, by energy", "loss"),
    "type": Method(
        by_ranks(lambda t, s, known: averaged(known("loss"), kind_of)), "the ranks by loss, by type only", "learned"
    ),
    "layer": Method(
        by_ranks(lambda t, s, known: averaged(known("loss"), layer_of)), "the ranks by loss, by layer only", "learned"
    ),
    "shuffled": Method(
        by_ranks(lambda t, s, known: shuffled(known("loss"), s)), "the ranks by loss, shuffled within types", "learned"
    ),
    "eva-4": Method(by_eva(4), "EVA, r = 4"),
    "eva-3": Method(by_eva(3), "EVA, r = 3", "eva-4"),
    "library": Method(by_library(4), "**`LearnedRanks`: by loss, moments of the 32 steps before**", "loss"),
    "in-place": Method(by_library(4), "**`LearnedRanks` as it is now: partial traces, cut in place**", "loss"),
}  # fmt: skip
# LoRA at other ranks: where its loss is flat, methods cannot be distinguished.
CURVE = {f"lora-{r}": r for r in (1, 2, 8, 16)}
METHODS |= {
    name: Method(
        lambda task, seed, rate, known, r=r: _at_rank(task, seed, rate, r), f"LoRA r = {r}", "lora" if r == 1 else None
    )
    for name, r in CURVE.items()
}
SIZES = {f"library-{r}": Method(by_library(r), f"`LearnedRanks` at r = {r}") for r in (2, 8)}
METHODS |= SIZES
SERVED = {
    f"at-most-{k}": Method(by_library(4, k), f"learned ranks of the size of r = 4, at most {k}", "loss") for k in (6, 8)
}
METHODS |= SERVED


def _at_rank(task: Task, seed: int, rate: float, r: int) -> Outcome:
    """LoRA with rank r everywhere."""
    ranks = dict.fromkeys(shapes(task), r)
    model = with_lora(task, ranks, seed)
    Course(task, seed, task.steps).train(model, rate, task.steps)
    return Outcome(model, ranks)


def stored() -> list[dict[str, Any]]:
    """All results."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def rows_of(name: str, method: str) -> list[dict[str, Any]]:
    """Of one task and method."""
    return [row for row in stored() if (row["task"], row["method"]) == (name, method)]


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Row with the lowest validation loss."""
    return min(rows, key=lambda row: row["validation"])


def tuned(name: str, method: str) -> float:
    """Best rate of a method on a task, for the first seed."""
    job = wanted(name, method)
    if job is not None and job[0] == 0:
        raise NotYetError
    return float(best_of([row for row in rows_of(name, method) if row["seed"] == 0])["rate"])


def wanted(name: str, method: str) -> tuple[int, float] | None:
    """Seed and rate of the next run of a method; None if all are done.

    The first seed searches by factors of two in both directions until the best is inside. The others use its best rate.
    """
    own = rows_of(name, method)
    of = METHODS[method].rate_of
    if of is None:
        first = [row for row in own if row["seed"] == 0]
        if not first:
            return 0, task_of(name).rate
        best = best_of(first)["rate"]
        for near in (best * 2, best / 2):
            if len(first) < 3 + EDGE and not any(math.isclose(near, row["rate"]) for row in first):
                return 0, near
    else:
        best = tuned(name, of)
    done = {row["seed"] for row in own if row["rate"] == best}
    in_study = any(method in pair for pair in STUDY.values())
    seeds = STUDY_SEEDS if in_study else SEEDS[:1] if method in CURVE else SEEDS
    return next(((seed, best) for seed in seeds if seed not in done), None)


def known_ranks(name: str, seed: int) -> Callable[[str], Ranks]:
    """Ranks that another method found with this seed at its tuned rate."""

    def known(method: str) -> Ranks:
        rate = tuned(name, method)
        for row in rows_of(name, method):
            if (row["seed"], row["rate"]) == (seed, rate):
                return dict(row["ranks"])
        raise NotYetError

    return known


@torch.no_grad()
def loss_of(model: Any, batches: list[Batch]) -> tuple[float, float]:
    """Mean loss over all labels, from the logits only, and accuracy."""
    total, count, right = 0.0, 0, 0
    for batch in batches:
        output = model.base_model.model(**batch)
        value, terms = model_loss(model.base_model.model, batch)
        total, count = total + float(value.sum()), count + int(terms.sum())
        if batch["labels"].dim() == 1:
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return total / count, right / count


def run(name: str, task: Task, method: str, seed: int, rate: float) -> None:
    """Train once, and append the result."""
    start, costs = time.perf_counter(), shapes(task)
    row: dict[str, Any] = {"task": name, "method": method, "seed": seed, "rate": rate}
    try:
        outcome = METHODS[method].train(task, seed, rate, known_ranks(name, seed))
    except FloatingPointError:
        row |= {"validation": 1e9, "test": 1e9, "size": 0, "ranks": {}}
    else:
        model = outcome.model
        row["validation"], row["validation accuracy"] = loss_of(model, task.validation())
        row["test"], row["test accuracy"] = loss_of(model, task.test())
        if task.forgotten:
            row["forgotten"] = loss_of(model, task.forgotten())[0]
        row["size"] = sum(costs[module] * rank for module, rank in outcome.ranks.items())
        row["ranks"] = outcome.ranks
    row["seconds"] = round(time.perf_counter() - start)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({key: value for key, value in row.items() if key != "ranks"}, flush=True)


def work(names: list[str], methods: list[str]) -> None:
    """Process remaining runs that no other process does, until none is left."""
    CLAIMS.mkdir(parents=True, exist_ok=True)
    while any(work_on(name, method) for name in names for method in methods):
        pass


def work_on(name: str, method: str) -> bool:
    """Process a method's next run; False if none is available now."""
    try:
        job = wanted(name, method)
    except NotYetError:
        job = None
    if job is None:
        return False
    claim = CLAIMS / f"{name}-{method}-{job[0]}-{job[1]:g}"
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    try:
        run(name, task_of(name), method, *job)
    except NotYetError:
        return False
    finally:
        claim.unlink()
    return True


# Methods that count ranks instead of parameters: each at two ranks, interpolated at the common size.
PAIRS = {
    "adalora": ("adalora-3", "adalora-2"),
    "per-parameter": ("per-parameter-4", "per-parameter-3"),
    "eva": ("eva-4", "eva-3"),
}


def tested(name: str, method: str) -> dict[int, tuple[float, float]]:
    """Seed → parameters and test loss, at the tuned rate; empty if unknown."""
    try:
        rate = tuned(name, METHODS[method].rate_of or method)
    except NotYetError:
        return {}
    rows = [row for row in rows_of(name, method) if row["rate"] == rate and row["size"]]
    return {row["seed"]: (row["size"], row["test"]) for row in rows}


def at_size(name: str, method: str, size: int) -> dict[int, float]:
    """Seed → test loss; for a pair of ranks, interpolated linearly in the log of the parameters."""
    if method not in PAIRS:
        return {seed: loss for seed, (_, loss) in tested(name, method).items()}
    first, second = (tested(name, each) for each in PAIRS[method])
    found = {}
    for seed in first.keys() & second.keys():
        (a, x), (b, y) = first[seed], second[seed]
        found[seed] = x if a == b else x + (y - x) * (math.log(size) - math.log(a)) / (math.log(b) - math.log(a))
    return found


def differences() -> str:
    """Loss of every method, and its excess over the cut by loss, paired by seed, on each task."""
    others = {*CURVE, *SIZES, *sum(PAIRS.values(), ())}
    singles = [method for method in METHODS if method not in others]
    lines = []
    for name in TASKS:
        own = {seed: loss for seed, (_, loss) in tested(name, "loss").items()}
        if not own:
            continue
        size = tested(name, "lora")[SEEDS[0]][0]
        for method in (*singles, *PAIRS):
            found = {seed: loss for seed, loss in at_size(name, method, size).items() if seed in own}
            if not found:
                continue
            gap = paired_difference([found[s] for s in found], [own[s] for s in found])
            assert gap is not None
            interval = "" if math.isnan(gap.low) else f" ({gap.low:+.3f} to {gap.high:+.3f})"
            about = METHODS[method].name if method in METHODS else METHODS[PAIRS[method][0]].name.rpartition(",")[0]
            mean = sum(found.values()) / len(found)
            excess = "" if method == "loss" else f"{gap.value:+.3f}{interval}"
            lines.append([name, about, str(len(found)), f"{mean:.3f}", excess])
    return table(["task", "method", "seeds", "test loss", "more than the cut by loss"], lines)


def study() -> str:
    """`LearnedRanks` and LoRA at the sizes of the study on every task, paired by seed.

    p is corrected by Holm over the tasks, at r = 4. "As LoRA at" is the rank at which LoRA reaches the same loss,
    interpolated in log r between its losses at r and 2 r.
    """
    found = {}
    for size, methods in STUDY.items():
        for name in TASKS:
            lora, own = (tested(name, method) for method in methods)
            if len(seeds := sorted(own.keys() & lora.keys())) > 1:
                found[size, name] = [[losses[seed][1] for seed in seeds] for losses in (lora, own)]
    gaps = {key: paired_difference(learned, lora) for key, (lora, learned) in found.items()}
    primary = [key for key in gaps if key[0] == RANK]
    p_of = dict(zip(primary, holm([float(gaps[key].p) for key in primary]), strict=True))  # type: ignore[union-attr]
    lines = []
    for (size, name), gap in gaps.items():
        assert gap is not None
        lora, learned = (sum(losses) / len(losses) for losses in found[size, name])
        larger = tested(name, STUDY[2 * size][0]) if 2 * size in STUDY else {}
        twice = sum(loss for _, loss in larger.values()) / len(larger) if larger else math.nan
        equal = f"r = {size * 2 ** ((lora - learned) / (lora - twice)):.1f}" if larger else ""
        forgotten = [forgetting(name, method) for method in STUDY[size]]
        difference = f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
        rates = " / ".join(f"{tuned(name, METHODS[method].rate_of or method):g}" for method in STUDY[size])
        p = f"{p_of[size, name]:.2g}" if size == RANK else ""
        losses = [f"{lora:.3f}", f"{learned:.3f}"]
        count = str(len(found[size, name][0]))
        lines.append([f"r = {size}", name, count, rates, *losses, difference, p, equal, *forgotten])
    heads = ["size", "task", "seeds", "rates", "LoRA", "learned", "difference", "p", "as LoRA at"]
    return table([*heads, "LoRA, base's text", "learned, base's text"], lines)


def changes() -> str:
    """`LearnedRanks` that counted tokens and changed shapes, and as it is now, paired by seed."""
    lines = []
    for name in TASKS:
        before, now = (tested(name, method) for method in ("library", "in-place"))
        seeds = sorted(before.keys() & now.keys())
        if len(seeds) > 1:
            losses = [[of[seed][1] for seed in seeds] for of in (before, now)]
            gap = paired_difference(losses[1], losses[0])
            assert gap is not None
            means = [f"{sum(each) / len(each):.3f}" for each in losses]
            lines.append([name, str(len(seeds)), *means, f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"])
    return table(["task", "seeds", "before", "now", "difference"], lines)


def served() -> str:
    """Learned ranks where a server reserves the largest rank, beside LoRA at that rank."""
    lines = []
    for name in ("german", "source-code"):
        costs = shapes(task_of(name))
        rivals = {"lora": "LoRA r = 4", "in-place": "learned ranks of the size of r = 4"}
        rivals |= {method: METHODS[method].name for method in SERVED} | {"lora-8": "LoRA r = 8"}
        for method, title in rivals.items():
            rows = [row for row in rows_of(name, method) if row["seed"] in (0, 1, 2)]
            rate = tuned(name, METHODS[method].rate_of or method)
            rows = [row for row in rows if row["rate"] == rate]
            if not rows:
                continue
            largest = {"lora": 4, "lora-8": 8}.get(method) or max(max(row["ranks"].values()) for row in rows)
            size = fmean(row["size"] for row in rows) / sum(costs.values())
            losses = [row["test"] for row in rows]
            lines.append(
                [
                    name,
                    title,
                    str(len(rows)),
                    f"r = {size:.2g}",
                    f"r = {largest}",
                    f"{fmean(losses):.3f} ± {stdev(losses):.3f}",
                ]
            )
    return table(["task", "method", "seeds", "size", "reserved", "test loss"], lines)


def forgetting(name: str, method: str) -> str:
    """Mean loss on text like the base model's; empty if not measured."""
    rate = tuned(name, METHODS[method].rate_of or method)
    held = [row["forgotten"] for row in rows_of(name, method) if row["rate"] == rate and "forgotten" in row]
    return f"{sum(held) / len(held):.2f}" if held else ""


def agreement() -> str:
    """Share of the ranks that two seeds' learned ranks have in common, Σ min(r, r') / Σ r, and that of other ranks."""
    learned = {}
    for name in TASKS:
        rate = tuned(name, "loss")
        learned[name] = [row["ranks"] for row in rows_of(name, "library") if row["rate"] == rate]

    def common(a: Ranks, b: Ranks) -> float:
        return sum(min(rank, b[module]) for module, rank in a.items()) / sum(a.values())

    lines = []
    for name, ranks in learned.items():
        pairs = [(a, b) for a in ranks for b in ranks if a is not b]
        others = [b for other in TASKS if other != name for b in learned[other] if b.keys() == ranks[0].keys()]
        found = [
            [common(a, b) for a, b in pairs],
            [common(a, b) for a in ranks for b in others],
            [common(a, shuffled(b, seed)) for seed, (a, b) in enumerate(pairs)],
            [common(a, dict.fromkeys(a, RANK)) for a in ranks],
        ]
        lines.append([name, *(f"{sum(each) / len(each):.0%}" if each else "" for each in found)])
    return table(["task", "another seed", "another task", "another seed, shuffled within types", "equal ranks"], lines)


def measure_curves(names: list[str]) -> None:
    """Append the share of a wide LoRA's effect that each size loses by the curve at the cut, where not yet known."""
    for name in names:
        task = task_of(name)
        costs, rate = shapes(task), tuned(name, "loss")
        for seed in {*SEEDS} - {row["seed"] for row in rows_of(name, "curve")}:
            course = Course(task, seed, task.steps)
            model = with_lora(task, dict.fromkeys(costs, WIDE), seed)
            course.train(model, rate / 2, int(CUT_AT * task.steps))
            whole, moments, terms = course.moments(model)
            curve = LossCurve([directions(part, moments[part.module], terms) for part in whole])
            total = sum(of.rises.sum().item() for of in curve.modules)
            lost = {r: curve.predicted_rise(curve.within(r * sum(costs.values()))) / total for r in STUDY}
            with RESULTS.open("a") as file:
                file.write(json.dumps({"task": name, "method": "curve", "seed": seed, "lost": lost}) + "\n")


def advice() -> str:
    """Share of the effect that each size loses by the curve at the cut, and the test loss of learned ranks there."""
    lines = []
    for name in TASKS:
        rows = rows_of(name, "curve")
        if not rows:
            continue
        lost = [sum(row["lost"][str(r)] for row in rows) / len(rows) for r in STUDY]
        losses = [[loss for _, loss in tested(name, own).values()] for _, own in STUDY.values()]
        shown = [f"{sum(each) / len(each):.3f}" if each else "" for each in losses]
        lines.append([name, *(f"{share:.1%}" for share in lost), *shown])
    heads = [*(f"lost at r = {r}" for r in STUDY), *(f"test loss at r = {r}" for r in STUDY)]
    return table(["task", *heads], lines)


def times(rounds: int = 5) -> str:
    """Processor time and peak memory of short trainings, learned against LoRA r = 4, alternating; medians of ratios."""
    lines = []
    for name, steps in (("german", 60), ("smollm2", 20)):
        found: dict[str, list[list[float]]] = {method: [] for method in STUDY[RANK]}
        for _ in range(rounds):
            for method, each in found.items():
                command = [sys.executable, __file__, "--cost", name, method, str(steps)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                each.append([float(word) for word in done.stdout.split()[-2:]])
        ratios = [[x / y for x, y in zip(mine, its, strict=True)] for its, mine in zip(*found.values(), strict=True)]
        time_ratios, memory_ratios = zip(*ratios, strict=True)
        lines.append(
            [
                name,
                str(steps),
                f"{median(time_ratios):.2f}",
                f"{min(time_ratios):.2f} to {max(time_ratios):.2f}",
                f"{median(memory_ratios):.2f}",
            ]
        )
    return table(["task", "steps", "time / LoRA r = 4", "range", "peak memory / LoRA r = 4"], lines)


def cost(name: str, method: str, steps: int) -> tuple[float, float]:
    """Seconds of processor time of a training, and peak memory of this process in MiB."""
    task = replace(task_of(name), steps=steps)
    next(task.batches(0))  # load the data
    start = time.process_time()
    METHODS[method].train(task, 0, 1e-3, lambda method: {})
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def updated(page: str) -> str:
    """Page with tables of the stored results."""
    for name, found in (
        ("differences", differences()),
        ("study", study()),
        ("changes", changes()),
        ("served", served()),
        ("agreement", agreement()),
        ("advice", advice()),
    ):
        page = with_section(page, name, found)
    return page


def draw() -> None:
    """Learned ranks by type and layer, mean over seeds, on both tasks of the byte model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, (("german", "German"), ("source-code", "Source code")), strict=True):
        rows = [row["ranks"] for row in rows_of(name, "library")]
        kinds = list(dict.fromkeys(kind_of(module).rpartition(".")[2] for module in rows[0]))
        layers = sorted({layer_of(module) for module in rows[0]}, key=int)
        means = torch.zeros(len(kinds), len(layers))
        for row in rows:
            for module, rank in row.items():
                means[kinds.index(kind_of(module).rpartition(".")[2]), layers.index(layer_of(module))] += rank / len(
                    rows
                )
        axis.imshow(means, cmap="Blues", vmin=0, vmax=16, aspect="auto")
        for i, j in torch.cartesian_prod(torch.arange(len(kinds)), torch.arange(len(layers))).tolist():
            axis.text(
                j, i, f"{means[i, j]:.1f}", ha="center", va="center", color="white" if means[i, j] > 9 else "black"
            )
        axis.set(title=f"{title}: rank of each module (LoRA: 4)", xlabel="layer", xticks=range(len(layers)))
        axis.set_yticks(range(len(kinds)), kinds)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tasks, with commas between", default=",".join(TASKS))
    parser.add_argument("--methods", help="with commas between", default=",".join(METHODS))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--time", action="store_true", help="measure time and memory of learned ranks, and write them")
    parser.add_argument("--curves", action="store_true", help="measure the curves at the cut")
    parser.add_argument("--cost", nargs=3, metavar=("TASK", "METHOD", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cost:
        name, method, steps = options.cost
        print(*cost(name, method, int(steps)))
        return
    if options.time:
        found = times()
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), "times", found), encoding="utf-8")
        return
    if options.curves:
        measure_curves(options.only.split(","))
        return
    if options.report:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        draw()
        return
    work(options.only.split(","), options.methods.split(","))


if __name__ == "__main__":
    main()
