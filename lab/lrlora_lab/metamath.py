"""MetaMathQA as in PEFT's method comparison: its script, data, prompt, training loop and scoring.

    python -m lrlora_lab.metamath CHECKOUT_OF_PEFT lora/lrlora-shrunk

Writes the experiment's files, runs `method_comparison/MetaMathQA/run.py` there, and leaves its result in that folder's
`temporary_results`, in PEFT's format. LoRA and LR-LoRA run as they are. A cut needs a call that the script
lacks: `FittedRanks` is created after its optimizer, and `shrink` called before its test, on training rows that it does
not reach.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

import lrlora
from lrlora.checks import require_known

FOLDER = Path("method_comparison") / "MetaMathQA"
R, ALPHA = 32, 64  # of PEFT's own LoRA entry
_BATCH, _GRADIENT_BATCHES, _HELD_OUT = 4, 32, 75  # rows, and batches of them


@dataclass(frozen=True)
class Entry:
    """An experiment.

    Attributes:
        config: of the adapter.
        size, keep: how `FittedRanks` or `shrink` cuts it.

    """

    config: PeftConfig
    size: str | None = None
    keep: float | None = None


def _lora() -> LoraConfig:
    return LoraConfig(r=R, lora_alpha=ALPHA, task_type="CAUSAL_LM")


ENTRIES = {
    "lora/lrlora-reference": Entry(_lora()),
    "lora/lrlora-shrunk": Entry(_lora(), keep=0.99),
    "lora/lrlora-quarter": Entry(_lora(), size="r8"),
    "lrlora/rank32": Entry(lrlora.LrLoraConfig(r=R, lora_alpha=ALPHA, task_type="CAUSAL_LM")),
}


def write_experiment(peft: Path, name: str) -> Path:
    """Write the files of an experiment into a checkout of PEFT; returns its folder, relative to `FOLDER`."""
    require_known("experiment", name, ENTRIES)
    folder = Path("experiments") / name
    ENTRIES[name].config.save_pretrained(str(peft / FOLDER / folder))
    return folder


def _batches(rows: Any, tokenizer: Any, device: Any) -> Iterator[Any]:
    """Batches with the script's labels: all tokens and the first padding one, which ends the text."""
    for start in range(0, len(rows), _BATCH):
        ids = rows[start : start + _BATCH]["input_ids"]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
        labels = batch["input_ids"].clone()
        for row, tokens in enumerate(ids):
            labels[row, len(tokens) + 1 :] = -100
        yield {**batch, "labels": labels}


def with_cut(script: Any, entry: Entry) -> None:
    """Let PEFT's script, a module, cut the adapter that it trains."""
    load, make_optimizer, evaluate = (
        getattr(script, name) for name in ("get_train_valid_test_datasets", "get_optimizer_and_scheduler", "evaluate")
    )
    loaded: dict[str, Any] = {}

    def remembered(**options: Any) -> Any:
        loaded["train"], _, loaded["test"] = splits = load(**options)
        return splits

    def with_ranks(model: Any, *, max_steps: int, **options: Any) -> Any:
        pair = make_optimizer(model, max_steps=max_steps, **options)
        if entry.size is not None:
            lrlora.FittedRanks(model, pair[0], steps=max_steps, size=entry.size)
        return pair

    def after_shrinking(*, model: Any, tokenizer: Any, ds: Any, **options: Any) -> Any:
        if entry.keep is not None and ds is loaded["test"]:
            # The last rows, which the script does not reach.
            rows, held_out = loaded["train"], _BATCH * _HELD_OUT
            for_moments = range(len(rows) - held_out - _BATCH * _GRADIENT_BATCHES, len(rows) - held_out)
            unseen = range(len(rows) - held_out, len(rows))
            training, others = (_batches(rows.select(part), tokenizer, model.device) for part in (for_moments, unseen))
            print(lrlora.shrink(model, training, others, keep=entry.keep), file=sys.stderr, flush=True)
        return evaluate(model=model, tokenizer=tokenizer, ds=ds, **options)

    script.get_train_valid_test_datasets = remembered
    script.get_optimizer_and_scheduler = with_ranks
    script.evaluate = after_shrinking


def main(peft: Path, name: str) -> None:
    """Run one experiment in a checkout of PEFT."""
    folder = write_experiment(peft, name)
    os.chdir(peft / FOLDER)
    sys.path.insert(0, os.getcwd())
    script: Any = importlib.import_module("run")
    script.print_verbose = lambda *values, **_: print(*values, file=sys.stderr)
    entry = ENTRIES[name]
    if entry.size is not None or entry.keep is not None:
        with_cut(script, entry)
    script.main(
        path_experiment=str(folder),
        experiment_name=script.validate_experiment_path(str(folder)),
        clean=True,
        bucket_name=None,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
