"""A user's recipe at a length that people train: two models, TRL, two kinds of data; the study `results.md`.

    python -m lrlora_lab.results run results.jsonl german --seeds 0 1 2
    python -m lrlora_lab.results run results.jsonl german --model gemma
    python -m lrlora_lab.results report results.jsonl

A cell is a model, a kind of data, a seed and a number of steps. Its arms: LoRA r = 16 at the rate of many recipes, at
the rate that is found, that one shrunk after its training, the same cut while it trains, and LoRA at the rank that the
cut printed, at a found rate of its own. Losses are those of texts that chose nothing, of the saved adapter, by PEFT
alone. Arms that the output has already are not trained again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from scipy.stats import bootstrap
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import lrlora
from lrlora.train.embedded import SMOLLM2, checkpoint

from .byte_model import CORPORA
from .inputs import gemma
from .sections import table
from .study import read_rows, study_parser

GIVEN_RATE, RANK, KEEP, CUT_AT = 2e-4, 16, 0.99, 0.6
HELD_OUT, TESTED = 180, 300
SECTION, MAX_SECTIONS = 240, 12  # characters of a text, more than its tokens; of a speech
BATCH, WARM_UP = 4, 10
MODELS: dict[str, Callable[[], Path]] = {"smollm2": partial(checkpoint, SMOLLM2), "gemma": gemma}
LENGTHS = {"german": 64}  # tokens
ARMS = ("given", "found", "shrunk", "cut", "small")
NEIGHBOURS = {"half": 0.5, "twice": 2.0, "fourfold": 4.0}  # of the found rate


def _sections(corpus: str) -> list[dict[str, Any]]:
    """Sections of speeches, each speech in one of the three parts."""
    return [
        {"text": text[start : start + SECTION]}
        for text in sorted(CORPORA[corpus](), key=_digest)
        for start in range(0, min(len(text), MAX_SECTIONS * SECTION) - SECTION, SECTION)
    ]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# Rows of each kind of data, in an order that keeps what belongs together apart from other rows.
DATA: dict[str, Callable[[], list[dict[str, Any]]]] = {"german": partial(_sections, "german")}


def select(rows: Iterable[dict[str, Any]], **cell: object) -> list[dict[str, Any]]:
    """Rows of some cells, by their model, data, seed or steps."""
    return [row for row in rows if all(row[key] == value for key, value in cell.items())]


def run(model_name: str, name: str, seed: int, steps: int, arms: Sequence[str], output: Path) -> None:
    """Rows of a cell: of each arm the rate, parameters, largest rank, printed sentence and losses.

    Args:
        model_name: one of `MODELS`.
        name: of the data.
        seed: of the LoRA and the order of examples.
        steps: of a training.
        arms: of `ARMS` and `NEIGHBOURS`; some need the rate, or the rank, of one before.
        output: file of the rows.

    """
    source, rows = str(MODELS[model_name]()), Dataset.from_list(DATA[name]())
    cell: dict[str, Any] = {"model": model_name, "data": name, "seed": seed, "steps": steps}
    test, held_out = (rows.select(range(*part)) for part in ((0, TESTED), (TESTED, TESTED + HELD_OUT)))
    train = rows.select(range(TESTED + HELD_OUT, len(rows)))
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [_tokens(row, tokenizer, LENGTHS[name]) for row in test]
    known = {row["arm"]: row for row in select(read_rows(output), **cell)}

    def trainer_of(rank: int, rate: float, folder: str) -> SFTTrainer:
        options: dict[str, Any] = {
            "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"},
            "max_steps": steps,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": WARM_UP,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "max_length": LENGTHS[name],
            "loss_type": "nll",
            "gradient_checkpointing": False,
        }
        options |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": True, "disable_tqdm": True}
        return SFTTrainer(
            source,
            args=SFTConfig(folder, seed=SFTConfig.seed + seed, logging_steps=steps // 10, **options),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
        )

    def add(arm: str, folder: str, values: dict[str, Any]) -> None:
        """Add a row, of the adapter that is stored in a folder."""
        model: Any = AutoModelForCausalLM.from_pretrained(source)
        row = cell | {"arm": arm} | values
        if folder:
            stored = load_file(Path(folder) / "adapter_model.safetensors")
            row["parameters"] = sum(tensor.numel() for tensor in stored.values())
            row["largest_rank"] = max(len(tensor) for path, tensor in stored.items() if "lora_A" in path)
            model = PeftModel.from_pretrained(model, folder)
        row["losses"] = losses(model, texts)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        known[arm] = row
        print({**row, "losses": fmean(row["losses"])}, flush=True)

    if "none" not in known:
        add("none", "", {})
    for arm in arms:
        if arm in known:
            continue
        rank = known["cut"]["equal_rank"] if arm == "small" else RANK
        with tempfile.TemporaryDirectory() as folder:
            trainer, values = trainer_of(rank, GIVEN_RATE, folder), dict[str, Any]()
            if arm in ("found", "small"):
                rate = lrlora.find_learning_rate(trainer)
                values["found"] = str(rate)
            elif arm != "given":
                trainer.args.learning_rate = NEIGHBOURS.get(arm, 1.0) * known["found"]["rate"]
            values |= {"rate": trainer.args.learning_rate, "rank": rank}
            if arm == "cut":
                trainer.add_callback(callback := lrlora.FittedRanksCallback(keep=KEEP, at=CUT_AT, trainer=trainer))
            trainer.train()
            if arm == "cut" and callback.shrunk is not None:
                values |= {"equal_rank": callback.shrunk.equal_rank, "sentence": str(callback.shrunk)}
            trainer.save_model(folder)
            add(arm, folder, values)
            if arm == "found" and "shrunk" not in known:
                shrunk = lrlora.shrink(trainer, keep=KEEP)
                values = {"rate": values["rate"], "rank": rank}
                trainer.save_model(folder)
                add("shrunk", folder, values | {"equal_rank": shrunk.equal_rank, "sentence": str(shrunk)})


def _tokens(row: dict[str, Any], tokenizer: Any, length: int) -> tuple[list[int], int]:
    """Tokens of an example, and the number of those that are given."""
    if "text" in row:
        return tokenizer(row["text"])["input_ids"][:length], 1
    whole, given = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=messages is row["prompt"], return_dict=False)
        for messages in (row["prompt"] + row["completion"], row["prompt"])
    )
    return whole[:length], len(given)


@torch.no_grad()
def losses(model: Any, texts: Sequence[tuple[list[int], int]]) -> list[float]:
    """Mean loss of each text, in nats per token after those that are given."""
    model.eval()
    means = []
    for tokens, given in texts:
        ids = torch.tensor([tokens])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        means.append(round(-scores[given - 1 :].mean().item(), 4))
    return means


NAMES = {
    "none": "no adapter",
    "given": "LoRA r = 16 at 2e-4",
    "found": "LoRA r = 16 at the rate that was found",
    "shrunk": "the same, shrunk at its end",
    "cut": "the same, cut while training",
    "restarted": "the same, cut while training, AdamW begins anew",  # at commit aeaf0105
    "small": "LoRA at the rank that the cut printed, at its own found rate",
    "half": "LoRA r = 16 at half of the found rate",
    "twice": "LoRA r = 16 at twice the found rate",
    "fourfold": "LoRA r = 16 at four times the found rate",
}


def results_table(rows: Sequence[dict[str, Any]], model: str, name: str, steps: int) -> str:
    """Table of a kind of data and a model: per arm its rates, loss, share of the gain of `found`, and size.

    The share has the 95 % interval of a paired bootstrap over the texts, of their means over the seeds.
    """
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for row in select(rows, model=model, data=name, steps=steps):
        arms.setdefault(row["arm"], {})[row["seed"]] = row

    def mean_losses(arm: str, seeds: Iterable[int]) -> NDArray[np.float64]:
        return np.mean([arms[arm][seed]["losses"] for seed in seeds], axis=0)

    lines = []
    for arm, title in NAMES.items():
        runs = arms.get(arm, {})
        if not (seeds := sorted(runs.keys() & arms.get("found", {}).keys())):
            continue
        none, losses, whole = (mean_losses(each, seeds) for each in ("none", arm, "found"))
        cells = [title, str(len(seeds)), f"{losses.mean():.4f}"]
        if arm != "none":
            interval = bootstrap(
                (none, losses, whole), _share, paired=True, method="percentile", rng=0
            ).confidence_interval
            share = f"{_share(none, losses, whole):.1%}" + (
                "" if arm == "found" else f" ({interval.low:.1%} to {interval.high:.1%})"
            )
            cells += [", ".join(f"{rate:g}" for rate in sorted({runs[seed]["rate"] for seed in seeds})), share]
            cells += [f"{fmean(runs[seed]['parameters'] for seed in seeds):,.0f}"]
            cells += [", ".join(str(rank) for rank in sorted({runs[seed]["largest_rank"] for seed in seeds}))]
        lines.append(cells + [""] * (7 - len(cells)))
    head = ["seeds", "loss", "rate", "share of the gain", "parameters", "largest rank"]
    return table([f"{model}, {name}, {steps} steps", *head], lines)


def lengths(rows: Sequence[dict[str, Any]], name: str, seed: int = 0) -> dict[int, dict[str, tuple[float, float]]]:
    """Number of steps → arm → its share of the gain of `found`, and of its parameters, in percent."""
    arms: dict[int, dict[str, dict[str, Any]]] = {}
    for row in select(rows, model="smollm2", data=name, seed=seed):
        arms.setdefault(row["steps"], {})[row["arm"]] = row
    shares = {}
    for steps, cell in sorted(arms.items()):
        none, whole = (np.array(cell[arm]["losses"]) for arm in ("none", "found"))
        shares[steps] = {
            arm: (
                100 * float(_share(none, np.array(row["losses"]), whole)),
                100 * row["parameters"] / cell["found"]["parameters"],
            )
            for arm, row in cell.items()
            if arm in LENGTH_ARMS
        }
    return shares


LENGTH_ARMS = {
    "given": ("at 2e-4", "C7x-"),
    "shrunk": ("shrunk at its end", "C1^-"),
    "cut": ("cut while training", "C0o-"),
    "restarted": ("cut, AdamW begins anew", "C3s:"),
}


def lengths_figure(rows: Sequence[dict[str, Any]], name: str) -> Figure:
    """Share of the gain of the found rate, and of its parameters, by the length of the training."""
    shares = lengths(rows, name)
    picture = Figure(figsize=(7.5, 3.2), layout="constrained")
    for column, (axes, label) in enumerate(
        zip(picture.subplots(1, 2), ("gain of the found rate, %", "parameters of r = 16, %"), strict=True)
    ):
        for arm, (title, style) in LENGTH_ARMS.items():
            points = [(steps, cell[arm][column]) for steps, cell in shares.items() if arm in cell]
            axes.plot(*zip(*points, strict=True), style, label=title if column == 0 else None, markersize=6)
        axes.set_xscale("log")
        axes.set_xticks([*shares], [str(steps) for steps in shares])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="steps of the training", ylabel=label, ylim=(0 if column else None, 104))
    picture.legend(loc="outside upper center", ncols=4, fontsize=8)
    return picture


def _share(none: Any, arm: Any, whole: Any, axis: int = -1) -> Any:
    """Share of the gain of `whole` that an arm has."""
    return (none.mean(axis) - arm.mean(axis)) / (none.mean(axis) - whole.mean(axis))


def main(arguments: list[str]) -> None:
    """Run cells, or report."""
    parser, run_parser = study_parser("results")
    run_parser.add_argument("data", choices=[*DATA], nargs="+")
    run_parser.add_argument("--model", choices=[*MODELS], default="smollm2")
    run_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    run_parser.add_argument("--steps", type=int, default=300)
    run_parser.add_argument("--arms", choices=[*ARMS, *NEIGHBOURS], nargs="+", default=[*ARMS])
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        rows = read_rows(settings.file)
        for model, name, steps in sorted({(row["model"], row["data"], row["steps"]) for row in rows}):
            print(results_table(rows, model, name, steps), end="\n\n")
            for row in select(rows, model=model, data=name, steps=steps):
                if "sentence" in row:
                    print(f"seed {row['seed']}, {row['arm']}: {row['sentence']}", end="\n\n")
        return
    for seed in settings.seeds:
        for name in settings.data:
            run(settings.model, name, seed, settings.steps, settings.arms, settings.file)


if __name__ == "__main__":
    main(sys.argv[1:])
