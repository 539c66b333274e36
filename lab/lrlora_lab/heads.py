"""Learning rate of a new head, as a factor of the adapter's: the study `heads.md`.

    python -m lrlora_lab.heads run heads.jsonl films sections --seeds 0 --steps 60 --rates 1e-3 3e-3 --factors 1 4 16 32
    python -m lrlora_lab.heads report heads.jsonl

Runs are those of `lrlora train`, evaluated once at their end. Rows that the file has already are not computed again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from lrlora.files import cache_folder
from lrlora.train.embedded import EMBEDDED_DATA, as_splits, made_once, split_by_group
from lrlora.train.inputs import Inputs
from lrlora.train.prepare import prepare
from lrlora.train.settings import TrainConfig

from .front import Rows, read_rows
from .inputs import SOCIAL_IQA, load_animals, load_choices, load_ratings, vision_model
from .sections import table

BATCH = 16  # examples of a step, the default of `lrlora train`
MOST, HELD_OUT = 9_600, 320  # training and validation examples
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
    """A task of `lrlora train`, its data, and where its examples are truncated."""

    kind: str
    load: Callable[[], DatasetDict]
    length: int | None

    @property
    def model(self) -> str:
        return "embedded:minilm" if self.length else str(vision_model())


TASKS = {
    "films": Task("classify", EMBEDDED_DATA["movie-reviews"].load, 24),
    "sections": Task("classify", load_sections, 16),
    "topics": Task("classify", EMBEDDED_DATA["r8"].load, 24),
    "ratings": Task("regress", load_ratings, 24),
    "choices": Task("multiple-choice", partial(load_choices, SOCIAL_IQA, 3), 40),
    "animals": Task("image-classify", load_animals, None),
}
METHODS = ("lora", "probe", "full", "tf-idf")


def _folder(name: str) -> Path:
    """Training and validation examples of a task."""

    def save(folder: Path) -> None:
        splits = TASKS[name].load()
        parts = {"train": (splits["train"], MOST), "validation": (splits["test"], HELD_OUT)}
        sampled = {
            part: data.shuffle(seed=0).select(range(min(most, len(data)))) for part, (data, most) in parts.items()
        }
        DatasetDict(sampled).save_to_disk(folder)

    return made_once(cache_folder() / "lab" / f"heads-{name}", save)


def _config(name: str, steps: int, **settings: Any) -> TrainConfig:
    """A run whose examples suffice for one epoch, without evaluations before its end."""
    task = TASKS[name]
    return TrainConfig(
        **{"model": task.model, "data": str(_folder(name)), "task": task.kind, "max_length": task.length},
        **{"steps": steps, "train_examples": steps * BATCH, "training": {"eval_strategy": "no", "save_strategy": "no"}},
        **{"method": "lora", **settings},
    )


def _trained(
    name: str, inputs: Inputs, steps: int, seed: int, method: str, rate: float, factor: float
) -> dict[str, Any]:
    """Metrics of a run at its end, and of the frozen model with a fitted head, if it starts from that."""
    with tempfile.TemporaryDirectory() as output:
        config = _config(
            *(name, steps),
            **{"method": "full" if method == "full" else "lora", "output": f"{output}/run", "seed": seed},
            **{"learning_rate": rate, "head_learning_rate": factor * rate},
        )
        trainer = prepare(config, inputs, [], lambda line: None)
        model: Any = trainer.model
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        row = {"steps": steps, "method": method, "rate": rate, "factor": factor}
        if method == "probe":
            _fit_head(trainer, inputs)
            row |= {f"probe_{key}": value for key, value in _metrics(trainer.evaluate(), inputs).items()}
        trainer.train()
        row |= _metrics(trainer.evaluate(), inputs)
        seconds = trainer.state.log_history[-2]["train_runtime"]
        return {**row, "guess": inputs.task.guess(inputs.data.splits["validation"])["loss"], "seconds": seconds}


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


def _words(inputs: Inputs) -> dict[str, Any]:
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
    return {**min(found, key=lambda each: each["loss"]), "guess": inputs.task.guess(validation)["loss"]}


def run(name: str, seed: int, output: Path, arguments: argparse.Namespace) -> None:
    """Rows of a task and a seed."""
    rows = Rows(output, name, seed, ".*")
    for steps in arguments.steps:
        inputs = Inputs.read(_config(name, steps))
        for method in arguments.methods:
            if method == "tf-idf":
                rows.add(f"tf-idf, {steps} steps", lambda: {"steps": steps, "method": "tf-idf", **_words(inputs)})
                continue
            for rate in arguments.rates:
                for factor in arguments.factors:
                    arm = f"{method}, {rate:g} × {factor:g}, {steps} steps"
                    rows.add(arm, partial(_trained, name, inputs, steps, seed, method, rate, factor))


def main(arguments: list[str]) -> None:
    """Run a task and seeds, or report."""
    torch.set_float32_matmul_precision("medium")
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="python -m lrlora_lab.heads")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        commands.add_parser(name).add_argument("file", type=Path)
    command = commands.choices["run"]
    command.add_argument("tasks", choices=[*TASKS], nargs="+")
    command.add_argument("--seeds", type=int, nargs="+", default=[0])
    command.add_argument("--steps", type=int, nargs="+", default=[60])
    command.add_argument("--methods", nargs="+", choices=METHODS, default=["lora"])
    command.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    command.add_argument("--factors", type=float, nargs="+", default=[1.0])
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        return
    for seed in settings.seeds:
        for name in settings.tasks:
            run(name, seed, settings.file, settings)


if __name__ == "__main__":
    main(sys.argv[1:])
