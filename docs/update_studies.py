"""Fill the tables of lab/studies and docs/evidence.md from the stored runs: python docs/update_studies.py [FOLDER ...].

Adds the finished runs of these comparisons of the suites "evidence", "users", "unit-input" and of ordinary tasks first.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median, mode, variance
from typing import Any

from scipy.stats import t

from lrlora_lab import gradient_moments, heads, low_rates
from lrlora_lab.jobs import TUNING_SEED, read_comparison, read_records
from lrlora_lab.sections import table, with_section
from lrlora_lab.statistics import paired_difference
from lrlora_lab.suite import Task
from lrlora_lab.tables import final_runs, learned_ranks

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "lab" / "studies"
EVIDENCE = STUDIES / "evidence.jsonl"
Run = dict[str, Any]
Cell = dict[int, Run]  # by seed


def add(folder: Path) -> None:
    """Add the finished runs of a comparison to the rows of "evidence"."""
    call = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    comparison = read_comparison(call["suite"], folder)
    rows = {json.dumps(_identity(run)): run for run in _stored("evidence")}
    for record in read_records(folder).values():
        if record.get("failure"):
            continue
        task = comparison.definition.tasks[record["task"]]
        run = {
            **{"suite": comparison.suite, "task": record["task"], "method": record["method"], "seed": record["seed"]},
            **{"rate": record["learning_rate"], "seconds": record["seconds"], "parameters": record["trainable"]},
            "validation": record["criterion"],
        }
        if record["seed"] != TUNING_SEED:
            score = record["test"][task.metric] if isinstance(task, Task) else None
            run |= {"test": record["test"]["loss"], "base": record["test"].get("base"), "score": score}
        rows[json.dumps(_identity(run))] = run
    EVIDENCE.write_text("".join(json.dumps(run) + "\n" for run in rows.values()), encoding="utf-8")
    _stored.cache_clear()


def _identity(run: Run) -> list[Any]:
    return [run[name] for name in ("suite", "task", "method", "seed", "rate")]


@cache
def _stored(study: str) -> list[Run]:
    path = STUDIES / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def cell(study: str, task: str, method: str, rate: float | None = None) -> Cell:
    """Test runs by seed, at this rate or that of most seeds."""
    runs = [run for run in _stored(study) if (run["task"], run["method"]) == (task, method) and "test" in run]
    rate = rate or mode(run["rate"] for run in runs) if runs else None
    return {run["seed"]: run for run in runs if run["rate"] == rate}


def mean(runs: Cell, name: str = "test") -> str:
    """Mean over seeds; empty without runs or values."""
    values = [run[name] for run in runs.values()]
    return f"{fmean(values):.3f}" if values and None not in values else ""


def difference(runs: Cell, others: Cell, name: str = "test") -> str:
    """Mean paired difference with its 95 % interval."""
    seeds = sorted(runs.keys() & others.keys())
    found = paired_difference([runs[s][name] for s in seeds], [others[s][name] for s in seeds])
    if found is None:
        return ""
    return f"{found.value:+.3f}" + ("" if math.isnan(found.low) else f" ({found.low:+.3f} to {found.high:+.3f})")


def time(runs: Cell, others: Cell) -> str:
    """Ratio of the medians of the processor time of a step."""
    if not runs or not others:
        return ""
    return f"{median(r['seconds'] for r in runs.values()) / median(r['seconds'] for r in others.values()):.2f}"


# Title → task, LoRA, learned ranks.
GAINS = {
    "German, 500 steps, r = 4": ("german", "lora", "learned"),
    "German, 2,000 steps, r = 4": ("german-long", "lora", "learned"),
    "source code, 500 steps, r = 4": ("source-code-r4", "lora", "learned"),
    "source code, 2,000 steps, r = 4": ("source-code-long", "lora", "learned"),
    "German, GPT-2's architecture, 500 steps, r = 4": ("german-gpt2", "lora", "learned"),
    "SmolLM2 on German, 400 steps, r = 8": ("smollm2-german", "lora+r=8", "learned+r=8"),
    "SmolLM2 on German, 400 steps, r = 16": ("smollm2-german", "lora+r=16", "learned+r=16"),
}


def gains() -> str:
    """Learned ranks and LoRA of their size."""
    rows = []
    for title, (task, *methods) in GAINS.items():
        lora, learned = (cell("evidence", task, method) for method in methods)
        if lora and learned:
            rates = " / ".join(f"{next(iter(runs.values()))['rate']:g}" for runs in (lora, learned))
            of_base = (mean(lora, "base"), mean(learned, "base"))
            measured = (mean(lora), mean(learned), difference(learned, lora), *of_base, time(learned, lora))
            rows.append([title, str(len(learned.keys() & lora.keys())), rates, *measured])
    head = ("task", "seeds", "rates", "LoRA", "learned ranks", "learned − LoRA")
    return table([*head, "LoRA on English", "learned on English", "time of a step, ratio"], rows)


EQUAL, KEPT = "+split=balanced", "+split=kept"  # norms of the factors at the cut, in runs before it was as now
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)


def rates() -> str:
    """German at rates that were not tuned."""
    rows = []
    for rate in RATES:
        task = "german" if rate == 0.01 else "german-r4"
        lora, learned = (cell("evidence", task, method, rate) for method in ("lora", "learned"))
        if lora and learned:
            rows.append([f"{rate:g}", mean(lora), mean(learned), difference(learned, lora)])
    return table(["rate", "LoRA", "learned ranks", "learned − LoRA"], rows)


RIVALS = {
    "learned ranks": f"learned{EQUAL}",
    "LoRA": "lora",
    "share of each module's own rise (GRIT's criterion), at 30 %": "learned+by=own-share",
    "equal ranks by SVD (LoRA-Squeeze), at 30 %": "learned+by=equal",
    "equal ranks by SVD, at 60 %": "learned+by=equal+at=0.6",
    "equal ranks by SVD, gradually up to 30 %": "learned+by=gradual",
    "equal ranks by SVD, gradually up to 60 %": "learned+by=gradual+at=0.6",
}


def rivals() -> str:
    """Other choices of ranks on German."""
    bases, rows = [cell("evidence", "german", method) for method in (f"learned{EQUAL}", "lora")], []
    for title, method in RIVALS.items():
        runs = cell("evidence", "german", method)
        found = ("" if runs == base else difference(runs, base) for base in bases)
        rows.append([title, str(len(runs)), mean(runs), mean(runs, "base"), *found])
    return table(["method", "seeds", "loss", "on English", "minus learned ranks", "minus LoRA"], rows)


USERS = {
    "LoRA, r = 16": "lora",
    "LoRA, r = 4": "lora+r=4",
    "learned ranks of the size of r = 16": "learned",
    "learned ranks of the size of r = 8": "learned+r=8",
    "learned ranks of the size of r = 4": "learned+r=4",
}


def users() -> str:
    """Untuned settings on chats."""
    bases, rows = [cell("evidence", "chats", method) for method in ("lora", "lora+r=4")], []
    for title, method in USERS.items():
        runs = cell("evidence", "chats", method)
        if runs:
            size = f"{next(iter(runs.values()))['parameters']:,}"
            accuracy = f"{100 * fmean(run['score'] for run in runs.values()):.1f} %"
            found = ("" if runs == base else difference(runs, base) for base in bases)
            rows.append([title, size, str(len(runs)), mean(runs), accuracy, *found, time(runs, bases[0])])
    head = ("method", "parameters", "seeds", "test loss", "token accuracy")
    return table([*head, "loss − LoRA, r = 16", "loss − LoRA, r = 4", "time of a step, ratio"], rows)


# Title → task and method, as it is now.
SPLITS = {
    "labels, r = 4": ("labels-r4", "learned"),
    "source code, r = 4": ("source-code-r4", "learned"),
    "German, r = 4": ("german", "learned"),
    "SmolLM2 on chats, size of r = 4": ("chats", "learned+r=4"),
    "SmolLM2 on chats, size of r = 16": ("chats", "learned"),
}


def splits() -> str:
    """The cut with factors of equal norms, with the norm that A had, and with the larger of both."""
    rows = []
    for title, (task, method) in SPLITS.items():
        balanced, kept, now = (cell("evidence", task, f"{method}{split}") for split in (EQUAL, KEPT, ""))
        means = (mean(balanced), mean(kept), mean(now))
        rows.append([title, str(len(balanced)), *means, difference(kept, balanced), difference(now, balanced)])
    head = ("task", "seeds", "equal norms", "norm of A kept", "the larger")
    return table([*head, "kept − equal", "the larger − equal"], rows)


def _score(run: Run) -> float:
    return run["score"] if "score" in run else run["test"]


def pooled(samples: Sequence[Sequence[float]]) -> str:
    """Mean of the means of samples, with the interval of Welch and Satterthwaite from the variances within them.

    Without an interval if a sample has one value.
    """
    value = fmean(fmean(sample) for sample in samples)
    if any(len(set(sample)) == 1 for sample in samples):
        return f"{value:+.2f}"
    variances = [variance(sample) / len(sample) for sample in samples]
    spread = sum(variances)
    freedom = spread**2 / sum(v**2 / (len(s) - 1) for v, s in zip(variances, samples, strict=True))
    reach = float(t.ppf(0.975, freedom)) * spread**0.5 / len(samples)
    return f"{value:+.2f} ({value - reach:+.2f} to {value + reach:+.2f})"


def ordinary(title: str, tasks: Iterable[tuple[str, str]], runs_of: Callable[[str], tuple[Cell, Cell]]) -> str:
    """Scores of LoRA and another method on ordinary tasks, (name, metric)."""
    rows, samples = [], []
    for task, metric in tasks:
        lora, other = runs_of(task)
        if lora.keys() & other.keys():
            seeds = sorted(lora.keys() & other.keys())
            samples.append([100 * (_score(other[seed]) / _score(lora[seed]) - 1) for seed in seeds])
            means = (f"{100 * fmean(_score(runs[seed]) for seed in seeds):.2f}" for runs in (lora, other))
            rows.append([task, metric, str(len(samples[-1])), *means, pooled(samples[-1:])])
    rows.append(["mean", "", "", "", "", pooled(samples)])
    return table(["task", "metric", "seeds", "LoRA", title, "difference, % of LoRA's"], rows)


def summary() -> str:
    """The differences of all tables but that of ordinary tasks."""
    learned = cell("evidence", "german", f"learned{EQUAL}")
    asked: list[tuple[str, Cell, Cell]] = [
        (f"{title}: learned ranks − LoRA", cell("evidence", task, other), cell("evidence", task, base))
        for title, (task, base, other) in GAINS.items()
    ]
    for share, rate in (("a quarter of", 0.0025), ("half", 0.005), ("twice", 0.02), ("four times", 0.04)):
        pair = (cell("evidence", "german-r4", method, rate) for method in ("learned", "lora"))
        asked.append((f"German, r = 4, {share} the best rate: learned ranks − LoRA", *pair))
    for title, method in list(RIVALS.items())[2:]:
        asked.append((f"German, r = 4: {title} − learned ranks", cell("evidence", "german", method), learned))
    chats = {name: cell("evidence", "chats", method) for name, method in USERS.items()}
    for r in (4, 16):
        runs, others = chats[f"learned ranks of the size of r = {r}"], chats[f"LoRA, r = {r}"]
        asked.append((f"SmolLM2 on chats, untuned, r = {r}: learned ranks − LoRA", runs, others))
    rows = [[title, difference(runs, others)] for title, runs, others in asked if runs and others]
    for steps, task in (("500", "german"), ("2,000", "german-long")):
        now, lora = (cell("evidence", task, method) for method in ("learned", "lora"))
        title = f"German, r = 4, {steps} steps, loss on English: learned ranks − LoRA"
        rows.append([title, difference(now, lora, "base")])
    return table(["comparison", "difference of the loss (nats)"], rows)


# Test loss of the byte model (`mean_loss(base_model(), load_corpus(name).test, 512)`); of labels, chance: ln 64.
WITHOUT_ADAPTER = {"german": 4.138, "source-code": 3.401, "labels": math.log(64)}


def again() -> str:
    """The first study's tasks with a later version of learned ranks."""
    rows = []
    for task in ("german", "source-code", "news", "labels", "smollm2"):
        lora, learned = (cell("learned_ranks", task, method) for method in ("lora", "in-place"))
        rows.append([task, str(len(learned.keys() & lora.keys())), difference(learned, lora)])
    return table(["task", "seeds", "learned − LoRA"], rows)


def sizes() -> str:
    """Share of the gain of r = 8 that a smaller size loses: predicted at the cut, and in finished runs."""
    rows = []
    for task, base in WITHOUT_ADAPTER.items():
        tested = {
            r: cell("learned_ranks", task, name) for r, name in ((2, "library-2"), (4, "library"), (8, "library-8"))
        }
        best = fmean(run["test"] for run in tested[8].values())
        curves = [run["lost"] for run in _stored("learned_ranks") if (run["task"], run["method"]) == (task, "curve")]
        for r in (2, 4):
            predicted = fmean((curve[str(r)] - curve["8"]) / (1 - curve["8"]) for curve in curves)
            lost = (fmean(run["test"] for run in tested[r].values()) - best) / (base - best)
            rows.append([task, str(r), f"{predicted:.1%}", f"{lost:.1%}"])
    return table(["task", "r", "loss of gain predicted at the cut", "measured after training"], rows)


UNIT = ("lora", "lr-lora+input_gain=300", "lr-lora")


def unit() -> str:
    """φ at unit input, with g = 300, and LoRA, seeds 2 to 6."""
    rows = []
    for task in ("labels", "picture-labels", "german"):
        means: dict[str, list[Cell]] = {name: [] for name in UNIT}
        for r in (1, 4):
            for name in UNIT:
                method = name.replace("lora", "lora+r=1", 1) if r == 1 else name
                runs = cell("unit_input", f"{task}-r{r}", method)
                means[name].append({seed: run for seed, run in runs.items() if seed > 1})
            rows.append([task, str(r), *(mean(means[name][-1]) for name in UNIT), "", ""])
        both = {
            name: {seed: {"test": fmean(runs[seed]["test"] for runs in cells)} for seed in cells[0]}
            for name, cells in means.items()
        }
        rows.append(
            [task, "both", "", "", "", *(difference(both["lr-lora"], both[name]) for name in reversed(UNIT[:2]))]
        )
    head = ["task", "r", "LoRA", "φ, g = 300", "φ, unit input"]
    return table([*head, "unit input from g = 300", "unit input from LoRA"], rows)


def at_low_rates() -> str:
    """φ at a quarter and an eighth of LoRA's tuned rate, r = 4."""
    runs, rows = _stored("low_rates"), []
    for task, rate, steps in sorted({(run["task"], run["rate"], run["steps"]) for run in runs}):
        arms: dict[str, Cell] = {arm: {} for arm in low_rates.ARMS}
        for run in runs:
            if (run["task"], run["rate"], run["steps"]) == (task, rate, steps):
                arms[run["arm"]][run["seed"]] = run
        lora = arms[low_rates.LORA]
        shown = difference(arms["φ, c = 0.5"], lora)
        rows.append([task, f"{rate:g}", str(steps), str(len(lora)), *map(mean, arms.values()), shown])
    return table(["task", "rate", "steps", "seeds", *low_rates.ARMS, "c = 0.5 − LoRA"], rows)


# Title, task, method and its LoRA, of docs/paper.md.
CLAIMS = [
    (f"{task}, r = {r}", task, f"lr-lora+r={r}", f"paper+r={r}", f"lora+r={r}")
    for task in ("labels", "picture-labels", "german")
    for r in (1, 4)
] + [
    ("phone book, SmolLM2, r = 1", "phone-book", "lr-lora+r=1", "paper+r=1+lora_alpha=0.25", "lora+r=1"),
    ("German, SmolLM2, r = 1", "smollm2-german", "lr-lora+r=1", "paper+r=1+lora_alpha=0.25", "lora+r=1"),
]


@cache
def _chosen() -> dict[str, Any]:
    """Jobs of the suite "capacity", each method at its own rate and scale."""
    folder = ROOT / "docs" / "compare" / "capacity"
    records = read_records(folder)
    return read_comparison("capacity", folder).of_all(records).select(records)


@cache
def _capacity() -> dict[tuple[str, str], Cell]:
    """(task, method) → final runs of the suite "capacity"."""
    cells = final_runs(_chosen())
    return {cell: {run["seed"]: {"test": run["test"]["loss"]} for run in runs} for cell, runs in cells.items()}


def ranks() -> str:
    """Stable ranks of LoRA, φ and the paper's form on German."""
    methods = ("lora+r=4", "lr-lora+r=4", "paper+r=4")
    runs = {n: run for n, run in _chosen().items() if run["task"] == "german" and run["method"] in methods}
    rows = []
    for row in learned_ranks(runs).to_dict("records"):
        gap = row["attention − MLP"]
        shares = (f"{row[name].value:.2f}" for name in ("share of layers", "share of types"))
        found = f"{gap.value:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"
        rows.append([row["method"], f"{row['layers differ: p']:.4f}", *shares, found])
    return table(["method", "layers differ: p", "share of layers", "share of types", "attention − MLP, ln"], rows)


def claims() -> str:
    """LoRA's loss minus that of φ, the default at LoRA's and at its own settings, and the paper's form."""
    rows = []
    for title, task, ours, paper, lora in CLAIMS:
        r = title[-1]
        plain = "lora" if r == "4" else lora
        same = [
            {seed: run for seed, run in cell("unit_input", f"{task}-r{r}", name).items() if seed > 1}  # 1 chose c
            for name in (plain, plain.replace("lora", "lr-lora"))
        ]
        tuned = [_capacity().get((task, name), {}) for name in (lora, ours, paper)]
        found = (difference(*same), difference(*tuned[:2]), difference(tuned[0], tuned[2]))
        if any(found):
            rows.append([title, mean(tuned[0]), *found])
    head = ["task", "LoRA's loss", "φ at LoRA's settings", "φ at its own", "the paper's form at its own"]
    return table(head, rows)


OTHERS = {
    "one φ for all − one for each module, German": ("german", "lr-lora-shared+r=4", "lr-lora+r=4"),
    "PEANuT − LoRA, labels": ("labels", "peanut+r=4", "lora+r=4"),
    "PEANuT − LoRA, German": ("german", "peanut+r=4", "lora+r=4"),
}


def others() -> str:
    """Other pairs of methods at r = 4, each at its own rate and scale."""
    rows = []
    for title, (task, *methods) in OTHERS.items():
        runs, base = (_capacity().get((task, method), {}) for method in methods)
        if runs:
            rows.append([title, str(len(runs.keys() & base.keys())), difference(runs, base)])
    return table(["r = 4", "seeds", "difference, nats"], rows)


_TEXTS = (("movie-reviews", "accuracy"), ("ratings", "Pearson"), ("r8", "accuracy"), ("20-newsgroups", "accuracy"))


def unit_ordinary() -> str:
    """φ at unit input on ordinary tasks."""
    tasks = (*_TEXTS, ("digits", "accuracy"))
    return ordinary(
        "φ, unit input", tasks, lambda task: (cell("unit_input", task, "lora"), cell("unit_input", task, "lr-lora"))
    )


# Page → section → its table.
SECTIONS: dict[Path, dict[str, Callable[[], str]]] = {
    STUDIES / "unit_input.md": {"unit": unit, "ordinary": unit_ordinary, "low-rates": at_low_rates, "others": others},
    ROOT / "docs" / "compare.md": {"ordinary": unit_ordinary},
    STUDIES / "learned_ranks.md": {"again": again},
    ROOT / "docs" / "paper.md": {"claims": claims, "ranks": ranks},
    ROOT / "docs" / "evidence.md": {"summary": summary},
    STUDIES / "gradient.md": {
        "windows": lambda: gradient_moments.windows(_stored("gradient")),
        "gate": lambda: gradient_moments.gate(_stored("gradient")),
    },
    STUDIES / "heads.md": {
        "cells": lambda: heads.cells(_stored("heads")),
        "verdict": lambda: heads.verdict(_stored("heads")),
        "seeds": lambda: heads.seeds(_stored("heads")),
        "rivals": lambda: heads.rivals(_stored("heads")),
    },
    STUDIES / "evidence.md": {
        "gains": gains,
        "rates": rates,
        "rivals": rivals,
        "users": users,
        "splits": splits,
        "sizes": sizes,
        "ordinary": lambda: ordinary(
            "learned ranks",
            (*_TEXTS, ("strategy-qa", "accuracy")),
            lambda task: (
                cell("evidence" if task == "strategy-qa" else "unit_input", task, "lora"),
                cell("evidence", task, "learned"),
            ),
        ),
    },
}


def updated(page: Path, text: str) -> str:
    """The page with its tables."""
    for name, make in SECTIONS[page].items():
        text = with_section(text, name, make())
    return text


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        add(Path(folder))
    for page in SECTIONS:
        page.write_text(updated(page, page.read_text(encoding="utf-8")), encoding="utf-8")
