"""Local data of a comparison, read and checked before the first job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrlora.train.data import load_examples, load_splits, load_task_data, require_data_path, sampled
from lrlora.train.tasks import KINDS

from .jobs import Comparison, train_config
from .methods import find_method
from .suite import Task


def check_data(comparison: Comparison) -> Iterator[str]:
    """Read the files and folders of all tasks; yield the number of examples of each, and warnings.

    Data of the hub and embedded data are left to the jobs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the data of a task cannot be used; the message names the task.

    """
    for name in comparison.task_names:
        task = comparison.definition.training_tasks.get(name)
        if task is None:
            continue
        try:
            for data in (task.data, *(other for other, _ in task.tests)):
                require_data_path(data)
            if not Path(task.data).exists():
                continue
            yield from _checked(comparison, name, task)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"Task {name}: {error}") from None


def _checked(comparison: Comparison, name: str, task: Task) -> Iterator[str]:
    config = train_config(comparison.definition, name, find_method("lora"), 1.0, 1, comparison.r, Path())
    kind = KINDS[task.task]
    if not task.test_data and task.test not in (there := load_splits(task.data, config)):
        raise ValueError(
            f"{task.data} has no split {task.test}. Available splits: {', '.join(there)}. Select one with test: "
            "SPLIT, or pass a file with test_data: FILE."
        )
    data = load_task_data(config, kind)
    counts = [f"{len(data.splits['train']):,} training", f"{len(data.splits['validation']):,} validation"]
    for source, split in task.tests:
        if Path(source).exists():
            test, _ = load_examples(config, kind, source, split, data.labels, with_label=True)
            counts.append(f"{len(sampled(test, task.test_examples)):,} test")
    yield f"Data of {name}: {', '.join(counts)} examples."
    yield from data.notes
