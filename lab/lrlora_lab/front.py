"""When to cut a LoRA, and how much: loss against parameters, for cuts at several moments to several shares of the gain.

    python -m lrlora_lab.front front.jsonl german 0 1 2
    python -m lrlora_lab.front_report front.jsonl

All cuts of a seed share the course of the wide LoRA up to their step: the process forks there, and each copy goes on in
its own way. Rows that the output has already are not computed again; `--arms REGEX` computes only the arms that match.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_cosine_schedule_with_warmup

from lrlora.learned import LearnedRanks, shrink
from lrlora.learned.directions import energy_curve
from lrlora.learned.held_out import LiveLosses
from lrlora.learned.live_cut import LiveCut
from lrlora.learned.moments import model_loss
from lrlora.lora.live import lora_factors, lora_layers, lora_weights, put
from lrlora.train.embedded import EMBEDDED_DATA, MINILM, checkpoint

from .byte_model import CONTEXT, base_model, load_corpus, mean_loss, sample_batch
from .capacity import CLIP_NORM, WARMUP_STEPS

WIDE = 16
AT, SHARES = (0.3, 0.6, 1.0), (0.9, 0.95, 0.99)
SMALL = (2, 4, 8)  # ranks of LoRAs, whose rates are tuned on the first seed
FACTORS = (1, 2)  # of the recipe's rate
_BEFORE = 34  # steps before a cut at which the courses part: moments come from the last 32
_HELD_OUT = 320
_TEXTS = 48  # tokens


@dataclass(frozen=True)
class Data:
    """Model and data of a seed.

    Attributes:
        model: the base, without an adapter.
        targets: modules to adapt.
        batches: training batches, endless.
        held_out: batches for the cut.
        test: returns loss, and accuracy where there is one.
        kept: modules trained besides.

    """

    model: Any
    targets: str
    batches: Callable[[], Iterator[Any]]
    held_out: list[Any]
    test: Callable[[Any], dict[str, float]]
    kept: list[str] | None = None


@dataclass(frozen=True)
class Task:
    """A recipe: the rate of LoRA r = 16, α/r, and the number of steps."""

    load: Callable[[int], Data]
    rate: float
    scale: float
    steps: int


def bytes_task(corpus: str, size: int = 8) -> Callable[[int], Data]:
    """Byte model and a corpus, in batches of a size; of a seed."""

    def load(seed: int) -> Data:
        data, generator = load_corpus(corpus), torch.Generator().manual_seed(seed)

        def batch(of: Tensor, size: int, source: torch.Generator) -> dict[str, Tensor]:
            windows = sample_batch(of, source, size)
            return {"input_ids": windows, "labels": windows}

        def batches() -> Iterator[Any]:
            while True:
                yield batch(data.train, size, generator)

        other = torch.Generator().manual_seed(1_000 + seed)
        held_out = [batch(data.validation, 16, other) for _ in range(_HELD_OUT // 16)]
        windows = min(512, len(data.test) // CONTEXT)
        return Data(
            base_model(),
            r".*\.(\w+_proj|fc\d)",
            batches,
            held_out,
            lambda model: {"loss": mean_loss(model, data.test, windows)},
        )

    return load


def texts_task(name: str, size: int = 16, *, are_random: bool = False) -> Callable[[int], Data]:
    """MiniLM and texts with labels, in batches of a size; of a seed."""

    def load(seed: int) -> Data:
        splits, generator = EMBEDDED_DATA[name].load(), torch.Generator().manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(MINILM))
        classes = splits["train"].features["label"].num_classes
        train = splits["train"].shuffle(seed=seed)
        labels = torch.tensor(list(train["label"]))
        if are_random:
            labels = torch.randint(classes, (len(labels),), generator=generator)
        texts, count = list(train["text"]), len(train) - _HELD_OUT

        def batch(rows: list[int]) -> Any:
            encoded = tokenizer([texts[row] for row in rows], truncation=True, max_length=_TEXTS, padding=True)
            return {**{key: torch.tensor(value) for key, value in encoded.items()}, "labels": labels[rows]}

        def batches() -> Iterator[Any]:
            while True:
                for rows in torch.randperm(count, generator=generator)[: count // size * size].split(size):
                    yield batch(rows.tolist())

        @torch.no_grad()
        def test(model: Any) -> dict[str, float]:
            found, right, total = 0.0, 0, min(2_000, len(splits["test"]))
            for rows in splits["test"].shuffle(seed=0).select(range(total)).batch(50):
                encoded = tokenizer(rows["text"], truncation=True, max_length=_TEXTS, padding=True, return_tensors="pt")
                logits, correct = model(**encoded).logits, torch.tensor(rows["label"])
                found += nn.functional.cross_entropy(logits, correct, reduction="sum").item()
                right += int((logits.argmax(1) == correct).sum())
            return {"loss": found / total, "accuracy": right / total}

        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint(MINILM), num_labels=classes)
        held_out = [batch(list(range(first, first + 16))) for first in range(count, count + _HELD_OUT, 16)]
        return Data(model, r".*layer.*(query|key|value|dense)", batches, held_out, test, ["classifier"])

    return load


TASKS = {
    "german": Task(bytes_task("german"), 0.005, 4.0, 500),
    "source-code": Task(bytes_task("source-code"), 0.005, 4.0, 500),
    "spanish": Task(bytes_task("spanish"), 0.005, 4.0, 500),
    "reviews": Task(texts_task("movie-reviews"), 1e-3, 2.0, 200),
    "topics": Task(texts_task("r8"), 1e-3, 2.0, 200),
    "random-labels": Task(texts_task("movie-reviews", are_random=True), 1e-3, 2.0, 200),
}
# German at multiples of the best rate, for the rate after the cut.
RATES = {
    f"german-{factor:g}": replace(TASKS["german"], rate=factor * TASKS["german"].rate)
    for factor in (0.1, 0.25, 1.0, 2.0)
}
# Rule → factors of the rates of A and B after the cut, from the ratio of all parameters and that of the module's rank.
RULES: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "same rate": lambda whole, module: (1.0, 1.0),
    "ratio": lambda whole, module: (whole, whole),
    "per module": lambda whole, module: (module**0.5, module**0.5),
    "on B alone": lambda whole, module: (1.0, whole),
}


class Course:
    """A run that can be copied at any step."""

    def __init__(self, task: Task, seed: int, rank: int, rate: float, alpha: int | None = None) -> None:
        self.task, self.data, self.done, self.seconds = task, task.load(seed), 0, 0.0
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=round(task.scale * rank) if alpha is None else alpha,
            target_modules=self.data.targets,
            modules_to_save=self.data.kept,
        )
        self.model: Any = get_peft_model(self.data.model, config)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0)
        warm_up = min(WARMUP_STEPS, task.steps // 10)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warm_up, task.steps)
        self.batches = self.data.batches()
        self.model.train()

    def run(self, until: int) -> None:
        """Train up to a step."""
        started = time.process_time()
        while self.done < until:
            loss = self.model(**next(self.batches)).loss
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
            self.optimizer.step()
            self.schedule.step()
            self.done += 1
        self.seconds += time.process_time() - started

    def row(self, **also: Any) -> dict[str, Any]:
        """Loss, size and processor time at the end."""
        self.run(self.task.steps)
        self.model.eval()
        factors = lora_factors(self.model, "default")
        ranks = [part.rank for part in factors]
        return {
            **{name: round(value, 5) for name, value in self.data.test(self.model).items()},
            "parameters": sum(part.parameters for part in factors),
            "largest_rank": max(ranks),
            "seconds": round(self.seconds, 1),
            **also,
        }


def _cut(course: Course, at: float, **asked: Any) -> dict[str, Any]:
    """Cut while training, with the moments of the last steps before it."""
    if "keep" in asked:
        asked["held_out"] = course.data.held_out
    learned = LearnedRanks(course.model, course.optimizer, steps=course.task.steps, at=at, **asked)
    learned.load_state_dict({**learned.state_dict(), "done": course.done})
    course.run(course.task.steps)
    return course.row(told=learned.summary if learned.shrunk is None else str(learned.shrunk), rate=learned.rate)


def _cut_by_rule(course: Course, at: float, keep: float, rule: str) -> dict[str, Any]:
    """Cut to a share, and go on at the rates of a rule."""
    held_out = course.data.held_out
    learned = LearnedRanks(
        course.model, course.optimizer, steps=course.task.steps, at=at, keep=keep, held_out=held_out, rate=1.0
    )
    learned.load_state_dict({**learned.state_dict(), "done": course.done})
    learned.defer_finish()
    course.run(learned.cut_step)
    ranks = learned.ranks or {}
    wide, before = sum(part.parameters for part in lora_factors(course.model, "default")), {}
    factors: dict[nn.Parameter, float] = {}
    for path, layer in lora_layers(course.model, "default").items():
        of_a, of_b = RULES[rule](wide / learned.parameters, WIDE / max(ranks[path], 1))
        weights = lora_weights(layer, "default")
        factors |= {weights[0]: of_a, weights[1]: of_b}

    def keep_values(*_: Any) -> None:
        before.update({weight: weight.detach().clone() for weight in factors})

    @torch.no_grad()
    def scale_step(*_: Any) -> None:
        for weight, factor in factors.items():
            weight.lerp_(before[weight], 1 - factor)

    course.optimizer.register_step_pre_hook(keep_values)
    course.optimizer.register_step_post_hook(scale_step)
    course.run(course.task.steps)
    learned.finish()
    return course.row(told=str(learned.shrunk))


def _cut_at_end(course: Course, keep: float) -> dict[str, Any]:
    course.run(course.task.steps)
    started = time.process_time()
    training = [next(course.batches) for _ in range(32)]
    found = shrink(course.model, training, course.data.held_out, keep=keep)
    course.seconds += time.process_time() - started
    return course.row(told=str(found))


def _cut_by_energy(course: Course, keep: float) -> dict[str, Any]:
    """The same search over singular values of the updates."""
    course.run(course.task.steps)
    course.model.eval()
    curve = energy_curve(lora_factors(course.model, "default"))
    losses = LiveLosses.of_batches(course.model, course.data.held_out, model_loss)
    factors, found = LiveCut(course.model, "default", losses, curve).smallest(keep)
    put(course.model, "default", factors)
    return course.row(told=str(found), **{"parameters": found.parameters, "largest_rank": max(found.ranks.values())})


def _raised(course: Course) -> dict[str, Any]:
    """LoRA r = 16 uncut, at twice the rate."""
    course.schedule.base_lrs = [2 * rate for rate in course.schedule.base_lrs]
    return course.row()


class Rows:
    """Rows in a file; those that it has are not computed again."""

    def __init__(self, path: Path, task: str, seed: int, arms: str) -> None:
        self.path, self.key, self.arms = path, {"task": task, "seed": seed}, re.compile(arms)
        self.known = {row["arm"] for row in read_rows(path) if row["task"] == task and row["seed"] == seed}

    def add(self, arm: str, compute: Callable[[], dict[str, Any]]) -> None:
        """Compute a row in a copy of this process."""
        if arm in self.known or not self.arms.fullmatch(arm):
            return
        if child := os.fork():
            os.waitpid(child, 0)
            return
        try:
            row = {**self.key, "arm": arm, **compute()}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)


def run(name: str, seed: int, output: Path, arms: str = ".*") -> None:
    """Rows of a task and a seed."""
    task = (TASKS | RATES)[name]
    rows = Rows(output, name, seed, arms)

    def none() -> dict[str, Any]:
        data = task.load(seed)
        return data.test(data.model.eval())

    rows.add("none", none)
    course = Course(task, seed, WIDE, task.rate)
    for at in AT:
        course.run(task.steps if at == 1 else round(at * task.steps) - _BEFORE)
        if at == AT[0]:
            rows.add(f"size r4 at {at:g}", partial(_cut, course, at, size="r4"))
            rows.add("r16, twice the rate from 0.3", partial(_raised, course))
        for share in SHARES:
            cut = partial(_cut, course, at) if at < 1 else partial(_cut_at_end, course)
            rows.add(f"keep {share:g} at {at:g}", partial(cut, keep=share))
            if at == AT[1]:
                for rule in RULES:
                    rows.add(f"keep {share:g} at {at:g}, {rule}", partial(_cut_by_rule, course, at, share, rule))
    rows.add("r16", course.row)
    for share in SHARES:
        rows.add(f"energy {share:g} at 1", partial(_cut_by_energy, course, share))

    def lora(rank: int, factor: float, alpha: int | None = None) -> dict[str, Any]:
        return Course(task, seed, rank, factor * task.rate, alpha).row()

    for rank in (*SMALL, WIDE):
        for factor in FACTORS if seed == 0 else (best_factor(read_rows(output), name, rank),):
            if (rank, factor) != (WIDE, 1):
                rows.add(lora_arm(rank, factor), partial(lora, rank, factor))
    rows.add("r4, same alpha", partial(lora, 4, 1, round(task.scale * WIDE)))


def lora_arm(rank: int, factor: float) -> str:
    """Name of a LoRA at a multiple of the recipe's rate."""
    return "r16" if (rank, factor) == (WIDE, 1) else f"r{rank}, {factor:g} times the rate"


def best_factor(rows: Sequence[dict[str, Any]], task: str, rank: int) -> float:
    """The best factor of the first seed."""
    losses = {row["arm"]: row["loss"] for row in rows if row["task"] == task and row["seed"] == 0}
    return min(FACTORS, key=lambda factor: losses.get(lora_arm(rank, factor), math.inf))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, if it exists."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: list[str]) -> None:
    """Run a task and seeds."""
    parser = argparse.ArgumentParser(prog="python -m lrlora_lab.front")
    parser.add_argument("file", type=Path)
    parser.add_argument("task", choices=[*TASKS, *RATES])
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--arms", default=".*")
    options = parser.parse_args(arguments)
    for seed in options.seeds:
        run(options.task, seed, options.file, options.arms)


if __name__ == "__main__":
    main(sys.argv[1:])
