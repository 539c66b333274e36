"""Command compare."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..train.settings import TrainConfig
from .common import announce, app, console, new_table, one_clear_error, quiet
from .options import REQUIRED, settings_as_options, settings_of

if TYPE_CHECKING:
    from ..train.comparison import Outcome

_OUTPUT = "lrlora-compare"
# Settings that the comparison chooses.
_CHOSEN = ("method", "size", "learning_rate", "find_rate", "seed", "keep", "start_from")


@app.command()
@partial(settings_as_options, without=(*_CHOSEN, "output"))
def compare(
    config: Annotated[Path | None, typer.Argument(help="YAML file with these settings; options override it.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods of lrlora train, at the rank --rank; learned ranks have the size of LoRA of that rank. The "
            "others are compared with the first; of one alone, the rate is tuned."
        ),
    ] = "lora,learned",
    rates: Annotated[
        str | None,
        typer.Option(
            help="Learning rates, separated by commas; one alone is not tuned; default: 1, 2 and 4 times the task's, "
            "and beyond."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs of each method at its best rate, which seed 0 finds.")] = 3,
    test_data: Annotated[
        str | None, typer.Option(help="Data for the scores, such as a file; default: the split test of the data.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help=f"Folder for the runs; default: {_OUTPUT}.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan of the first run, and the time of all; train nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="In a terminal, start without asking.")] = False,
    **settings: Any,
) -> None:
    """Compare methods on your data, at the same rank: learning rates tuned, several seeds. Run it again to resume."""
    with one_clear_error():
        run_settings = settings_of(config, {**settings, "output": output and str(output)})
        defaults = {field.name: field.default for field in fields(TrainConfig)}
        run_settings = {
            name: value for name, value in run_settings.items() if name in REQUIRED or value != defaults.get(name)
        }
        run_settings.setdefault("output", _OUTPUT)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("compare trains in one process. Start it without a launcher.")
        if conflicts := [name for name in _CHOSEN if name in run_settings]:
            raise ValueError(
                f"{conflicts[0]} is chosen by the comparison. Remove it, or pass --methods, --rates or --seeds."
            )
        quiet()
        from ..train.comparison import Comparison, score_data
        from ..train.comparison import compare as run
        from ..train.run import show_plan

        comparison = Comparison(run_settings, tuple(_words(methods)), _numbers(rates), seeds, test_data)
        extension = "" if comparison.rates else ", or more if a best rate is at an edge"
        announce(f"{comparison.runs} runs of lrlora train in {comparison.output}{extension}.")
        if comparison.caution:
            announce(comparison.caution)
        is_begun = comparison.output.is_dir() and any(comparison.output.iterdir())
        asks = in_terminal() and not yes and not is_begun
        if dry_run or asks:
            announce(f"Scores: {comparison.seeds} seeds on {score_data(comparison).shown}; differences paired by seed.")
            method = comparison.methods[0]
            first = comparison.run(method, comparison.first_rates(method)[0], 0)
            show_plan(first, overwrite=comparison.output.exists(), runs=comparison.runs, announce=announce)
        if dry_run or (asks and not typer.confirm("Start?", default=True)):
            return
        _print(run(comparison, announce=announce))


def in_terminal() -> bool:
    """Whether someone can answer."""
    return sys.stdin.isatty()


def _print(outcome: Outcome) -> None:
    table = new_table(
        f"{outcome.metric} on {outcome.data}, {outcome.examples:,} examples",
        *("method", "rate", "trained parameters", "mean ± standard deviation", "difference (95 %)"),
    )
    for score in outcome.scores:
        spread = f" ± {stdev(score.values):.3f}" if len(score.values) > 1 else ""
        difference, half = outcome.difference(score)
        interval = f" ± {half:.3f}" if math.isfinite(half) else ""
        shown = "" if score is outcome.scores[0] else f"{difference:+.3f}{interval}"
        table.add_row(
            score.method, f"{score.rate:g}", f"{score.trainable:,}", f"{fmean(score.values):.3f}{spread}", shown
        )
    console.print(table)
    for line in outcome.answers():
        announce(line)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text or ""))
    except ValueError:
        raise ValueError(f"--rates must be numbers separated by commas, got {text!r}.") from None
