"""Jobs of a comparison: which exist, which come next, and the folder of their results.

Each job trains one method on one task at one learning rate with one seed, and writes one result file.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import quote

from lrlora.checks import require_known, require_type
from lrlora.files import parse_json, read_json, readable, write_json
from lrlora.learned.cut import CUT_AT, cut_step
from lrlora.train.adapter_config import adapter_config
from lrlora.train.settings import FROM_TRAIN, TrainConfig, require_settings
from lrlora.train.tasks import TASKS

from .capacity import CapacityTask
from .methods import MAIN_METHODS, Method, find_method
from .rivals import CRITERIA
from .suite import Suite, Task, load_suite

TUNING_SEED = 0
SETTINGS_FILE = "comparison.json"
_ANOTHER = "Choose another --output."
CALL_FILE = "call.json"  # last call
PACKED_FILE = "jobs.jsonl.gz"  # finished jobs, packed
# Steps between checkpoints. Shorter runs have none and lose little when restarted.
_SAVE_STEPS = 500
_GRID_STEPS = 2  # maximum extensions of the rate grid (factor 2) on either side
Record = dict[str, Any]
# Fields recorded for a successful job, and for a tested one.
_OF_THE_DONE, _OF_THE_TESTED = ("criterion", "test"), ("seconds", "trainable")


class _Settings(TypedDict):
    """Contents of the settings file."""

    rank: int
    suite: dict[str, Any]


class _Identity(TypedDict):
    """Fields of all records."""

    task: str
    method: str
    learning_rate: float
    seed: int
    wall: float
    # `Comparison.facts`
    label: str
    train: str
    learns_ranks: bool
    r: int | None
    terms: float | None
    is_plain_lora: bool
    rates: list[float]
    scales: list[float]


class _Record(_Identity, total=False):
    """Fields of failed and of successful jobs."""

    scale: float
    failure: str
    diverged: bool
    examples: dict[str, int]
    seconds: float
    hardware: str
    peak_mib: float
    trainable: int
    validation: dict[str, float]
    criterion: float
    ranks: list[dict[str, Any]] | None
    test: dict[str, float] | None


@dataclass(frozen=True)
class Job:
    """One training run; `scale` is s, tuned by some tasks."""

    task: str
    method: str
    learning_rate: float
    seed: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Name of its files."""
        rate = f"{self.learning_rate:g}" if self.scale == 1 else f"{self.learning_rate:g}-{self.scale:g}"
        return quote(f"{self.task}--{self.method}--{rate}--{self.seed}", safe="+=,")


@dataclass(frozen=True)
class Comparison:
    """A comparison.

    Args:
        suite: name of a suite in `suites/`, or a YAML file with one.
        methods: keys of `find_method`; the reference is "lora", or else the first. Default: the task's own, or else the
            main ones.
        seeds: final runs per method and task, at the rate chosen with one more seed; a single rate is not tuned.
        rank: r; default: the suite's.
        tasks: tasks of the suite; default: all.
        rates: the only learning rates to try, for every method; default: each method's own times the task's scale, and
            beyond them.
        model: overrides the suite's.
        steps: training steps of every task, overriding its own, for a first try.

    Raises:
        ValueError: a name is unknown, or a number out of range.

    """

    suite: str
    methods: tuple[str, ...] = ()
    seeds: int = 3
    rank: int | None = None
    tasks: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    model: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        require_type(self, Comparison, "comparison")
        for task in self.tasks:
            require_known(f"task of {self.suite}", task, self.definition.tasks)
        if self.model is not None and self.definition.capacity_tasks:
            raise ValueError(f"The tasks of {self.suite} have their own models, got model={self.model}. Remove it.")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"rates must be numbers > 0, got {', '.join(map(str, self.rates))}.")
        for name, value in (("seeds", self.seeds), ("rank", self.rank), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {value}.")

    @functools.cached_property
    def definition(self) -> Suite:
        suite = load_suite(self.suite)
        if self.model is not None:
            suite = replace(suite, model=self.model)
        return suite if self.steps is None else suite.with_steps(self.steps)

    @property
    def r(self) -> int:
        return self.rank or self.definition.rank

    @property
    def task_names(self) -> tuple[str, ...]:
        return self.tasks or tuple(self.definition.tasks)

    @property
    def chosen_tasks(self) -> dict[str, Task]:
        """Those of its tasks that `lrlora train` trains and scores."""
        tasks = self.definition.training_tasks
        return {name: tasks[name] for name in self.task_names if name in tasks}

    def methods_of(self, task: str) -> tuple[str, ...]:
        definition = self.definition
        return self.methods or getattr(definition.tasks[task], "methods", ()) or definition.methods or MAIN_METHODS

    @property
    def _cells(self) -> list[tuple[str, str]]:
        return [(task, method) for task in self.task_names for method in self.methods_of(task)]

    @property
    def reference(self) -> str:
        methods = [method for _, method in self._cells]
        return "lora" if "lora" in methods else methods[0]

    def facts(self, task: str, method: str) -> dict[str, Any]:
        """`Method.facts`, and the `rates` and `scales` with which its tuning on a task begins.

        Raises:
            ValueError: there is no such method.

        """
        definition, entry = self.definition.tasks[task], find_method(method)
        if isinstance(definition, CapacityTask):
            rates, scales = definition.first_rates(entry), definition.scales if entry.has_scale else (1.0,)
        else:
            rates, scales = tuple(definition.rate_scale * rate for rate in entry.rates), (1.0,)
        return {**entry.facts(self.r), "rates": [*rates], "scales": [*scales]}

    def plan(self, finished: dict[str, Record]) -> list[Job]:
        """All jobs known to be needed, task by task; their results may add more.

        First every rate on the tuning seed, extending the grid while the best rate is at its edge; then the seeds at
        the best rate, which alone read the test data.
        """
        return [job for cell in self._cells for job in self._of(*cell, finished)]

    def select(self, records: dict[str, Record]) -> dict[str, Record]:
        """Select the finished jobs of this comparison: a folder may hold other rates and seeds."""
        begun = {(record["task"], record["method"]) for record in records.values()}
        jobs = [job for cell in self._cells if cell in begun for job in self._of(*cell, records)]
        return {job.name: records[job.name] for job in jobs if job.name in records}

    def of_all(self, records: dict[str, Record]) -> Comparison:
        """Comparison of all methods, tasks and seeds with finished jobs in a folder."""
        tasks, methods = ({record[name]: None for record in records.values()} for name in ("task", "method"))
        kept = tuple(task for task in self.definition.tasks if task in tasks)
        seeds = max((record["seed"] for record in records.values()), default=0)
        return replace(self, tasks=kept, methods=tuple(methods), seeds=max(self.seeds, seeds))

    def cells_left(self, jobs: list[Job]) -> list[tuple[str, str]]:
        """(task, method) of remaining jobs and of later ones: the seeds at a rate yet to be found."""
        tuned = {(job.task, job.method) for job in jobs if job.seed == TUNING_SEED}
        return [(job.task, job.method) for job in jobs] + [cell for cell in tuned for _ in range(self.seeds)]

    def _of(self, task: str, method: str, finished: dict[str, Record]) -> list[Job]:
        # A cell goes on as it began, and does not need its method once it is done.
        begun = (record for record in finished.values() if (record["task"], record["method"]) == (task, method))
        facts = next(begun, None) or self.facts(task, method)
        grid, scales = sorted(self.rates or facts["rates"]), facts["scales"]
        is_diagonal = getattr(self.definition.tasks[task], "climbs_diagonally", False)
        if len(grid) == len(scales) == 1:  # nothing to tune
            return [Job(task, method, grid[0], seed, scales[0]) for seed in range(1, self.seeds + 1)]
        low, high = grid[0] / 2**_GRID_STEPS, grid[-1] * 2**_GRID_STEPS
        trials = [Job(task, method, rate, TUNING_SEED, scales[0]) for rate in grid]
        while all(trial.name in finished for trial in trials):
            best = best_trial([finished[trial.name] for trial in trials])
            if best is None:
                return trials  # all failed
            rate, scale = best["learning_rate"], best.get("scale", 1.0)
            # The best is inside the grid once its neighbors, by rate and by scale, were tried.
            around = [(rate / 2, scale), (rate * 2, scale)]
            for s in _neighbors(scale, scales):
                around.append((rate, s))
                if is_diagonal:
                    around.append((rate / 2 if s > scale else rate * 2, s))
            new = [Job(task, method, r, TUNING_SEED, s) for r, s in around if low <= r <= high]
            new = [job for job in new if job not in trials and (not self.rates or job.learning_rate in self.rates)]
            if not new:
                return trials + [Job(task, method, rate, seed, scale) for seed in range(1, self.seeds + 1)]
            trials += new
        return trials


def _neighbors(scale: float, scales: Sequence[float]) -> list[float]:
    """The next smaller and next larger of `scales`."""
    ordered = sorted(scales)
    at = ordered.index(scale)
    return ordered[max(0, at - 1) : at] + ordered[at + 1 : at + 2]


def best_trial(trials: list[Record]) -> Record | None:
    """Trial with the lowest validation criterion, which is less noisy than accuracy; None if all failed."""
    good = [trial for trial in trials if not trial.get("failure")]
    return min(good, key=lambda trial: trial["criterion"]) if good else None


def parse_rates(text: str) -> tuple[float, ...]:
    """Parse comma-separated learning rates.

    Raises:
        ValueError: not a number.

    """
    try:
        return tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise ValueError(f"--rates must be comma-separated numbers, got {text!r}.") from None


def read_records(output: Path) -> dict[str, Record]:
    """Finished jobs in a folder, by name.

    Raises:
        ValueError: a file is damaged.

    """
    remedy = "Remove it, and run the same command to repeat the job."
    records: dict[str, Record] = {}
    if (packed := output / PACKED_FILE).exists():
        with readable(packed, remedy), gzip.open(packed, "rt", encoding="utf-8") as file:
            records = {record.pop("job"): record for record in map(json.loads, file)}
            for name, record in records.items():
                _require_whole(record, f"the job {name}")
    for path in sorted(output.glob("jobs/*.json")):
        with readable(path, remedy):
            records[path.stem] = parse_json(path)
            _require_whole(records[path.stem], "it")
    return records


def _require_whole(record: Any, name: str) -> None:
    """Raise ValueError unless it has the fields of a failed, finished or tested job."""
    require_type(record, _Record, name)
    asked = (*_OF_THE_DONE, *(_OF_THE_TESTED if record.get("test") is not None else ()))
    missing = [] if record.get("failure") else [key for key in asked if key not in record]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")


def check_folder(comparison: Comparison, output: Path) -> None:
    """Raise FileExistsError unless the folder is free, or has a comparison of the same suite and rank."""
    path = output / SETTINGS_FILE
    if path.exists():
        if other := _difference(path, comparison):
            raise FileExistsError(
                f"The folder {output} contains another comparison: {other} differs. Choose another --output."
            )
    elif output.exists() and any(p for p in output.iterdir() if p.suffix not in (".partial", ".lock")):
        raise FileExistsError(f"The folder {output} is not empty and contains no comparison. Choose another --output.")


def check(comparison: Comparison, output: Path) -> None:
    """Validate what is left of a comparison, apart from its data, and the folder for its results.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: an option of a method or setting of a task is invalid.

    """
    check_folder(comparison, output)
    finished = read_records(output)
    missing = (job for job in comparison.plan(finished) if job.name not in finished)
    for task, method in dict.fromkeys((job.task, job.method) for job in missing):
        settings, entry = comparison.definition.tasks[task], find_method(method)
        if isinstance(settings, CapacityTask):
            if entry.train == "adalora":
                raise ValueError(f"AdaLoRA needs the Trainer, but {task} has its own training loop. Remove it.")
            if "by" in entry.cut:
                require_known("criterion of fitted ranks", entry.cut["by"], CRITERIA)
            if entry.learns_ranks:
                cut_step(entry.cut.get("at", CUT_AT), settings.steps)
            adapter_config(entry.train, {}, settings.steps, entry.adapter(comparison.r))
            continue
        if entry.cut:
            raise ValueError(f"{method} sets {', '.join(entry.cut)}, which {task} does not support. Remove it.")
        config = train_config(comparison.definition, task, entry, entry.rates[0], 1, comparison.r, output)
        require_settings(config.training, "training", settings.task, entry.train)
        head = TASKS[settings.task].adapter_fields
        adapter_config(entry.train, head, settings.steps, config.adapter)


def prepare(comparison: Comparison, output: Path) -> None:
    """Create a folder for the results of a comparison that `check` accepts.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: an option of a method or setting of a task is invalid.

    """
    check(comparison, output)
    output.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, Any] = {"rank": comparison.r, "suite": asdict(_as_run(comparison.definition))}
    if (output / SETTINGS_FILE).exists():
        stored = read_json(output / SETTINGS_FILE, _Settings, _ANOTHER)
        wanted["suite"]["tasks"] = stored["suite"]["tasks"] | wanted["suite"]["tasks"]
    write_json(output / SETTINGS_FILE, wanted)  # first: marks the folder as a comparison's
    write_json(output / CALL_FILE, asdict(comparison))


def read_comparison(suite: str, output: Path) -> Comparison:
    """Last comparison of a folder.

    Raises:
        FileNotFoundError: there is none.

    """
    path = output / CALL_FILE
    if not path.exists():
        raise FileNotFoundError(f"There is no comparison in {output}. Run it first.")
    with readable(path, "Run the comparison again without --report."):
        call = parse_json(path)
        lists = {name: tuple(value) for name, value in call.items() if isinstance(value, list)}
        return Comparison(**{**call, **lists, "suite": suite})


def _as_run(suite: Suite) -> Suite:
    """Suite without default methods, rank and protocol, which do not affect a run."""
    tasks = {
        name: replace(task, methods=()) if isinstance(task, CapacityTask) else task
        for name, task in suite.tasks.items()
    }
    return replace(suite, tasks=tasks, methods=(), rank=Suite.rank, protocol="")


def _difference(path: Path, comparison: Comparison) -> str:
    """The first setting that differs from a settings file, apart from added or removed tasks; empty if none."""
    stored = read_json(path, _Settings, _ANOTHER)
    if stored["rank"] != comparison.r:
        return "rank"
    with readable(path, _ANOTHER):
        old, new = _as_run(Suite.from_dict(stored["suite"])), _as_run(comparison.definition)
    common = [task for task in old.tasks if task in new.tasks]
    pairs: list[tuple[Any, Any, str]] = [(old.tasks[task], new.tasks[task], f" of the task {task}") for task in common]
    for before, after, where in ((replace(old, tasks={}), replace(new, tasks={}), ""), *pairs):
        if type(before) is not type(after):
            return f"task{where}"
        for field in fields(before):
            if getattr(before, field.name) != getattr(after, field.name):
                return f"{field.name}{where}"
    return "" if common else "every task"


def train_config(
    suite: Suite, task_name: str, method: Method, learning_rate: float, seed: int, rank: int, output: Path
) -> TrainConfig:
    """Training run of a job."""
    task = suite.training_tasks[task_name]
    adapter = {} if method.train == "full" else {**suite.adapter, **method.adapter(rank, ratio=suite.scale)}
    return TrainConfig(
        model=suite.model,
        data=task.data,
        task=task.task,
        method=method.train,
        output=str(output),
        columns=task.columns,
        delimiter=task.delimiter,
        encoding=task.encoding,
        skip_empty=task.skip_empty,
        validation=FROM_TRAIN,
        train_examples=task.train_examples,
        validation_examples=task.validation_examples,
        max_length=task.max_length,
        head_learning_rate=task.head_learning_rate,
        size=method.size(rank),
        rank_every=task.steps,
        seed=seed,
        adapter=adapter,
        training={
            **suite.training,
            "max_steps": task.steps,
            "per_device_train_batch_size": task.batch_size,
            "learning_rate": learning_rate,
            "eval_strategy": "no",
            "save_strategy": "steps" if task.steps > _SAVE_STEPS else "no",
            "save_steps": _SAVE_STEPS,
            "save_total_limit": 1,
            "load_best_model_at_end": False,
        },
    )
