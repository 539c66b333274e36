"""Evaluate and predict with a finished run, or with any adapter whose base model and task are known."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from datasets import Dataset, Image

from ..by_class import ByClass
from ..files import replacing
from ..locks import only_writer, remove_left
from ..run_folder import CHOSE, is_chosen, with_guess
from .chat import answer_of
from .data import require_data_path, sampled
from .inputs import data_sums
from .loaded import LoadedRun
from .progress import Announce
from .tasks.base import Task, logits


class Metrics(dict[str, float]):
    """Metrics by name.

    Attributes:
        by_class: precision, recall and F1 of each class, and the confusion matrix; None for tasks without classes.

    """

    by_class: ByClass | None = None


def evaluate(
    run: str | Path | LoadedRun,
    data: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    assistant_only_loss: bool = False,
    announce: Announce = print,
    **reading: Any,
) -> Metrics:
    """Evaluate a trained run on data.

    Args:
        run: output folder of `train`, or an adapter.
        data: see `TrainConfig.data`.
        split: split of the data; default: `test`, else `validation`, else the only one.
        limit: maximum number of examples (fixed-seed sample).
        assistant_only_loss: of an adapter that is not a run: whether the loss of chats is that of their answers only;
            default: of all tokens, as TRL trains.
        announce: receives the numbers of skipped (empty) and truncated examples, and warns if most answers are empty.
        **reading: data options that differ from training: `columns`, `delimiter`, `encoding` and `skip_empty` of
            `TrainConfig`.

    Raises:
        FileNotFoundError: run or data is missing.
        ValueError: the data cannot be used.

    """
    require_data_path(data)
    if not isinstance(run, LoadedRun):
        run = LoadedRun.read(Path(run), on_answers=assistant_only_loss)
    elif assistant_only_loss:
        raise ValueError("assistant_only_loss is for the folder of an adapter. Pass it instead of the loaded one.")
    loaded = run.reading(**reading)
    examples = loaded.examples(data, split, announce, with_label=True)
    known = _known_as(loaded, examples)
    has_chosen = known == "validation" and is_chosen(loaded.record.config)
    if known == "train" or has_chosen:
        role = "trained the run" if known == "train" else "chose the run's checkpoint"
        announce(f"Warning: these examples {role}. Expect lower scores on others.")
    examples = sampled(examples, limit)
    encoded = loaded.encoded(examples)
    for note in loaded.scored(encoded):
        announce(note)
    trainer = loaded.trainer(encoded)
    if not len(trainer.eval_dataset):  # type: ignore[arg-type]
        raise ValueError(
            f"No example has an answer within its first {loaded.record.max_length} tokens, the run's max_length."
        )
    wanted = [answer_of(row) for row in encoded] if loaded.task.generates else []
    asked = encoded.select([number for number, answer in enumerate(wanted) if answer is not None])
    loaded.require_room(asked)
    measured = loaded.task.reported(trainer.evaluate())
    metrics = Metrics({"examples": len(examples)} | with_guess(measured, loaded.task.guess(examples)))
    if has_chosen:
        metrics[CHOSE] = True
    metrics.by_class = loaded.task.by_class(trainer, loaded.record.labels)
    if len(asked):
        pairs = zip(_with_warning(loaded.answers(asked), announce), asked, strict=True)
        metrics["exact_match"] = float(np.mean([got.strip() == str(answer_of(row)).strip() for got, row in pairs]))
    return metrics


def _known_as(run: LoadedRun, examples: Dataset) -> str | None:
    """Split of a run's data that these examples are; None for others."""
    total = data_sums({"": examples})[""]
    return next((name for name, other in run.record.data_sums.items() if other == total), None)


def predict(
    run: str | Path | LoadedRun,
    data: str | Dataset,
    *,
    split: str | None = None,
    keep_columns: bool = False,
    generation: Mapping[str, Any] | None = None,
    announce: Announce = print,
    **reading: Any,
) -> Iterator[dict[str, Any]]:
    """Yield a dictionary for each example: its inputs and the prediction of a finished run.

    With `keep_columns`, the inputs are all columns of the data, under the names that they have there, and cells of CSV
    files as text; otherwise those that the task reads, by role.

    Keys of the prediction: `prediction` and `probabilities` (classify: by class name; multiple-choice: by index),
    `prediction` (regress), or `completion` (causal-lm).

    `split`, `announce` and `reading` are as in `evaluate`; `data` may also be a data set, and needs no labels.
    `generation` has fields of `GenerationConfig`; by default, decoding is greedy.

    Raises:
        FileNotFoundError: run or data is missing.
        ValueError: the data cannot be used, or `keep_columns` and a column has the name of a prediction.

    """
    if isinstance(data, str):
        require_data_path(data)
    loaded = run if isinstance(run, LoadedRun) else LoadedRun.read(Path(run))
    loaded = loaded.reading(**reading).generating(generation)
    examples, rows = loaded.with_rows(data, split, announce, with_label=False, as_written=keep_columns)
    if keep_columns:
        _require_no_prediction(rows, loaded.task)
    described = _described(rows) if keep_columns else map(loaded.task.described, examples)
    encoded = loaded.encoded(examples)
    if loaded.task.generates:
        loaded.require_room(encoded)
        for example, answer in zip(described, _with_warning(loaded.answers(encoded), announce), strict=True):
            yield {**{name: value for name, value in example.items() if name != "completion"}, "completion": answer}
        return
    encoded = loaded.task.unlabelled(encoded)
    outputs = torch.as_tensor(logits(loaded.trainer(encoded).predict(encoded)))
    for example, prediction in zip(
        described, loaded.task.predictions(outputs, encoded, loaded.record.labels), strict=True
    ):
        yield {**example, **prediction}


def _require_no_prediction(rows: Dataset, task: Task) -> None:
    """Raise ValueError if a column to keep has the name of a prediction."""
    names = ("completion",) if task.generates else ("prediction", "probabilities")
    if taken := [name for name in rows.column_names if name in names]:
        raise ValueError(
            f"The data has a column {taken[0]!r}, the name of the predictions. To keep it, rename it in the data; or "
            "leave out --keep-columns."
        )


def _described(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Rows of data as they are saved, with the paths of images in their place."""
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    for name in images:
        rows = rows.cast_column(name, Image(decode=False))
    for row in rows:
        yield row | {name: row[name] and row[name]["path"] for name in images}


def predict_texts(
    run: str | Path, texts: list[str], generation: Mapping[str, Any] | None = None, announce: Announce = print
) -> Iterator[dict[str, Any]]:
    """Predictions or answers of a finished run for texts; see `predict`.

    Raises:
        ValueError: the run is a multiple-choice or image run.

    """
    loaded = LoadedRun.read(Path(run))
    task = loaded.task
    role = "prompt" if task.generates else "text"
    if role not in task.roles:
        asked = " and ".join(name for name in task.roles if name not in task.answers)
        raise ValueError(
            f"The task {task.name} needs {asked}, not a single text. Pass data with these columns: --data."
        )
    return predict(loaded, Dataset.from_dict({role: texts}), columns={}, generation=generation, announce=announce)


def _with_warning(answers: Iterable[str], announce: Announce) -> Iterator[str]:
    """Yield the answers, and warn at the end if most of them were empty."""
    count = empty = 0
    for answer in answers:
        count, empty = count + 1, empty + (not answer.strip())
        yield answer
    if 2 * empty > count:
        announce(
            f"Warning: {empty} of {count} answers are empty. Check that the prompts have the format used in training: "
            "`lrlora predict RUN --text` shows one."
        )


TABLES = {".csv": ",", ".tsv": "\t"}  # suffix of a file of predictions → its delimiter


def write_predictions(path: Path, predictions: Iterable[dict[str, Any]]) -> int:
    """Write predictions as a table, if the suffix says so, else as JSON lines, atomically; returns their number."""
    delimiter = TABLES.get(path.suffix.lower())
    with only_writer(path):
        remove_left(path.parent, f"{path.name}.")
        with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            if delimiter is not None:
                return _write_table(file, [_cells(prediction) for prediction in predictions], delimiter)
            count = 0
            for count, prediction in enumerate(predictions, start=1):  # noqa: B007
                file.write(as_json(prediction) + "\n")
    return count


def as_json(content: Any) -> str:
    """A line of JSON; dates and the like as text."""
    return json.dumps(content, ensure_ascii=False, default=str)


def _write_table(file: TextIO, rows: list[dict[str, Any]], delimiter: str) -> int:
    names = dict.fromkeys(name for row in rows for name in row)  # examples may have different numbers of choices
    table = csv.DictWriter(file, list(names), delimiter=delimiter, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return len(rows)


def _cells(prediction: dict[str, Any]) -> dict[str, Any]:
    """Cells of a prediction in a table: a column for each probability; lists and the like as JSON."""
    row = {
        name: as_json(value) if isinstance(value, (list, dict)) else value
        for name, value in prediction.items()
        if name != "probabilities"
    }
    return row | {f"probability of {name}": value for name, value in prediction.get("probabilities", {}).items()}
