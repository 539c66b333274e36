"""Suites of a comparison: a model, and tasks with settings shared by all methods.

Those of this package are YAML files in `suites/`, with the protocol of their field and its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lrlora.checks import require_known, require_type
from lrlora.train.tasks import TASKS, ChoiceByLikelihood
from lrlora.train.tasks.base import LESS_IS_BETTER
from lrlora.train.yaml import read_yaml

from .capacity import KINDS as CAPACITY_KINDS
from .capacity import CapacityTask


@dataclass(frozen=True)
class Task:
    """One task: the keys of `lrlora train` of the same name, and those of its test.

    Args:
        data, task, steps, batch_size, columns, delimiter, encoding, skip_empty, max_length, head_learning_rate: as
            for `TrainConfig`.
        train_examples, validation_examples, test_examples: maximum number of examples, a fixed random sample; None:
            all. Validation is a part of the training data.
        test: split of `data` that final runs are scored on.
        test_data: one or several other data sets that final runs are scored on instead, each alone and on average.
        metric: metric in the table, of which more is better; None: accuracy, Pearson's r, or token accuracy.
        rate_scale: factor on the learning rates that each method tries first.
        minutes: measured time of a job with its test, on two CPU cores, for `--dry-run`.

    Raises:
        ValueError: task or metric is unknown, or a number out of range.

    """

    data: str
    task: str
    steps: int
    batch_size: int = 16
    columns: dict[str, str] = field(default_factory=dict)
    delimiter: str | None = None
    encoding: str | None = None
    skip_empty: bool = False
    max_length: int | None = None
    head_learning_rate: float | None = None
    train_examples: int | None = None
    validation_examples: int | None = 1_000
    test_examples: int | None = None
    test: str = "test"
    test_data: str | tuple[str, ...] = ()
    metric: str | None = None
    rate_scale: float = 1.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = (self.test_data,) if isinstance(self.test_data, str) else tuple(self.test_data)
        object.__setattr__(self, "test_data", given)  # JSON and YAML know lists alone
        require_type(self, Task, "task")
        require_known("task", self.task, TASKS)
        by_likelihood = ChoiceByLikelihood.metrics if self.task == ChoiceByLikelihood.name else ()
        metrics = [name for name in (*TASKS[self.task].metrics, *by_likelihood) if name not in LESS_IS_BETTER]
        object.__setattr__(self, "metric", self.metric or metrics[0])
        require_known(f"metric of {self.task} of which more is better", str(self.metric), metrics)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {getattr(self, name)}.")
        if not 0 < self.rate_scale < math.inf:
            raise ValueError(f"rate_scale must be a number > 0, got {self.rate_scale}.")

    @property
    def tests(self) -> list[tuple[str, str | None]]:
        """Data and split of each test; None: `test`, or the only one."""
        return [(data, None) for data in self.test_data] or [(self.data, self.test)]

    @property
    def sources(self) -> tuple[str, ...]:
        """Data sets of training and tests."""
        return (self.data, *self.test_data)

    @property
    def criterion(self) -> str:
        """Metric that selects the learning rate: a pure task loss. Lower is better."""
        return TASKS[self.task].criterion


@dataclass(frozen=True)
class Suite:
    """A model and the tasks it is fine-tuned on.

    Args:
        model: as in `lrlora train --model`.
        tasks: by name.
        methods: default methods; empty: the main ones.
        rank: default r.
        scale: α/r.
        adapter: fields of the configuration of every adapter.
        training: fields of TrainingArguments of every run.
        protocol: source of these settings, in words.

    """

    model: str
    tasks: dict[str, Task | CapacityTask]
    methods: tuple[str, ...] = ()
    rank: int = 4
    scale: float = 1.0
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        require_type(self, Suite, "suite")

    def with_steps(self, steps: int) -> Suite:
        """Suite with this number of training steps in every task."""
        return replace(self, tasks={name: replace(task, steps=steps) for name, task in self.tasks.items()})

    @property
    def training_tasks(self) -> dict[str, Task]:
        """Tasks trained and scored by `lrlora train`."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, Task)}

    @property
    def capacity_tasks(self) -> dict[str, CapacityTask]:
        """Capacity tasks."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, CapacityTask)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Suite:
        """Create from plain values: `model`, `tasks` with the fields of `Task` by name, and other suite fields.

        Raises:
            ValueError: a key is unknown, missing or not used by its tasks.

        """
        for name in content:
            require_known("key of a suite", name, [f.name for f in fields(cls)])
        if not content.get("model") or not isinstance(content.get("tasks"), Mapping) or not content["tasks"]:
            raise ValueError(f"A suite must have a model and named tasks, got {', '.join(content) or 'nothing'}.")
        suite = cls(**{**content, "tasks": {str(name): _task(name, task) for name, task in content["tasks"].items()}})
        if suite.training_tasks and suite.capacity_tasks:
            raise ValueError(
                f"The tasks of a suite are reported together, but {', '.join(suite.capacity_tasks)} do not measure "
                f"the same as {', '.join(suite.training_tasks)}. Put them into separate suites."
            )
        for name, default in (("scale", 1.0), ("adapter", {}), ("training", {})):
            if suite.capacity_tasks and (value := getattr(suite, name)) != default:
                raise ValueError(
                    f"Tasks on which rank binds ({', '.join(suite.capacity_tasks)}) ignore {name}, got {value!r}. "
                    "Remove it."
                )
        return suite


def _task(name: str, content: Any) -> Task | CapacityTask:
    if not isinstance(content, Mapping):
        raise ValueError(f"The task {name} must map names to values, got {content!r}.")
    if "task" in content:
        require_known("task", content["task"], (*TASKS, *CAPACITY_KINDS))
    kind: Any = CapacityTask if content.get("task") in CAPACITY_KINDS else Task
    for key in content:
        require_known(f"key of the task {name}", key, [f.name for f in fields(kind)])
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"The task {name} is not complete: {error}") from None


def load_suite(name: str) -> Suite:
    """A suite of this package, or a user's from a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such suite, or the file does not hold one.

    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        own = {file.stem: file for file in sorted((Path(__file__).parent / "suites").glob("*.yaml"))}
        require_known("suite", name, own)
        path = own[name]
    return Suite.from_dict(read_yaml(path))
