"""Command line of the experiments: `lrlora-lab compare`, `measure`, `gpu` and `paper`."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lrlora.checks import require_known
from lrlora.cli.common import CONTEXT, announce, as_text, console, one_clear_error, quiet

if TYPE_CHECKING:
    from .jobs import Comparison


app = typer.Typer(no_args_is_help=True, context_settings=CONTEXT, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Experiments behind lrlora."""


@app.command()
def compare(
    suite: Annotated[
        str,
        typer.Argument(
            help=(
                "glue, commonsense, capacity, rates, users, users-gpu, offline-nlu, offline-vision, llama-3-8b, "
                "smoke, or a YAML file."
            )
        ),
    ],
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; default: the main ones.")] = None,
    ablation: Annotated[
        str | None,
        typer.Option(help="Ablation instead of methods: sharing, frozen, num-basis, interval, gain, rank or targets."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite, separated by commas; default: all.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the suite's.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="Learning rates, separated by commas; default: a grid for each method.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of final runs of each method on each task.")] = 3,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank r of BA; default: the suite's, which is 4 unless it says otherwise.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, for a first try; default: each task's.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Jobs at a time; default: one per GPU, or one.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster to run on; `auto`: the running one."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.0, help="Hours after which no new job starts; default: no limit.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default: lrlora-lab-SUITE.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the data and show the jobs; run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report of the last call; run nothing.")] = False,
) -> None:
    """Compare methods on tasks, with tuned rates and several seeds. Run it again to resume.

    For your own data, write a YAML file. A task has the keys of lrlora train, and a test split or test_data. Try it
    with --dry-run and --steps 20.

    \b
      model: FacebookAI/roberta-base
      tasks:
        reviews:
          data: reviews.csv
          test_data: held-out.csv
          task: classify
          steps: 500
    """  # noqa: D301 (click reads the character)
    with one_clear_error():
        quiet()
        from .jobs import Comparison, read_comparison

        folder = output or Path(f"lrlora-lab-{Path(suite).stem}")
        options: dict[str, Any] = {"seeds": seeds, "rank": rank, "model": model, "steps": steps}
        comparison = (
            read_comparison(suite, folder)
            if report
            else Comparison(suite, **options, **_lists(methods, ablation, tasks, rates))
        )
        if dry_run:
            _show_plan(comparison, folder)
        else:
            _run(comparison, folder, report=report, at_once=at_once, ray=ray, hours=hours)


@app.command()
def measure(
    name: Annotated[str, typer.Argument(help="speed, gpu, export or compress.")],
    only: Annotated[str, typer.Option(help="Pattern of the jobs, such as 'exports'; default: all.")] = "*",
    at_once: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Jobs at a time; default: one per GPU, or one.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.0, help="Hours after which no new job starts; default: no limit.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default: lrlora-lab-NAME.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Fill the page from the stored results.")] = False,
) -> None:
    """Repeat a measurement of the documentation, and fill its page. Run it again to resume."""
    with one_clear_error():
        quiet()
        from .measure import NAMES, measurement, run_measurement, write_page

        require_known("measurement", name, NAMES)
        if report:
            announce(f"Page: {write_page(name, {})}")
            return
        folder = output or Path(f"lrlora-lab-{name}")
        left = run_measurement(name, folder, only, at_once=at_once, hours=hours, announce=announce)
        if left:
            announce(f"Left: {', '.join(left)}. Run the same command again to continue.")
        announce(f"Page: {measurement(name).page}")


@app.command()
def gpu(
    hours: Annotated[
        float | None, typer.Option(min=0.0, help="Hours after which no new part starts; default: no limit.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("lrlora-lab-gpu"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the parts and estimates; run nothing.")] = False,
) -> None:
    """Test and measure this card, in a checkout, and fill docs/speed.md. Run it again to resume.

    Without a card, the parts run on the CPU with tiny models, and fill no page.
    """
    with one_clear_error():
        quiet()
        from .measure import measurement, run_measurement
        from .measure.gpu import fill_readme, plan, told

        for line in plan():
            announce(line)
        if dry_run:
            return
        left = run_measurement("gpu", output, hours=hours, announce=announce)
        announce(told(output))
        if not measurement("gpu").is_trial:
            fill_readme()
        if left:
            announce(f"Left: {', '.join(left)}. Run the same command again to continue.")


@app.command()
def paper(
    at_once: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time; default: one per GPU, or one.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.0, help="Hours after which no new run starts; default: no limit.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the rows.")] = Path("lab/studies/paper"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate the time; run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the tables of the rows; run nothing.")] = False,
) -> None:
    """Test the paper's claims on GLUE and commonsense reasoning. Run it again to resume."""
    with one_clear_error():
        quiet()
        from lrlora.locks import only_writer

        from .paper import Paper, load_data
        from .paper_report import write_paper_report
        from .pool import run_missing

        study = Paper(output)
        if dry_run:
            for line in study.estimate():
                announce(line)
        elif report:
            announce(f"Report: {write_paper_report(output)}")
        else:
            load_data()
            with only_writer(output):
                run_missing(study, at_once=at_once, hours=hours, announce=announce)


def _lists(methods: str | None, ablation: str | None, tasks: str | None, rates: str | None) -> dict[str, Any]:
    """Comparison fields given as comma-separated options."""
    from .jobs import parse_rates
    from .methods import ABLATIONS

    if methods is not None and ablation is not None:
        raise ValueError(f"--ablation {ablation} already selects the methods. Remove --methods.")
    fields: dict[str, Any] = {}
    for name, value in (("methods", methods), ("tasks", tasks)):
        if value is not None:
            fields[name] = tuple(_words(value))
    if ablation is not None:
        require_known("ablation", ablation, ABLATIONS)
        fields["methods"] = ABLATIONS[ablation]
    return fields if rates is None else {**fields, "rates": parse_rates(rates)}


def _words(text: str) -> list[str]:
    """Split at commas outside of brackets, as in lora+target_modules=[query,value]."""
    depths = list(accumulate((letter in "[{") - (letter in "]}") for letter in text))
    commas = [place for place, letter in enumerate(text) if letter == "," and not depths[place]]
    ends = zip([-1, *commas], [*commas, len(text)], strict=True)
    return [text[before + 1 : after].strip() for before, after in ends]


def _show_plan(comparison: Comparison, folder: Path) -> None:
    from .compare import check_data
    from .cost import estimates, measured_hours
    from .jobs import check
    from .methods import find_method

    check(comparison, folder)
    for line in check_data(comparison):
        announce(line)
    left, definition = comparison.cells_left(comparison.plan({})), comparison.definition
    announce(f"Plan: {comparison.suite} on {definition.model}, r = {comparison.r}: {len(left)} jobs.")
    if definition.protocol:
        announce(f"Protocol: {definition.protocol}")
    table = Table("task", "method")
    table.add_column("jobs", justify="right")
    for (task, method), count in Counter(left).items():
        table.add_row(as_text(task), as_text(find_method(method).name), str(count))
    console.print(table)
    for line in (*measured_hours(comparison, left), *estimates(comparison, left)):
        announce(line)
    announce("Not included: further learning rates, where the best is at an edge of the grid.")


def _run(comparison: Comparison, folder: Path, *, report: bool, **how: Any) -> None:
    from .compare import run_comparison
    from .jobs import read_records
    from .report import write_report

    left = [] if report else run_comparison(comparison, folder, announce=announce, **how)
    path = write_report(comparison, folder)
    failed = sum(bool(record.get("failure")) for record in comparison.select(read_records(folder)).values())
    if failed:
        console.print(
            f"{failed} {'job' if failed == 1 else 'jobs'} failed; see the report. Run the same command again to retry "
            "them, except those that diverged.",
            highlight=False,
        )
    if left:
        count = len(comparison.cells_left(left))
        said = "At least 1 job is" if count == 1 else f"At least {count} jobs are"
        console.print(f"{said} left. Run the same command again to continue.", highlight=False)
    announce(f"Report: {path}")
