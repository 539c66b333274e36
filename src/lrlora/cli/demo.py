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
    """Train a LoRA of MiniLM on news topics at a usual rate, find its rate, and the rank that it needs."""
    with one_clear_error():
        quiet()
        from ..adapters import read_updates
        from ..ranks import rank_report
        from ..run_folder import PICTURE_FILE
        from ..train.demo import SHRUNK, run_demo
        from ..views.figure import TRAINED_RANK, save_rank_figure
        from ..views.page import write_page
        from ..views.runs import load_runs

        results = run_demo(output, steps=steps, seed=seed, overwrite=overwrite, announce=announce)
        picture, page = output / PICTURE_FILE, output / "report.html"
        if (output / SHRUNK).exists():
            title = f"Ranks that {DEFAULT_KEEP:.0%} of the gain on news topics need, {steps} steps"
            save_rank_figure(rank_report(read_updates(output / SHRUNK)), picture, title=title, measure=TRAINED_RANK)
        write_page(load_runs([output]), page, title=f"Demo, {steps} steps")
        table = new_table("News topics (8 classes)", "method", "rate", "parameters", "test loss", "test accuracy")
        for result in results:
            accuracy = f"{result.accuracy:.3f} ± {result.standard_error:.3f}"
            rate, parameters = f"{result.learning_rate:g}", f"{result.parameters:,}"
            table.add_row(result.method, rate, parameters, f"{result.loss:.3f}", accuracy)
        console.print(table)
        announce(f"Adapters, reports and history: {output}\nPicture of the ranks: {picture}\nPage: {page}")
