"""Command demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .common import announce, app, console, one_clear_error, quiet


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for adapters, reports and the picture.")] = Path("lrlora-demo"),
    steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps on the reviews; there are eight times as many on the labels.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of head, factors, labels and data order.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Train MiniLM on movie reviews and on random labels with LR-LoRA and LoRA, and show the learned ranks."""
    with one_clear_error():
        quiet()
        from ..run_folder import PICTURE_FILE
        from ..train.run import Interrupted, rank_report_of
        from ..views.figure import save_rank_figure
        from ..views.page import write_page
        from ..views.runs import load_runs
        from ..views.tables import rank_table

        from ..train.demo import DemoSettings, run_demo

        settings = DemoSettings(steps=steps, seed=seed)
        try:
            results = run_demo(output, settings, overwrite=overwrite, announce=announce)
        except Interrupted:
            raise KeyboardInterrupt from None
        report = rank_report_of(output / "lr-lora")
        assert report is not None  # the method has ranks
        picture, page = output / PICTURE_FILE, output / "report.html"
        save_rank_figure(report, picture, title=f"LR-LoRA on movie reviews, {steps} steps")
        write_page(load_runs([output]), page, title=f"Movie reviews, {steps} steps")
        console.print(rank_table(report, "Ranks that LR-LoRA learned on the reviews", width=console.width))
        for task, title, heading in (
            ("reviews", "Movie reviews", "accuracy, held-out films"),
            ("labels", "Random labels, to be memorized", "loss, nats"),
        ):
            table = Table(title=title, title_justify="left")
            for name in ("method", "trainable", heading, "ms per step"):
                table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
            for result in results:
                if result.task == task:
                    error = "" if result.standard_error is None else f" ± {result.standard_error:.3f}"
                    took = "" if result.seconds_per_step is None else f"{1e3 * result.seconds_per_step:.0f}"
                    parameters = f"{result.trainable_parameters:,}"
                    table.add_row(result.method, parameters, f"{result.value:.3f}{error}", took)
            console.print(table)
        announce(f"Adapters, reports and history: {output}\nPicture: {picture}\nPage: {page}")
