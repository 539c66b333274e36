"""Does estimating the gradient of φ's curvature from every 4th token cost quality? The demo's task, three seeds.

    python benchmarks/token_stride.py            # about half an hour on two cores; docs/speed/token_stride.jsonl
    python benchmarks/token_stride.py --report   # docs/speed.md from the stored results

Interrupt at will: a finished run is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "docs"), str(Path(__file__).parent / "phi")]

from plans import SEEDS, Run  # noqa: E402
from scipy.stats import sem  # noqa: E402
from sections import table, with_section  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "speed" / "token_stride.jsonl"
PAGE = DOCS / "speed.md"
STRIDES = (1, 4)
STORED = ("test_accuracy", "test_loss", "train_loss")

Record = dict[str, Any]


def read() -> list[Record]:
    """All finished runs."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def measure() -> None:
    """Do the runs that are missing."""
    from train import train

    done = {(record["token_stride"], record["seed"]) for record in read()}
    for seed in SEEDS:
        for stride in STRIDES:
            if (stride, seed) in done:
                continue
            run = Run("movie-reviews", "lr-lora", 8, 2e-3, {"token_stride": stride}, batch_size=32, seed=seed)
            result = train(run)
            record = {"token_stride": stride, "seed": seed, **{name: result[name] for name in STORED}}
            record["energy99_rank"] = fmean(row["energy99_rank"] for row in result["ranks"])
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


def render(records: list[Record]) -> str:
    """The table."""
    rows = []
    for stride in STRIDES:
        runs = sorted((r for r in records if r["token_stride"] == stride), key=lambda r: r["seed"])
        accuracies = [100 * run["test_accuracy"] for run in runs]
        losses = [run["test_loss"] for run in runs]
        means = [f"{fmean(run[name] for run in runs):.{digits}f}" for name, digits in (("train_loss", 3),)]
        rank = f"{fmean(run['energy99_rank'] for run in runs):.1f}"
        spread = f"{fmean(losses):.4f} ± {sem(losses):.4f}"
        rows.append([str(stride), f"{fmean(accuracies):.2f} ± {sem(accuracies):.2f}", spread, *means, rank])
    return table(["token_stride", "test accuracy, %", "test loss", "training loss", "energy-99 rank"], rows)


def updated(page: str) -> str:
    """The page with the table of the stored results."""
    return with_section(page, "token-stride", render(read()))


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only render docs/speed.md from the stored results")
    if not parser.parse_args().report:
        measure()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
