"""Rivals of finding the rate by short trainings: the study `finder.md`.

    python -m lrlora_lab.finder_rivals run finder_rivals.jsonl german
    python -m lrlora_lab.finder_rivals report finder_rivals.jsonl

One rate for all ranks: α of r = 16 at every rank, LoRA-RITE (arXiv:2410.20625) and PEFT's Riemannian optimizer
(arXiv:2402.02347), each at ranks 16 and 4; ten times the best rate of full fine-tuning; and the range test, a training
whose rate rises by the same factor at each step. 100 steps of the byte model, seed 0. Rows that the output has already
are not computed again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from pytorch_optimizer import LoRARite
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from .capacity import CLIP_NORM, WARMUP_STEPS
from .finder import TASKS, UNIT
from .front import read_rows
from .sections import table
from .study import study_parser

STEPS, RANKS, WIDE = 100, (16, 4), 16
LOW, HIGH = 1e-5, 1.0  # of the range test
_SMOOTHED = 0.9  # weight of the losses before, in the range test

Maker = Callable[[Any, float], torch.optim.Optimizer]


def _adam(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)


def _rite(model: Any, rate: float) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = LoRARite([p for p in model.parameters() if p.requires_grad], lr=rate)
    return optimizer


def _riemannian(model: Any, rate: float) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=rate, weight_decay=0.0)
    return optimizer


# Rival → optimizer, exponents of two of its rates, and whether α is that of r = 16.
OPTIMIZERS: dict[str, tuple[Maker, range, bool]] = {
    "LoRA": (_adam, range(0, 5), False),
    "LoRA, α of r = 16": (_adam, range(-1, 4), True),
    "LoRA-RITE": (_rite, range(-2, 5), False),
    "Riemannian": (_riemannian, range(-2, 4), False),
}
FULL, RANGE = "full fine-tuning", "range test"


def _model(name: str, rank: int, *, has_wide_alpha: bool) -> tuple[Any, Any]:
    """Data, and a LoRA; the model itself at rank 0."""
    data = TASKS[name].load(0)
    torch.manual_seed(0)
    if not rank:
        return data, data.model
    alpha = round(TASKS[name].scale * (WIDE if has_wide_alpha else rank))
    return data, get_peft_model(data.model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=data.targets))


def train(name: str, rank: int, make: Maker, rate: float, *, has_wide_alpha: bool) -> float:
    """Test loss after 100 steps."""
    data, model = _model(name, rank, has_wide_alpha=has_wide_alpha)
    optimizer = make(model, rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP_STEPS, STEPS // 10), STEPS)
    for batch in islice(data.batches(), STEPS):
        _step(model, optimizer, batch)
        schedule.step()
    model.eval()
    return float(data.test(model)["loss"])


def range_test(name: str, rank: int) -> float:
    """Rate of the steepest descent of the smoothed loss, while the rate rises by the same factor at each step."""
    data, model = _model(name, rank, has_wide_alpha=False)
    optimizer = _adam(model, LOW)
    smoothed: list[float] = []
    rates = np.geomspace(LOW, HIGH, STEPS)
    for rate, batch in zip(rates, data.batches(), strict=False):
        optimizer.param_groups[0]["lr"] = rate
        loss = _step(model, optimizer, batch)
        smoothed.append(_SMOOTHED * smoothed[-1] + (1 - _SMOOTHED) * loss if smoothed else loss)
        if not loss < 4 * min(smoothed):
            break
    return float(rates[np.gradient(np.array(smoothed)).argmin()])


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    model.train()
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP_NORM)
    optimizer.step()
    return float(loss)


def run(name: str, output: Path) -> None:
    """Rows of a task."""
    names = ("task", "rival", "rank", "exponent")
    known = {tuple(row[key] for key in names) for row in read_rows(output)}

    def add(rival: str, rank: int, exponent: int | None, value: Callable[[], float]) -> None:
        key = (name, rival, rank, exponent)
        if key not in known:
            row = dict[str, Any](zip(names, key, strict=True)) | {"value": value()}
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)

    for rank in RANKS:
        add(RANGE, rank, None, partial(range_test, name, rank))
        for rival, (make, exponents, has_wide_alpha) in OPTIMIZERS.items():
            for exponent in exponents if rank != WIDE or not has_wide_alpha else ():
                rate = UNIT * 2.0**exponent
                add(rival, rank, exponent, partial(train, name, rank, make, rate, has_wide_alpha=has_wide_alpha))
    for exponent in range(-6, -1):
        rate = UNIT * 2.0**exponent
        add(FULL, 0, exponent, partial(train, name, 0, _adam, rate, has_wide_alpha=False))


def losses(rows: Sequence[dict[str, Any]]) -> str:
    """Table: test loss of each rival and rank by rate."""
    exponents = sorted({row["exponent"] for row in rows if row["exponent"] is not None})
    cells: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        if row["exponent"] is not None:
            cells.setdefault((row["task"], row["rival"], row["rank"]), {})[row["exponent"]] = row["value"]
    lines = []
    for (task, rival, rank), values in cells.items():
        best = min(values.values())
        shown = [
            "" if e not in values else f"**{values[e]:.3f}**" if values[e] == best else f"{values[e]:.3f}"
            for e in exponents
        ]
        lines.append([task, rival, str(rank) if rank else "", *shown])
    return table(["task", "method", "r", *(f"{UNIT * 2.0**e:.2g}" for e in exponents)], lines)


def ranges(rows: Sequence[dict[str, Any]]) -> str:
    """Table: rate of the range test."""
    lines = [[row["task"], str(row["rank"]), f"{row['value']:.2g}"] for row in rows if row["rival"] == RANGE]
    return table(["task", "r", "rate of the range test"], lines)


def main(arguments: list[str]) -> None:
    """Run tasks, or report."""
    parser, run_parser = study_parser("finder_rivals")
    run_parser.add_argument("tasks", choices=[*TASKS], nargs="+")
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        rows = read_rows(settings.file)
        print(losses(rows), ranges(rows), sep="\n")
        return
    for name in settings.tasks:
        run(name, settings.file)


if __name__ == "__main__":
    main(sys.argv[1:])
