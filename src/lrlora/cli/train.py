"""Commands for training and inference: train, evaluate, predict."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..checks import DEFAULT_KEEP
from ..files import require_no_input, require_writable, write_json
from ..run_folder import (
    CHOSE,
    METRICS_FILE,
    RUN_FILE,
    guess_in,
    require_new_run,
    resume_hint,
    shown_metrics,
    which_checkpoint,
)
from ..shrunk import read_shrunk
from ..train.settings import TrainConfig, read_run
from ..train.yaml import parse_assignments, parse_pairs
from .common import ASSISTANT_ONLY_LOSS, announce, app, console, note, one_clear_error, quiet
from .options import settings_as_options, settings_of


@app.command()
@settings_as_options
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with these settings; options override it.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the interrupted run in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and an example as the model reads it; train nothing.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="After training, measure the smallest LoRA by loss.")
    ] = True,
    **settings: Any,
) -> None:
    """Fine-tune your model on your data; save adapter, metrics and ranks."""
    with one_clear_error():
        if resume is None:
            told = settings_of(config, settings)
            output = Path(str(told.get("output", TrainConfig.output)))
            require_new_run(output, overwrite=overwrite)  # before slow imports
            run = TrainConfig.from_dict(told)
            if overwrite:
                require_no_input(run.output, config=config)
        elif config or any(value is not None for value in settings.values()):
            raise ValueError(
                "--resume uses the settings of the run; pass no others. To train a finished run further: lrlora "
                f"train --start-from {resume} --output NEW, with changed settings."
            )
        else:
            run, _ = read_run(resume)
        if option := run.filled_by:
            if not measure:
                raise ValueError(f"{option} measures the loss, but --no-measure does not. Pass only one of them.")
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(
                    f"{option} fills lora/ after training, in one process. Remove it, and export the finished run: "
                    f"lrlora export {run.output} {option} …"
                )
        quiet()
        from ..train.run import show_plan

        if dry_run:
            show_plan(run, resume=resume is not None, overwrite=overwrite, announce=announce)
        else:
            _train(run, resume=resume is not None, overwrite=overwrite, measure=measure)


def _train(run: TrainConfig, *, resume: bool, overwrite: bool, measure: bool) -> None:
    from peft import PeftConfig

    from ..adapters.servers import served
    from ..train.run import rank_report_of, train
    from ..train.undertraining import is_like_guessing
    from ..views.tables import rank_table

    started = time.time()
    try:
        result = train(run, resume=resume, overwrite=overwrite, announce=announce)
    except KeyboardInterrupt as stop:
        folder = Path(run.output)
        # --overwrite may not have replaced an older run yet.
        own = [p.name for p in folder.glob("*.json") if resume or p.stat().st_mtime >= started]
        hint = resume_hint(folder) if RUN_FILE in own else "Nothing was written."
        if METRICS_FILE in own:
            hint = f"The run in {folder} is finished."
        note(str(stop) or f"Interrupted. {hint}")
        raise typer.Exit(130) from None
    if not result.is_first:
        return
    _print_metrics(result.metrics, f"Validation, {which_checkpoint(asdict(run))}")
    output = result.output
    announce(f"Results saved to {output}")
    has_learned = not is_like_guessing(result.metrics)
    del result  # the trained model: the next step reloads it
    if has_learned or run.filled_by is not None:
        _measure_smallest(run, measure)
    report = rank_report_of(output)
    if report is not None:
        ranks = [(row.r or 0, row.m + row.n) for row in report.rows]
        if run.learns_ranks and (line := served(ranks, PeftConfig.from_pretrained(str(output)))):
            announce(line)
        console.print(rank_table(report, "Ranks of ΔW", width=console.width))
        announce(f"To view the ranks: lrlora report {output}, or by module, lrlora ranks {output} --all")


def _measure_smallest(run: TrainConfig, is_wanted: bool) -> None:
    """Print the smallest size of a finished run's LoRA."""
    from ..train.exporting import fill_smallest
    from ..train.methods import METHODS

    if run.learns_ranks and (run.size is not None or read_shrunk(Path(run.output)) is not None):
        announce("The adapter is a plain LoRA, which PEFT loads without lrlora.")
        return
    is_asked_for = run.filled_by is not None
    is_measured = is_asked_for or (is_wanted and METHODS[run.method].has_ranks)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not is_measured:
        to_find = f"lrlora export {run.output} --keep {DEFAULT_KEEP} --output {run.output}-small"
        announce(f"To find the smallest LoRA: {to_find}")
        return
    try:
        fill_smallest(run, announce)
    except KeyboardInterrupt:
        announce("Interrupted. The run is finished, but its smallest LoRA was not measured.")
    except Exception as error:  # unsupported task or model
        if is_asked_for:
            raise ValueError(f"The run is finished, but lora/ could not be written as requested: {error}") from error
        announce(f"The smallest LoRA was not measured: {error}")


_SPLIT = Annotated[str | None, typer.Option(help="Split of the data; default: test, or validation if there is none.")]
_COLUMNS = Annotated[
    list[str] | None, typer.Option("--columns", "--column", help="ROLE=NAME; default: as in training.")
]
_DELIMITER = Annotated[str | None, typer.Option(help="Delimiter of a CSV file; default: as in training, or a comma.")]
_ENCODING = Annotated[str | None, typer.Option(help="Encoding of a CSV file; default: as in training, or utf-8.")]
_GENERATION = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=VALUE, field of transformers' GenerationConfig, such as max_new_tokens=200 or temperature=0.7; "
        "default: greedy, at most as long as a training example."
    ),
]
_SKIP_EMPTY = Annotated[
    bool | None, typer.Option("--skip-empty", help="Skip examples with an empty cell, and report their number.")
]


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Output folder of `lrlora train`, or folder of an adapter.")],
    data: Annotated[str, typer.Option(help="Hub name, file, folder or embedded:NAME.")],
    split: _SPLIT = None,
    columns: _COLUMNS = None,
    delimiter: _DELIMITER = None,
    encoding: _ENCODING = None,
    skip_empty: _SKIP_EMPTY = None,
    assistant_only_loss: ASSISTANT_ONLY_LOSS = False,
    metrics_file: Annotated[Path | None, typer.Option("--json", help="File to write the metrics to, as JSON.")] = None,
) -> None:
    """Evaluate a finished run, or an adapter that names its base model and task, on data."""
    with one_clear_error():
        if metrics_file is not None:
            require_writable(metrics_file)
        reading = _reading(columns, delimiter, encoding, skip_empty)
        quiet()
        from ..train.inference import evaluate
        from ..views.tables import class_table

        reading["assistant_only_loss"] = assistant_only_loss
        metrics = evaluate(run, data, split=split, announce=announce, **reading)
        which = ", which chose the checkpoint" if metrics.get(CHOSE) else ""
        _print_metrics(metrics, f"{run} on {data}, {metrics['examples']:,} examples{which}")
        by_class = metrics.by_class
        if by_class is not None:
            console.print(class_table(by_class))
        if metrics_file:
            write_json(metrics_file, metrics | (asdict(by_class) if by_class else {}))


def _reading(
    columns: list[str] | None, delimiter: str | None, encoding: str | None, skip_empty: bool | None
) -> dict[str, Any]:
    roles = parse_pairs(columns, "--columns") if columns else None
    return {"columns": roles, "delimiter": delimiter, "encoding": encoding, "skip_empty": skip_empty}


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Output folder of `lrlora train`, or folder of an adapter.")],
    data: Annotated[str | None, typer.Option(help="Hub name, file, folder or embedded:NAME.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write: .jsonl, .csv or .tsv; default: print lines of JSON.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="One text, in place of data: its prediction as JSON, or its answer.")
    ] = None,
    split: _SPLIT = None,
    columns: _COLUMNS = None,
    delimiter: _DELIMITER = None,
    encoding: _ENCODING = None,
    skip_empty: _SKIP_EMPTY = None,
    keep_columns: Annotated[
        bool | None,
        typer.Option(
            "--keep-columns",
            help="Write all columns of the data beside the predictions, under their own names; default: those that "
            "the task reads.",
        ),
    ] = None,
    generation: _GENERATION = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Predict with a run or an adapter: a line of JSON for each example, or for each line of the standard input."""
    with one_clear_error():
        if text is not None and data is not None:
            raise ValueError("Pass --data or --text, not both.")
        if text is None and data is None and sys.stdin.isatty():
            raise ValueError("Pass --data, --text, or texts on standard input, one per line.")
        reading = {"split": split, "keep_columns": keep_columns, **_reading(columns, delimiter, encoding, skip_empty)}
        if data is None and (given := [name for name, value in reading.items() if value is not None]):
            raise ValueError(f"--{given[0].replace('_', '-')} describes data. Pass --data, or remove it.")
        if output is not None:
            require_writable(output, overwrite=overwrite, run=run, data=data)
            if output.suffix.lower() not in (".jsonl", ".json", ".ndjson", ".csv", ".tsv"):
                raise ValueError(
                    f"--output {output} has no suffix of a format. Name it {output.with_suffix('.csv')} for a table, "
                    f"or {output.with_suffix('.jsonl')} for lines of JSON."
                )
        quiet()
        reading["announce"] = note
        from ..train.inference import as_json, predict, predict_texts, write_predictions

        how = parse_assignments(generation or (), "--generation")
        if text is not None and output is None:
            (prediction,) = predict_texts(run, [text], how, note)
            print(prediction.get("completion") or as_json(prediction))
            return
        found = (
            predict(run, data, generation=how, **reading)
            if data is not None
            else predict_texts(run, _lines_of_input() if text is None else [text], how, note)
        )
        if output is not None:
            announce(f"{write_predictions(output, found):,} predictions: {output}")
            return
        for prediction in found:
            print(as_json(prediction))


def _lines_of_input() -> list[str]:
    typed = sys.stdin.read().rstrip()
    if not typed:
        raise ValueError("Standard input is empty. Pass --data, --text, or texts, one per line.")
    texts = typed.split("\n")  # not at other ends of lines, which texts may contain
    if empty := next((number for number, line in enumerate(texts, 1) if not line.strip()), None):
        raise ValueError(f"Line {empty} of the standard input is empty. Each line is a text to predict.")
    return texts


def _print_metrics(metrics: dict[str, float], title: str) -> None:
    announce(title)
    guess = guess_in(metrics)
    table = Table(*("", "", "guessing")[: 3 if guess else 2], show_header=bool(guess))
    count = metrics.get("examples")
    for name, value in shown_metrics(metrics).items():
        is_share = name in ("accuracy", "exact_match") and count
        error = f" ± {math.sqrt(value * (1 - value) / count):.4f}" if is_share and count else ""
        table.add_row(name, f"{value:.4f}{error}", *([f"{guess[name]:.4f}"] if name in guess else []))
    console.print(table)
