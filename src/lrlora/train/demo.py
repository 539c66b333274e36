"""Demo on news topics: LoRA at a recipe's rate and at the one that is found, its cut, and LR-LoRA."""

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
from ..run_folder import METRICS_FILE, RUN_FILE, read_record
from .compression import Compression, Subject, record_shrunk
from .inference import evaluate
from .loaded import LoadedRun
from .progress import Announce
from .run import train
from .settings import FROM_TRAIN, TrainConfig

SETTINGS_FILE = "settings.json"
RESULTS_FILE = "results.json"
DATA, BATCH_SIZE = "embedded:r8", 16
VALIDATION_EXAMPLES, TEST_EXAMPLES = 256, 600  # fixed samples
RECIPE, FOUND, SHRUNK, LEARNED = "recipe", "found", "shrunk", "lr-lora"  # folders
_RATE, _RANK, _SCALE = 2e-4, 16, 2  # of the recipe; s = α/r


@dataclass(frozen=True)
class DemoResult:
    """Result of one method.

    Attributes:
        method: common name.
        folder: of its adapter, within the demo's.
        learning_rate: of its training.
        parameters: of adapter and classification head.
        loss: on test data, nats.
        accuracy: on test data.
        standard_error: of the accuracy, from the number of texts.

    """

    method: str
    folder: str
    learning_rate: float
    parameters: int
    loss: float
    accuracy: float
    standard_error: float


def run_demo(
    output: Path, *, steps: int = 100, seed: int = 0, overwrite: bool = False, announce: Announce = print
) -> list[DemoResult]:
    """Train a LoRA of MiniLM at a recipe's rate and at the rate that is found, shrink it, and train LR-LoRA.

    Writes a folder of `train` for each run, and `results.json`. Output goes to `<output>.partial` and is renamed at
    the end; an interrupted demo resumes when called again with the same settings.

    Args:
        output: folder to write.
        steps: number of optimizer steps of a training, with 16 texts each.
        seed: random seed of head, factors and data order.
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
        rate = _RATE
        for folder in (RECIPE, FOUND, LEARNED):
            known = next((result for result in results if result.folder == folder), None)
            if known is not None:
                rate = known.learning_rate
                continue
            method = f"{'LR-LoRA' if folder == LEARNED else 'LoRA'}, r = {_RANK}"
            announce(f"{method}, {'at the rate of a recipe' if folder == RECIPE else 'at the rate that is found'} …")
            rate = _train(work / folder, rate, steps, seed, announce)
            results.append(_result(work / folder, work / folder, method, rate))
            if folder == FOUND and (shrunk := _shrink(work / folder, work / SHRUNK, announce)) is not None:
                name = f"the same, cut to {DEFAULT_KEEP:.0%} of its gain"
                results.append(_result(shrunk, work / SHRUNK, name, rate))
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


def _train(folder: Path, rate: float, steps: int, seed: int, announce: Announce) -> float:
    """Train a LoRA, or LR-LoRA, at this rate or one that is found; its rate."""
    is_found = folder.name == FOUND
    config = TrainConfig(
        model="embedded:minilm",
        data=DATA,
        task="classify",
        output=str(folder),
        validation=FROM_TRAIN,
        validation_examples=VALIDATION_EXAMPLES,
        max_length=48,
        rank_every=25,
        steps=steps,
        batch_size=BATCH_SIZE,
        seed=seed,
        method="lr-lora" if folder.name == LEARNED else "lora",
        rank=_RANK,
        alpha=_SCALE * _RANK,
        training={"eval_strategy": "no", "save_steps": 25, "load_best_model_at_end": False},
        **({"find_rate": True} if is_found else {"learning_rate": rate}),
    )
    if not (folder / METRICS_FILE).exists():
        train(config, resume=(folder / RUN_FILE).exists(), announce=announce)
    return read_record(folder).found_rate or rate


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


def _result(trained: Path | LoadedRun, folder: Path, method: str, rate: float) -> DemoResult:
    metrics = evaluate(trained, DATA, split="test", limit=TEST_EXAMPLES, announce=lambda line: None)
    accuracy = metrics["accuracy"]
    parameters = sum(weight.numel() for weight in load_file(folder / SAFETENSORS_WEIGHTS_NAME).values())
    error = math.sqrt(accuracy * (1 - accuracy) / metrics["examples"])
    return DemoResult(method, folder.name, rate, parameters, metrics["loss"], accuracy, error)
