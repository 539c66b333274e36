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
    steps: Annotated[
        int, typer.Option(min=10, help="Optimizer steps on the topics, of 16 texts; half as many on the reviews.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of head, factors and data order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Train a LoRA of MiniLM on news topics, find the rank that it needs, and train LR-LoRA on movie reviews."""
    with one_clear_error():
        quiet()
        from ..adapters import read_updates
        from ..ranks import rank_report
        from ..run_folder import PICTURE_FILE
        from ..train.demo import SMALL, run_demo
        from ..views.figure import TRAINED_RANK, save_rank_figure
        from ..views.page import write_page
        from ..views.runs import load_runs

        results = run_demo(output, steps=steps, seed=seed, overwrite=overwrite, announce=announce)
        picture, page = output / PICTURE_FILE, output / "report.html"
        if (output / SMALL).exists():
            title = f"Ranks that {DEFAULT_KEEP:.0%} of the gain on news topics need, {steps} steps"
            save_rank_figure(rank_report(read_updates(output / SMALL)), picture, title=title, measure=TRAINED_RANK)
        write_page(load_runs([output]), page, title=f"Demo, {steps} steps")
        for task, title in (
            ("topics", "News topics (8 classes)"),
            ("reviews", "Movie reviews, other films (2 classes)"),
        ):
            table = new_table(title, "method", "parameters", "test loss", "test accuracy", "ms per step")
            for result in results:
                if result.task == task:
                    milliseconds = "" if result.seconds_per_step is None else f"{1e3 * result.seconds_per_step:.0f}"
                    accuracy = f"{result.accuracy:.3f} ± {result.standard_error:.3f}"
                    table.add_row(result.method, f"{result.parameters:,}", f"{result.loss:.3f}", accuracy, milliseconds)
            console.print(table)
        announce(f"Adapters, reports and history: {output}\nPicture of the ranks: {picture}\nPage: {page}")
