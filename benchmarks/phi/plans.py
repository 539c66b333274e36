"""Which training runs the study of φ consists of. A plan looks at the finished runs and names the next ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
TUNING_SEED = 0
# A new head of 20 classes wants a far higher rate than the adapter. With one rate for both, a method that only bears
# high rates looks like a better adapter (the runs of `dynamics` show it): so the head gets its own, the same for all.
HEAD_RATE = 16e-3

# VitaminC must run longer to leave chance; it comes last.
STEPS = {"20-newsgroups": 300, "r8": 200, "movie-reviews": 200, "vitaminc": 1000}
FROZEN = 1e-9  # as a multiplier of φ's learning rate
# What the first two layers leave in the race: the form that moves rank at LoRA's loss, at both r, and the fixed bounded
# form that bears high rates, at r = 4.
SMOOTH = {"form": "residual", "input_gain": 300, "num_basis": 8, "phi_lr_multiplier": 10}
BOUNDED = {"form": "saturating", "input_gain": 300, "num_basis": 50, "phi_lr_multiplier": FROZEN}
# On R8 the first was below LoRA: does a φ that learns less fast keep up?
SLOWER = {**SMOOTH, "phi_lr_multiplier": 3}
_SMOOTH_4, _SMOOTH_1, _BOUNDED_4 = ("lr-lora", 4, SMOOTH), ("lr-lora", 1, SMOOTH), ("lr-lora", 4, BOUNDED)
_SLOWER_4 = ("lr-lora", 4, SLOWER)


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task: a key of `lrlora.lab.tasks.TASKS`.
        method: "lora" or "lr-lora".
        r: rank of BA.
        learning_rate: peak.
        options: fields of `LrLoraConfig` beside these.
        steps, batch_size: of training.
        seed: of head, factors and data order.
        watch_ranks: record the ranks every 50 steps.
        scaling: s = α/r.
        head_rate: peak learning rate of the new classification head, if not that of the adapter.

    """

    task: str
    method: str
    r: int
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 300
    batch_size: int = 16
    seed: int = TUNING_SEED
    watch_ranks: bool = False
    scaling: float = 1.0
    head_rate: float | None = None

    @property
    def is_tuning(self) -> bool:
        return self.seed == TUNING_SEED


def key(run: Run) -> str:
    """What makes a run the same run."""
    return json.dumps(asdict(run), sort_keys=True)


def key_of(result: dict[str, Any]) -> str:
    """The key of the run that a finished record is of."""
    return key(Run(**{name: result[name] for name in Run.__dataclass_fields__ if name in result}))


def tuned(cells: Iterable[Run], finished: dict[str, dict[str, Any]]) -> list[Run]:
    """What is next for each cell: every rate on the tuning seed, then all seeds at the best rate on validation.

    While the best rate is the lowest or the highest tried, the grid grows by a factor of two on that side.
    """
    wanted = []
    for cell in cells:
        rates = list(RATES)
        while True:
            trials = [replace(cell, learning_rate=rate) for rate in rates]
            if not all(key(trial) in finished for trial in trials):
                wanted += trials
                break
            best = best_rate({rate: finished[key(trial)] for rate, trial in zip(rates, trials, strict=True)})
            if best == rates[0] and best > RATES[0] / 4:
                rates.insert(0, best / 2)
            elif best == rates[-1] and best < RATES[-1] * 4:
                rates.append(best * 2)
            else:
                wanted += [replace(cell, learning_rate=best, seed=seed) for seed in SEEDS]
                break
    return wanted


def best_rate(trials: dict[float, dict[str, Any]]) -> float:
    """The rate of the lowest validation loss: on 1,000 texts it is a steadier guide than accuracy."""
    return min(trials, key=lambda rate: trials[rate]["validation_loss"])


def _cell(task: str, method: str, r: int, options: dict[str, Any] | None = None) -> Run:
    return Run(task, method, r, 0.0, options or {}, steps=STEPS[task], head_rate=HEAD_RATE)


def comparison(finished: dict[str, dict[str, Any]]) -> list[Run]:
    """LoRA and the candidates at r, then LoRA at 2r, then the bounded form: what matters most comes first."""
    tasks = [task for task in STEPS if task != "vitaminc"]
    cells = [_cell(task, *method) for task in tasks for method in (("lora", 4), _SMOOTH_4, ("lora", 1), _SMOOTH_1)]
    cells += [_cell(task, *_SLOWER_4) for task in ("r8", "movie-reviews", "20-newsgroups")]
    cells += [_cell("vitaminc", *method) for method in (("lora", 4), _SMOOTH_4)]
    cells += [_cell(task, "lora", r) for task in tasks for r in (8, 2)]
    cells += [_cell(task, *_BOUNDED_4) for task in tasks]
    return tuned(cells, finished)


def dynamics(finished: dict[str, dict[str, Any]]) -> list[Run]:
    """One task, one seed, validation only: what the settings of φ do to rank and loss."""

    def saturating(**options: Any) -> dict[str, Any]:
        return {"form": "saturating", "input_gain": 300, "num_basis": 50, **options}

    def residual(**options: Any) -> dict[str, Any]:
        return {"form": "residual", "input_gain": 300, "num_basis": 50, **options}

    forms = [
        saturating(phi_lr_multiplier=FROZEN),
        saturating(phi_lr_multiplier=10, num_basis=8),
        residual(phi_lr_multiplier=10),
    ]
    # At the rates of the first runs, adapter and head alike.
    runs = [Run("20-newsgroups", "lora", 4, rate, watch_ranks=True) for rate in (4e-3, 8e-3)]
    runs += [Run("20-newsgroups", "lr-lora", 4, rate, forms[0], watch_ranks=True) for rate in (4e-3, 8e-3, 16e-3)]
    runs += [Run("20-newsgroups", "lr-lora", 4, rate, forms[1], watch_ranks=True) for rate in (4e-3, 8e-3)]
    # Does a bounded update help by itself, or by letting the new head learn fast? LoRA with a smaller scaling tells.
    runs += [
        Run("20-newsgroups", "lora", 4, rate, watch_ranks=True, scaling=scaling)
        for rate, scaling in ((8e-3, 0.25), (16e-3, 0.25), (8e-3, 0.5))
    ]
    # So does a head with a rate of its own, and from here on every head has it.
    own_head: dict[str, Any] = {"watch_ranks": True, "head_rate": HEAD_RATE}
    runs += [Run("20-newsgroups", "lora", 4, rate, **own_head) for rate in (2e-3, 4e-3, 1e-3, 8e-3)]
    runs += [
        Run("20-newsgroups", "lr-lora", 4, rate, options, **own_head)
        for options in forms
        for rate in (4e-3, 8e-3, 2e-3)
        if not (rate == 8e-3 and options == forms[2])
    ]
    runs += [Run("20-newsgroups", "lora", 1, rate, **own_head) for rate in (4e-3, 8e-3)]
    runs += [Run("20-newsgroups", "lr-lora", 1, 4e-3, options, **own_head) for options in forms[:2]]
    others = [
        residual(phi_lr_multiplier=1, num_basis=8),
        residual(phi_lr_multiplier=1),
        residual(phi_lr_multiplier=10, num_basis=8),
        saturating(phi_lr_multiplier=FROZEN, input_gain=100),
        saturating(phi_lr_multiplier=FROZEN, input_gain=1000),
        {"form": "sine", "input_gain": 300},
        {"form": "sinc", "input_gain": 300, "num_basis": 50, "phi_lr_multiplier": 1},
    ]
    return runs + [Run("20-newsgroups", "lr-lora", 4, 4e-3, options, **own_head) for options in others]


PLANS: dict[str, Callable[[dict[str, dict[str, Any]]], list[Run]]] = {
    "dynamics": dynamics,
    "comparison": comparison,
}
