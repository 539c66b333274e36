"""Command demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checks import DEFAULT_KEEP
from .common import announce, app, console, new_table, one_clear_error, quiet


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for adapters, reports and the picture.")] = Path("lrlora-demo"),
    steps: Annotated[int, typer.Option(min=20, help="Optimizer steps of a training, of 16 texts.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of head, factors and data order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Train LoRA and LR-LoRA on news topics, find the rate, cut the LoRA, and draw the ranks of all three."""
    with one_clear_error():
        quiet()
        from ..adapters import read_updates
        from ..ranks import rank_report
        from ..run_folder import PICTURE_FILE
        from ..train.demo import FOUND, LEARNED, SHRUNK, run_demo
        from ..views.figure import OPENING_MEASURE, TRAINED_RANK, save_rank_comparison
        from ..views.page import write_page
        from ..views.runs import load_runs

        results = run_demo(output, steps=steps, seed=seed, overwrite=overwrite, announce=announce)
        picture, page = output / PICTURE_FILE, output / "report.html"
        panels = {
            "LoRA, r = 16: stable rank of ΔW": (FOUND, OPENING_MEASURE),
            "LR-LoRA, r = 16: stable rank of ΔW": (LEARNED, OPENING_MEASURE),
            f"LoRA cut to {DEFAULT_KEEP:.0%} of its gain: rank": (SHRUNK, TRAINED_RANK),
        }
        reports = {
            title: (rank_report(read_updates(output / folder)), measure)
            for title, (folder, measure) in panels.items()
            if (output / folder).exists()
        }
        save_rank_comparison(reports, picture)
        write_page(load_runs([output]), page, title=f"Demo, {steps} steps")
        table = new_table("News topics (8 classes)", "method", "rate", "parameters", "test loss", "test accuracy")
        for result in results:
            accuracy = f"{result.accuracy:.3f} ± {result.standard_error:.3f}"
            rate, parameters = f"{result.learning_rate:g}", f"{result.parameters:,}"
            table.add_row(result.method, rate, parameters, f"{result.loss:.3f}", accuracy)
        console.print(table)
        announce(f"Adapters, reports and history: {output}\nPicture of the ranks: {picture}\nPage: {page}")
