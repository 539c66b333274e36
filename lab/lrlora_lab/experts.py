"""A LoRA on the experts of a mixture, cut by energy, beside LoRAs trained at the rank: the study `experts.md`.

    python -m lrlora_lab.experts run experts.jsonl --seeds 0 1 2
    python -m lrlora_lab.experts report experts.jsonl

The mixture is a byte model pretrained on English; the LoRA learns German and Spanish. Rows that the output has already
are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from lrlora.adapters import factorize, read_updates, save_as_lora

from .byte_model import base_model, load_corpus, mean_loss, sample_batch
from .capacity import CLIP_NORM
from .front import read_rows
from .sections import table

CORPORA = ("german", "spanish")
WIDE, SMALL = 8, (4, 2, 1)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)  # of the first seed; the best of a rank for the others
SCALE, STEPS, BATCH, WINDOWS = 4.0, 400, 8, 256
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def train(rank: int, rate: float, seed: int) -> Any:
    """A LoRA on the experts, after its training."""
    data, generator = [load_corpus(name).train for name in CORPORA], torch.Generator().manual_seed(seed)
    base = base_model("mixtral")
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=round(SCALE * rank), target_modules=[], target_parameters=PARAMETERS)
    model: Any = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    for _ in range(STEPS):
        batch = torch.cat([sample_batch(corpus, generator, BATCH // 2) for corpus in data])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def test(model: Any) -> float:
    """Mean test loss of both languages, in nats per byte."""
    return fmean(mean_loss(model, load_corpus(name).test, WINDOWS) for name in CORPORA)


def cut(folder: str, *, max_rank: int | None = None, budget: int | None = None) -> dict[str, Any]:
    """Test loss and parameters of an export by energy, as PEFT loads it."""
    updates = read_updates(folder)
    factors = factorize(updates, max_rank=max_rank, budget=budget)
    with tempfile.TemporaryDirectory() as output:
        save_as_lora(factors, updates, f"{output}/cut")
        model = PeftModel.from_pretrained(base_model("mixtral"), f"{output}/cut").eval()
        parameters = sum(pair.parameters for pair in factors)
        return {"loss": round(test(model), 5), "parameters": parameters, "ranks": [pair.rank for pair in factors]}


def run(seed: int, output: Path) -> None:
    """Rows of a seed."""
    rows = read_rows(output)

    def add(arm: str, rank: int, rate: float, compute: Callable[[], dict[str, Any]]) -> None:
        key = {"seed": seed, "arm": arm, "rank": rank, "rate": rate}
        if not any(key.items() <= row.items() for row in rows):
            rows.append(key | compute())
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)

    def whole(rank: int, rate: float, folder: str) -> dict[str, Any]:
        model = train(rank, rate, seed)
        # The base model's configuration names the experts.
        model.get_base_model().config.save_pretrained(f"{folder}/base")
        model.peft_config["default"].base_model_name_or_path = f"{folder}/base"
        model.save_pretrained(folder)
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return {"loss": round(test(model), 5), "parameters": parameters}

    add("none", 0, 0.0, lambda: {"loss": round(test(base_model("mixtral").eval()), 5), "parameters": 0})
    for rank in (WIDE, *SMALL):
        tried = RATES[:-1] if rank == WIDE else RATES[3:]  # r = 8 is best at 8e-3
        for rate in tried if seed == 0 else [best_rate(rows, rank)]:
            with tempfile.TemporaryDirectory() as folder:
                add("LoRA", rank, rate, partial(whole, rank, rate, folder))
    rate = best_rate(rows, WIDE)
    with tempfile.TemporaryDirectory() as folder:
        row = whole(WIDE, rate, folder)
        for rank in SMALL:
            size = rank * row["parameters"] // WIDE
            add("energy, equal ranks", rank, rate, partial(cut, folder, max_rank=rank))
            add("energy, by size", rank, rate, partial(cut, folder, budget=size))


def best_rate(rows: Sequence[dict[str, Any]], rank: int) -> float:
    """The rate of the least loss of a LoRA of a rank, of the first seed."""
    losses = {row["rate"]: row["loss"] for row in rows if (row["seed"], row["arm"], row["rank"]) == (0, "LoRA", rank)}
    return min(losses, key=lambda rate: losses[rate])


def shares(rows: Sequence[dict[str, Any]]) -> str:
    """Table: share of the gain of LoRA r = 8 by size, over seeds."""
    losses = {(row["seed"], row["arm"], row["rank"], row["rate"]): row["loss"] for row in rows}
    seeds = sorted({seed for seed, *_ in losses})
    wide = best_rate(rows, WIDE)
    lines = []
    for arm in ("energy, equal ranks", "energy, by size", "LoRA"):
        cells = []
        for rank in SMALL:
            rate = best_rate(rows, rank) if arm == "LoRA" else wide
            kept = [
                100 * (losses[seed, "none", 0, 0.0] - loss) / (losses[seed, "none", 0, 0.0] - reference)
                for seed in seeds
                if (loss := losses.get((seed, arm, rank, rate)))
                and (reference := losses.get((seed, "LoRA", WIDE, wide)))
            ]
            spread = f" ± {stdev(kept):.1f}" if len(kept) > 1 else ""
            cells.append(f"{fmean(kept):.1f}{spread}" if kept else "")
        lines.append([arm, *cells])
    return table(["share of the gain of r = 8, %", *(f"size of r = {rank}" for rank in SMALL)], lines)


def rates(rows: Sequence[dict[str, Any]]) -> str:
    """Table: test loss by rank and rate, of the first seed."""
    losses = {(row["rank"], row["rate"]): row["loss"] for row in rows if (row["seed"], row["arm"]) == (0, "LoRA")}
    lines = [
        [str(rank), *(f"{losses[rank, rate]:.3f}" if (rank, rate) in losses else "" for rate in RATES)]
        for rank in (WIDE, *SMALL)
    ]
    return table(["r", *(f"{rate:g}" for rate in RATES)], lines)


def main(arguments: list[str]) -> None:
    """Run seeds, or report."""
    parser = argparse.ArgumentParser(prog="python -m lrlora_lab.experts")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        commands.add_parser(name).add_argument("file", type=Path)
    commands.choices["run"].add_argument("--seeds", type=int, nargs="+", default=[0])
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        rows = read_rows(settings.file)
        print(shares(rows), rates(rows), sep="\n")
        return
    for seed in settings.seeds:
        run(seed, settings.file)


if __name__ == "__main__":
    main(sys.argv[1:])
