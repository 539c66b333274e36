"""Comparison of methods on your own data: `lrlora compare`.

Every job is a run of `train` in a folder of its own. Each method first tries a grid of learning rates with seed 0,
which grows while the best by validation loss is at its edge; then several seeds at the best rate, which are scored on
test data.
"""

from __future__ import annotations

import functools
import gc
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import sem, t
from transformers import AutoConfig

from ..checks import DEFAULT_KEEP, require_known
from ..files import parse_json, readable, require_folder, write_json, write_whole
from ..learned.cut import FEWEST_STEPS
from ..run_folder import METRICS_FILE, RUN_FILE
from .compression import measure_smallest
from .data import load_examples, load_splits, load_task_data
from .inference import evaluate
from .inputs import data_sums
from .methods import DEFAULT_RANK, LEARNED, METHODS
from .models import model_source
from .progress import Announce, DivergedError
from .run import train
from .settings import TrainConfig, read_run
from .tasks import TASKS, Task
from .tasks.base import LESS_IS_BETTER

_TEST_FILE, _TRAINED_FILE, _DIVERGED_FILE = "test.json", "trained.json", "diverged.txt"
_GRID = (1, 2, 4)  # times the default rate
_EXTENSIONS = 2  # of the grid, by a factor of 2
_POINTS = 0.03  # difference of an accuracy for which the number of examples is given
_Z = 1.96  # 95 % interval


@dataclass(frozen=True)
class Comparison:
    """Methods to compare on one task.

    Args:
        settings: those of the runs (see `TrainConfig`), without method, size, learning rate and seed.
        methods: of `train`, or "learned" for LoRA with learned ranks; the first is the reference. Of one alone, the
            rate is tuned.
        rates: learning rates of every method, tuned with a run for each unless there is only one; default: 1, 2 and 4
            times the task's, and beyond while the best is at the edge.
        seeds: number of runs at the best rate.
        test_data: data for the scores, like `data`; default: the split `test` of the data.

    Raises:
        ValueError: a method or setting is unknown or out of range.

    """

    settings: dict[str, Any]
    methods: tuple[str, ...] = ("lora", LEARNED)
    rates: tuple[float, ...] = ()
    seeds: int = 3
    test_data: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.methods)) != len(self.methods) or not self.methods:
            raise ValueError(f"methods must be different ones, at least one, got {', '.join(self.methods) or 'none'}.")
        for method in self.methods:
            require_known("method", method, (LEARNED, *METHODS))
        if self.seeds < 1:
            raise ValueError(f"seeds must be an integer ≥ 1, got {self.seeds}.")
        require_folder(self.output)
        steps = self.settings.get("steps")
        if LEARNED in self.methods and isinstance(steps, int) and steps < FEWEST_STEPS:
            raise ValueError(
                f"steps must be at least {FEWEST_STEPS} for ranks to be learned, got {steps}. Raise --steps, or leave "
                f"{LEARNED} out."
            )
        if self.task.generates:
            for method in self.methods:
                if method != LEARNED and METHODS[method].has_penalty:
                    raise ValueError(f"The loss of a language model with {method} has a penalty. Leave {method} out.")
        for method in self.methods:
            for rate in self.first_rates(method):
                self.run(method, rate, 0)

    @property
    def output(self) -> Path:
        return Path(self.settings["output"])

    def first_rates(self, method: str) -> tuple[float, ...]:
        """Learning rates to try first."""
        return tuple(sorted(self.rates)) or tuple(times * self.task.rates[method == "full"] for times in _GRID)

    @property
    def runs(self) -> int:
        """Number of runs, without extensions of the rates."""
        tuning = 0 if len(self.rates) == 1 else sum(len(self.first_rates(method)) for method in self.methods)
        return tuning + self.seeds * len(self.methods)

    @property
    def caution(self) -> str:
        """Why its seeds can hardly tell methods apart; empty for three or more."""
        if len(self.methods) == 1:
            return ""
        if self.seeds == 1:
            return "One seed cannot tell whether methods differ. Pass more --seeds."
        if self.seeds > 2:
            return ""
        wide, narrow = (f"{t.ppf(0.975, seeds - 1) / math.sqrt(seeds):.1f}" for seeds in (2, 5))
        return (
            f"Two seeds can hardly tell whether methods differ: a difference must be {wide} times its standard "
            f"deviation between seeds, with five seeds {narrow} times. Pass more --seeds."
        )

    @functools.cached_property
    def task(self) -> Task:
        """Task, as the model does it; without roles for a name that `TrainConfig` refuses."""
        task = TASKS.get(str(self.settings.get("task")), Task())
        if not task.depends_on_model:
            return task
        return task.for_model(AutoConfig.from_pretrained(model_source(str(self.settings.get("model")))))

    def run(self, method: str, rate: float, seed: int) -> TrainConfig:
        """Configuration of a job."""
        rank = self.settings.get("rank") or DEFAULT_RANK
        sized: dict[str, Any] = {"rank": rank, "method": method}
        if method == LEARNED:
            sized = {"rank": None, "size": f"r{rank}", "method": method}
        elif method == "full":
            sized = {"rank": None, "alpha": None, "method": method}
        folder = self.output / f"{method}-{float(rate)!r}-{seed}"
        return TrainConfig.from_dict(
            self.settings | sized | {"learning_rate": rate, "seed": seed, "output": str(folder)}
        )


@dataclass(frozen=True)
class Score:
    """Scores of one method.

    Attributes:
        method: its name.
        rate: learning rate with the lowest validation loss.
        trainable: number of trained parameters.
        values: metric of each seed.
        smallest: size that the adapter of the last seed needs, in words; empty for methods without ranks.

    """

    method: str
    rate: float
    trainable: int
    values: list[float]
    smallest: str = ""


@dataclass(frozen=True)
class Outcome:
    """Scores of all methods, the reference first.

    Attributes:
        scores: by method.
        metric: name.
        data: what it is measured on, in words.
        examples: their number.

    """

    scores: list[Score]
    metric: str
    data: str
    examples: int

    def difference(self, score: Score) -> tuple[float, float]:
        """Mean difference to the reference over seeds, and half its 95 % interval; infinite with one seed.

        Of an accuracy, the interval includes the sampling of the examples, as if those of both methods were
        independent.
        """
        half = self._by_seeds(score)
        if self._is_share:
            half = math.hypot(half, _Z * math.sqrt(self._variance(score) / self.examples))
        return float(np.subtract(score.values, self.scores[0].values).mean()), half

    def _by_seeds(self, score: Score) -> float:
        """Half the 95 % interval of its difference, from the seeds alone."""
        differences = np.subtract(score.values, self.scores[0].values)
        if len(differences) < 2:
            return math.inf
        return float(t.ppf(0.975, len(differences) - 1) * sem(differences))

    @property
    def _is_share(self) -> bool:
        return "accuracy" in self.metric

    def _variance(self, score: Score) -> float:
        """Of the difference of its accuracy to the reference's, times the number of examples."""
        return sum(mean * (1 - mean) for mean in (fmean(self.scores[0].values), fmean(score.values)))

    def answers(self) -> Iterator[str]:
        """The size that a method needs, and each difference, in sentences."""
        first, is_loss = self.scores[0], self.metric in LESS_IS_BETTER
        yield from (
            f"{score.method}, seed {len(score.values)}: {score.smallest}" for score in self.scores if score.smallest
        )
        for score in self.scores[1:]:
            difference, half = self.difference(score)
            shown = f"{difference:+.3f} ({difference - half:+.3f} to {difference + half:+.3f})"
            if abs(difference) > half:
                word = "better" if (difference < 0) == is_loss else "worse"
                yield f"{score.method} is {word} than {first.method}: {self.metric} {shown}."
                continue
            if len(score.values) == 1:
                yield (
                    f"{score.method} − {first.method}: {difference:+.3f}. One seed cannot tell whether they differ. "
                    "Pass more --seeds."
                )
                continue
            evidence, more = f"{len(score.values)} seeds", ""
            if self._is_share:
                evidence += f" and {self.examples:,} examples"
                needed = math.ceil(self._variance(score) * (_Z / _POINTS) ** 2)
                if (half := self._by_seeds(score)) > _POINTS:
                    more = f" The seeds alone leave ±{half:.3f}: pass more --seeds."
                elif needed > self.examples:
                    more = f" About {needed:,} examples would show {100 * _POINTS:g} points."
            yield f"No difference between {score.method} and {first.method} that {evidence} could show: {shown}.{more}"


def compare(comparison: Comparison, *, announce: Announce = print) -> Outcome:
    """Train all missing jobs, and score the methods.

    Call it again to resume.

    Raises:
        FileExistsError: the output folder holds runs with other settings.
        FileNotFoundError: model or data is missing.
        ValueError: the data or a setting is invalid, or a method diverged at all rates.
        lrlora.train.run.Interrupted: it was stopped, after a checkpoint.

    """
    data = score_data(comparison)
    scores, metric, examples = [], "", 0
    for method in comparison.methods:
        rate = _tune(comparison, method, data, announce)
        values = []
        for seed in range(1, comparison.seeds + 1):
            config = comparison.run(method, rate, seed)
            if not math.isfinite(_loss(config, data, announce)):
                raise ValueError(f"{method} diverged with seed {seed} at its best rate, {rate:g}. Pass lower --rates.")
            metrics = _score(config, data)
            metric, examples = metric or _metric(comparison.task, metrics), int(metrics["examples"])
            announce(f"{method}, rate {rate:g}, seed {seed}: {metric} {metrics[metric]:.4g} on {data.shown}.")
            values.append(metrics[metric])
        trained = parse_json(Path(config.output) / _TRAINED_FILE)
        has_ranks = method in METHODS and METHODS[method].has_ranks
        smallest = _smallest(Path(config.output)) if has_ranks else ""
        scores.append(Score(method, rate, trained, values, smallest))
    return Outcome(scores, metric, data.shown, examples)


def _smallest(folder: Path) -> str:
    """Size that the adapter of a run needs, or why it was not found."""
    try:
        return str(measure_smallest(folder, DEFAULT_KEEP, lambda line: None))
    except ValueError as error:
        return f"The smallest LoRA was not chosen: {error}"


def _metric(task: Task, metrics: Mapping[str, float]) -> str:
    """Metric that decides: the loss of a text, else the task's first."""
    return task.criterion if task.generates else next(name for name in task.metrics if name in metrics)


class ScoreData(NamedTuple):
    """Data and split of the scores, their description, and the sums of all data, by split."""

    name: str
    split: str | None
    shown: str
    sums: dict[str, str]


def score_data(comparison: Comparison) -> ScoreData:
    """Read and check the data.

    Raises:
        FileNotFoundError: data is missing.
        ValueError: the data cannot be used, or it has no split `test`, and no other was given.

    """
    config = comparison.run(comparison.methods[0], comparison.first_rates(comparison.methods[0])[0], 0)
    if comparison.test_data is not None:
        test: tuple[str, str | None, str] = comparison.test_data, None, comparison.test_data
    elif "test" in load_splits(config.data, config):
        test = config.data, "test", "the split test"
    else:
        raise ValueError(f"{config.data} has no split test, which scores the methods. Pass --test-data.")
    training = load_task_data(config, comparison.task)
    scored, *_ = load_examples(config, comparison.task, test[0], test[1], training.labels, with_label=True)
    return ScoreData(*test, data_sums({**training.splits, "test": scored}))


def _require_same(config: TrainConfig, sums: Mapping[str, str]) -> None:
    stored, record = read_run(Path(config.output))
    if differing := [name for name, value in vars(config).items() if getattr(stored, name) != value]:
        name = differing[0]
        raise FileExistsError(
            f"{config.output} is a run with {name}={getattr(stored, name)!r}, not {getattr(config, name)!r}. Choose "
            "another --output, or remove it."
        )
    if any(record.data_sums[name] != sums[name] for name in record.data_sums):
        raise FileExistsError(
            f"The data has changed since {config.output} was trained. Choose another --output, or remove it."
        )


def _tune(comparison: Comparison, method: str, data: ScoreData, announce: Announce) -> float:
    """The rate with the least validation loss, with seed 0."""
    rates = list(comparison.first_rates(method))
    if len(rates) == 1:
        return rates[0]
    losses: dict[float, float] = {}
    while True:
        for rate in rates:
            if rate not in losses:
                losses[rate] = _loss(comparison.run(method, rate, 0), data, announce)
                loss = f"{losses[rate]:.4g}" if math.isfinite(losses[rate]) else "diverged"
                announce(f"{method}, rate {rate:g}: validation loss {loss}.")
        best = min(losses, key=lambda rate: losses[rate])
        if not math.isfinite(losses[best]):
            raise ValueError(
                f"{method} diverged at all rates tried: {', '.join(f'{r:g}' for r in rates)}. Pass --rates."
            )
        grown = len(rates) - len(comparison.first_rates(method))
        is_inside = best not in (rates[0], rates[-1])
        is_last = bool(comparison.rates) or grown >= _EXTENSIONS
        if not is_inside and is_last:
            announce(f"{method}: the best rate, {best:g}, is at the edge of those tried. Try others with --rates.")
        if is_inside or is_last:
            return best
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]


def _loss(config: TrainConfig, data: ScoreData, announce: Announce) -> float:
    """Validation loss of a job, trained unless it is finished; infinite if it diverged."""
    folder = Path(config.output)
    if (folder / _DIVERGED_FILE).exists():
        return math.inf
    was_begun = (folder / RUN_FILE).exists()
    if was_begun:
        _require_same(config, data.sums)
    if not (folder / _TRAINED_FILE).exists():
        # A finished run without the file was not accepted.
        if was_begun and (not METHODS[config.method].can_resume or (folder / METRICS_FILE).exists()):
            shutil.rmtree(folder)
            was_begun = False
        announce(f"Training {folder} …")
        try:
            result = train(config, resume=was_begun, announce=lambda line: None)
        except DivergedError as error:
            write_whole(folder / _DIVERGED_FILE, str(error))
            return math.inf
        if config.learns_ranks and config.size is not None and result.learned_ranks is None:
            raise ValueError(f"{folder} ended before its ranks were learned. Raise --steps, or leave {LEARNED} out.")
        write_json(folder / _TRAINED_FILE, sum(p.numel() for p in result.model.parameters() if p.requires_grad))
        del result
        gc.collect()  # the next model needs its memory
    with readable(folder / METRICS_FILE, "Remove the folder to repeat the run."):
        return float(parse_json(folder / METRICS_FILE)[TASKS[config.task].criterion])


def _score(config: TrainConfig, data: ScoreData) -> dict[str, float]:
    """Metrics of a finished job on test data."""
    path = Path(config.output) / _TEST_FILE
    if not path.exists():
        scores = evaluate(config.output, data.name, split=data.split, answers=False, announce=lambda line: None)
        write_json(path, {"data": data.sums["test"], **scores})
    with readable(path, "Remove it to repeat the evaluation."):
        metrics = parse_json(path)
        if metrics.pop("data") != data.sums["test"]:
            raise FileExistsError(
                f"{path} is of other data than {data.shown} is now. Remove it, or choose another --output."
            )
        return dict(metrics)
