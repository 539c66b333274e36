"""Demo: a LoRA on news topics, the rank that it needs, and a LoRA of that size; and movie reviews with LR-LoRA."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ..adapters import save_as_lora
from ..checks import DEFAULT_KEEP
from ..files import read_json, require_folder, write_json
from ..locks import only_writer
from ..run_folder import METRICS_FILE, RUN_FILE
from ..shrunk import Shrunk, read_shrunk
from .compression import Compression, Subject, record_shrunk
from .inference import evaluate
from .loaded import LoadedRun
from .progress import Announce
from .run import train
from .settings import FROM_TRAIN, TrainConfig

SETTINGS_FILE = "settings.json"
RESULTS_FILE = "results.json"
BATCH_SIZE = 16
VALIDATION_EXAMPLES, TEST_EXAMPLES = 256, 600  # fixed samples
RECIPE, SMALL, SAME_SIZE = "topics-lora", "topics-small", "topics-lora-same-size"  # folders


@dataclass(frozen=True)
class DemoResult:
    """Result of one method on one task.

    Attributes:
        task: "topics" or "reviews".
        method: common name.
        folder: of its adapter, within the demo's.
        parameters: of adapter and classification head.
        loss: on test data, nats.
        accuracy: on test data.
        standard_error: of the accuracy, from the number of texts.
        seconds_per_step: processor time; None if it was not trained, or interrupted.

    """

    task: str
    method: str
    folder: str
    parameters: int
    loss: float
    accuracy: float
    standard_error: float
    seconds_per_step: float | None


@dataclass(frozen=True)
class _Run:
    """One training: task, method's name, data, settings, and share of the steps."""

    task: str
    name: str
    data: str
    options: dict[str, Any]
    share: float = 1.0


_TOPICS, _REVIEWS = "embedded:r8", "embedded:movie-reviews"
_RATE, _SMALL_RATE, _HEAD_RATE = 2e-3, 4e-3, 4e-3  # a small LoRA bears a higher one
_TOPICS_OPTIONS: dict[str, Any] = {"method": "lora", "head_learning_rate": _HEAD_RATE}
RUNS = {
    RECIPE: _Run(
        "topics", "LoRA, r = 16", _TOPICS, {**_TOPICS_OPTIONS, "rank": 16, "alpha": 32, "learning_rate": _RATE}
    ),
    # Of the measured rank.
    SAME_SIZE: _Run("topics", "LoRA", _TOPICS, {**_TOPICS_OPTIONS, "learning_rate": _SMALL_RATE}),
    "reviews-lora": _Run(
        "reviews", "LoRA, r = 8", _REVIEWS, {"method": "lora", "rank": 8, "learning_rate": 2e-3}, share=0.5
    ),
    "reviews-lr-lora": _Run(
        "reviews", "LR-LoRA, r = 8", _REVIEWS, {"method": "lr-lora", "rank": 8, "learning_rate": 2e-3}, share=0.5
    ),
}


def run_demo(
    output: Path, *, steps: int = 100, seed: int = 0, overwrite: bool = False, announce: Announce = print
) -> list[DemoResult]:
    """Train MiniLM on both tasks, and shrink the LoRA on the topics.

    Writes a folder of `train` for each run, and `results.json`. Output goes to `<output>.partial` and is renamed at
    the end; an interrupted demo resumes when called again with the same settings.

    Args:
        output: folder to write.
        steps: number of optimizer steps on the topics, with 16 texts each; the reviews take half as many.
        seed: random seed of head, factors and data order. Rates were tuned with seed 1.
        overwrite: replace the folder of another demo.
        announce: receives its progress.

    Raises:
        BlockingIOError: another process writes it.
        FileExistsError: `output`, or an unfinished demo with other settings, exists and `overwrite` is not set; or the
            folder to replace is not a demo's.
        RuntimeError: the model or the data could not be downloaded.
        lrlora.train.run.Interrupted: the demo was stopped externally, after saving a checkpoint.

    """
    require_folder(output)
    work, settings = output.with_name(output.name + ".partial"), {"steps": steps, "seed": seed}
    settings_file = work / SETTINGS_FILE
    with only_writer(output):
        if output.exists():
            _require_replaceable(output, overwrite)
        if work.exists() and not (settings_file.exists() and json.loads(settings_file.read_text()) == settings):
            _require_replaceable(work, overwrite)
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_json(settings_file, settings)
        results = _read_results(work)
        for folder, run in RUNS.items():
            if any(result.folder == folder for result in results):
                continue
            if folder == SAME_SIZE:
                if (record := read_shrunk(work / RECIPE)) is None:
                    continue
                run = _same_size_run(run, record)
            announce(f"{run.task.capitalize()} with {run.name} …")
            results.append(_train(work / folder, run, max(1, round(run.share * steps)), seed, announce))
            if folder == RECIPE and (small := _shrink(work / folder, work / SMALL, announce)) is not None:
                name = f"the same, shrunk to {DEFAULT_KEEP:.0%} of its gain"
                results.append(_result(small, work / SMALL, replace(run, name=name), None))
            write_json(work / RESULTS_FILE, [asdict(result) for result in results])
        if output.exists():
            shutil.rmtree(output)
        work.rename(output)
        return results


def _read_results(folder: Path) -> list[DemoResult]:
    path = folder / RESULTS_FILE
    if not path.exists():
        return []
    return [DemoResult(**result) for result in read_json(path, list[dict[str, Any]], f"Remove {folder}.")]


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


def _train(folder: Path, run: _Run, steps: int, seed: int, announce: Announce) -> DemoResult:
    config = TrainConfig(
        model="embedded:minilm",
        data=run.data,
        task="classify",
        output=str(folder),
        validation=FROM_TRAIN,
        validation_examples=VALIDATION_EXAMPLES,
        max_length=48,
        rank_every=25,
        steps=steps,
        batch_size=BATCH_SIZE,
        seed=seed,
        training={"eval_strategy": "no", "save_steps": 25, "load_best_model_at_end": False},
        **run.options,
    )
    seconds = None
    if not (folder / METRICS_FILE).exists():
        was_begun = (folder / RUN_FILE).exists()
        result = train(config, resume=was_begun, announce=announce)
        seconds = None if was_begun else result.seconds_per_step
    return _result(folder, folder, run, seconds)


def _shrink(run: Path, output: Path, announce: Announce) -> LoadedRun | None:
    """Write the smallest LoRA that keeps the gain of a run, and load it; None if there is no gain."""
    subject = Subject.read(str(run), announce=announce)
    try:
        factors, record = Compression(subject, announce=announce).smallest(DEFAULT_KEEP)
    except ValueError as error:  # after a few steps, nothing is gained
        announce(f"Not shrunk: {error}")
        return None
    announce(str(record))
    record_shrunk(run, record)
    shutil.rmtree(output, ignore_errors=True)  # of an interrupted demo
    save_as_lora(factors, subject.updates, output)
    return replace(subject.run, model=subject.with_lora(output))


def _same_size_run(run: _Run, record: Shrunk) -> _Run:
    """LoRA with the parameters that the recipe needs, at the same α/r."""
    rank = max(1, round(record.parameters / record.parameters_per_rank))
    return replace(run, name=f"LoRA, r = {rank}", options={**run.options, "rank": rank, "alpha": 2 * rank})


def _result(trained: Path | LoadedRun, folder: Path, run: _Run, seconds: float | None) -> DemoResult:
    metrics = evaluate(trained, run.data, split="test", limit=TEST_EXAMPLES, announce=lambda line: None)
    accuracy = metrics["accuracy"]
    parameters = sum(weight.numel() for weight in load_file(folder / SAFETENSORS_WEIGHTS_NAME).values())
    error = math.sqrt(accuracy * (1 - accuracy) / metrics["examples"])
    return DemoResult(run.task, run.name, folder.name, parameters, metrics["loss"], accuracy, error, seconds)
