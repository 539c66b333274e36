"""The command line: parses, calls, prints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__

app = typer.Typer(
    help="Learnable-Rank LoRA: fine-tune transformers without guessing a rank.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Piped into a file there is no terminal to fit.
console = Console() if Console().is_terminal else Console(width=120)


@contextmanager
def _one_clear_error() -> Iterator[None]:
    """Print what the user can act on as one message, without a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        remedy = (
            " Install what this command needs: pip install 'lrlora[demo]'" if isinstance(error, ImportError) else ""
        )
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(f'{error}{remedy}')}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. Run the same command again to resume.", highlight=False)
        raise typer.Exit(130) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"lrlora {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for adapters, reports and the picture.")] = Path("lrlora-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each method.")] = 300,
    r: Annotated[int, typer.Option("--rank", min=1, help="Rank r of BA.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of head, factors and data order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Fine-tune MiniLM on movie reviews with LR-LoRA and with LoRA, and show the ranks that were learned."""
    with _one_clear_error():
        import transformers

        from .report.figure import save_rank_figure
        from .report.table import rank_table
        from .training.demo import DemoSettings, load_reports, run_demo

        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        settings = DemoSettings(steps=steps, r=r, learning_rate=learning_rate, seed=seed)
        results = run_demo(output, settings, overwrite=overwrite, announce=console.print)
        reports = load_reports(output)
        picture = output / "ranks.png"
        save_rank_figure(reports["lr-lora"], picture, title=f"LR-LoRA on movie reviews, {steps} steps")
        for method, report in reports.items():
            console.print(rank_table(report, f"Learned ranks, {method}"))
        table = Table(title="Movie-review sentiment, films held out", title_justify="left")
        for heading in ("method", "accuracy", "± s.e.", "seconds", "trainable", "e-99 > r"):
            table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
        for method, result in results.items():
            rows = reports[method].rows
            table.add_row(
                method,
                f"{result.accuracy:.4f}",
                f"{result.standard_error:.4f}",
                f"{result.seconds:.0f}",
                f"{result.trainable_parameters:,}",
                f"{sum(row.energy99_rank > row.r for row in rows)} of {len(rows)}",
            )
        console.print(table)
        console.print(escape(f"Adapters, reports and history: {output}\nPicture: {picture}"), highlight=False)


@app.command()
def ranks(
    adapter: Annotated[str, typer.Argument(help="Folder or hub name of a saved LR-LoRA or LoRA adapter.")],
    with_base: Annotated[bool, typer.Option("--with-base", help="Load the base model too, for ‖ΔW‖/‖W0‖.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the report here as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows here as CSV.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw them here (.png, .svg, .pdf).")] = None,
) -> None:
    """Print the learned ranks of a saved adapter. Its base model is not needed."""
    with _one_clear_error():
        for path in (json, csv, picture):
            if path and not path.parent.is_dir():
                raise FileNotFoundError(f"The folder {path.parent} for {path.name} does not exist.")
        if picture:
            from .report.figure import check_picture, save_rank_figure

            check_picture(picture)
        from .rank import rank_report
        from .report.table import rank_table
        from .tuner.skeleton import load_on_skeleton

        report = rank_report(load_on_skeleton(adapter, with_base_weights=with_base), progressbar=True)
        console.print(rank_table(report, escape(f"Learned ranks, {adapter}")))
        if json:
            report.to_json(json)
        if csv:
            report.to_csv(csv)
        if picture:
            save_rank_figure(report, picture)
