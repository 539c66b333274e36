"""Commands on adapters: ranks, report, export."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..checks import DEFAULT_ENERGY, require_known
from ..files import require_writable
from ..learned.cut import Size
from ..locks import only_writer
from ..shrunk import read_shrunk
from ..sources import is_adapter
from ..straightened import read_straightened
from ..train.yaml import parse_pairs
from .common import ASSISTANT_ONLY_LOSS, announce, app, as_text, console, note, one_clear_error, quiet

if TYPE_CHECKING:
    from ..adapters import Factors, Updates


_SOURCE_HELP = "PEFT adapter (folder or hub name), or LoRA in a .safetensors file."
_BASE = Annotated[
    str | None,
    typer.Option(help="Base model (folder, file or hub name): needed for ‖ΔW‖/‖W0‖, and DoRA with its magnitudes."),
]


_EVERY = Annotated[bool, typer.Option("--all", help="Show every module.")]


@app.command()
def ranks(
    source: Annotated[str, typer.Argument(help=_SOURCE_HELP)],
    base: _BASE = None,
    json: Annotated[Path | None, typer.Option(help="File to write the report to, as JSON.")] = None,
    every: _EVERY = False,
) -> None:
    """Print the ranks used by an adapter."""
    with one_clear_error():
        if json is not None:
            require_writable(json)
        quiet()
        from ..adapters import read_updates
        from ..ranks import rank_report
        from ..views.tables import rank_table

        updates = read_updates(source, base=base)
        report = rank_report(updates, progressbar=True)
        has_stacks = any(update.layout.stack for update in updates)  # of which a base model may have no tensor
        if base is not None and not has_stacks and all(row.relative_norm is None for row in report.rows):
            raise ValueError(f"{base} has no weight of the adapter's modules. Pass its base model.")
        shrunk = read_shrunk(Path(source))
        if shrunk is not None and shrunk.step is None:  # else they are the ranks of the adapter
            report = report.with_loss_ranks(shrunk.ranks)
        console.print(
            rank_table(report, as_text(f"Ranks of {source} ({updates.method})"), width=console.width, every=every)
        )
        for note in updates.notes:
            announce(note)
        for record in (shrunk, read_straightened(Path(source))):
            if record is not None:
                announce(str(record))
        if json:
            report.to_json(json)


@app.command()
def report(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Output folders of runs, adapters, or LoRA files."),
    ],
    base: _BASE = None,
    output: Annotated[Path, typer.Option(help="Page to write.")] = Path("lrlora-report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
) -> None:
    """Write an HTML page on one run, or several side by side. It needs no network."""
    with one_clear_error():
        require_writable(output, overwrite=overwrite)
        with only_writer(output):
            quiet()
            from ..views.page import is_page, require_shown, write_page
            from ..views.runs import load_runs

            if output.exists() and not is_page(output):
                raise FileExistsError(
                    f"{output} is not a page of `lrlora report`, so it is not replaced. Choose another --output."
                )
            require_shown(len(set(sources)))  # before ranks are measured
            runs = load_runs(sources, base=base)
            write_page(runs, output, title=f"Ranks: {', '.join(run.name for run in runs)}")
            announce(f"Page: {output}, {output.stat().st_size / 2**20:.1f} MiB")


_DTYPES = ("float32", "bfloat16", "float16")


@app.command()
def export(
    sources: Annotated[list[str], typer.Argument(help=f"{_SOURCE_HELP} Several are exported one by one.")],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write (new or empty); for a single file, a new file; for several sources, a folder of them."
        ),
    ],
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the adapter's gain on held-out examples (0.99) that the smallest LoRA written keeps."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Total size: parameters (250000, 250k, 1.5M), MiB (8MiB), or r4 for that of LoRA of rank 4."),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Largest rank of any module; default: no limit.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help=f"Keep this share of each module's ‖ΔW‖², in (0, 1]; default: {DEFAULT_ENERGY}, if no size is given."
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Criterion that fills a size: loss (default for a run, or with --data), or energy (needs no data)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Examples to measure the loss on, as for `lrlora train`, but none that the adapter was trained on; "
            "default: the data of the run."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", "--column", help="ROLE=NAME, column of the examples; default: as in training."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task of an adapter that is not a run: causal-lm, classify or regress; default: the one it stores."
        ),
    ] = None,
    assistant_only_loss: ASSISTANT_ONLY_LOSS = False,
    base: _BASE = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of the factors: float32, bfloat16 or float16; default: as stored.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Program that loads it: peft, vllm, sglang, llama.cpp, or hot-swap of PEFT or diffusers; default: "
            "peft, which suits vllm.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Load the base model and measure the difference that the export makes.")
    ] = True,
    every: _EVERY = False,
) -> None:
    """Write an adapter as a plain LoRA of the requested size."""
    with one_clear_error("Nothing was written."):
        if dtype is not None:
            require_known("dtype", dtype, _DTYPES)
        examples = {
            "data": data,
            "columns": parse_pairs(columns, "--columns") if columns else None,
            "task": task,
            "assistant_only_loss": assistant_only_loss or None,
        }
        write = partial(
            _export,
            keep=keep,
            size=None if size is None else Size.parse(size, "--size"),
            max_rank=max_rank,
            energy=energy,
            by=by,
            examples=examples,
            base=base,
            check=check,
            dtype=dtype,
            server=server,
            every=every,
        )
        outputs = {source: output / Path(os.path.abspath(source)).name for source in sources}  # "." has no name
        if len(set(outputs.values())) < len(sources):
            raise ValueError("Two sources have the same name. Export them one by one.")
        if len(sources) > 1:
            output.mkdir(parents=True, exist_ok=True)
    if len(sources) == 1:
        write(sources[0], output)
    else:
        _write_all(write, outputs)


_INTERRUPTED = 130  # exit status


def _write_all(write: Callable[[str, Path], None], outputs: Mapping[str, Path]) -> None:
    """Export several sources; exports that are there are left, and a failure stops none of the others."""
    table, failed = Table("adapter", box=None), 0
    for heading in ("MiB", "exported", ""):
        table.add_column(heading, justify="right")
    for source, output in outputs.items():
        is_done = output.is_file() or is_adapter(output)
        note = "was there" if is_done else ""
        try:
            if not note:
                announce(f"{source}:")
                write(source, output)
        except typer.Exit as stop:
            if stop.exit_code == _INTERRUPTED:
                raise
            failed, note = failed + 1, "failed"
        sizes = [f"{_mebibytes(path):.2f}" if path.exists() else "" for path in (Path(source), output)]
        table.add_row(as_text(source), *sizes, note)
    console.print(table)
    if failed:
        raise typer.Exit(1)


def _mebibytes(path: Path) -> float:
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files) / 2**20


def _export(source: str, output: Path, *, every: bool, **options: Any) -> None:
    """Export one source."""
    with one_clear_error("Nothing was written."):
        quiet()
        from ..train.exporting import export
        from ..views.tables import factors_table

        def show(factors: Sequence[Factors], updates: Updates) -> None:
            title = as_text(f"LoRA for {updates.name} ({updates.method})")
            console.print(factors_table(factors, title, width=console.width, every=every))

        try:
            export(source, output, show=show, announce=announce, **options)
        except KeyboardInterrupt as stop:
            note(str(stop) or "Interrupted. Nothing was written.")
            raise typer.Exit(_INTERRUPTED) from None
