"""The command line: parses, calls, prints."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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
def _one_clear_error(after_interrupt: str = "Run the same command again to resume.") -> Iterator[None]:
    """Print what the user can act on as one message, without a traceback."""
    try:
        yield
    except typer.Exit:
        raise  # it is a RuntimeError
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        remedy = ""
        if isinstance(error, ImportError):
            missing = {"altair|vl_convert|matplotlib|pandas": "plots", "bitsandbytes|torchao": "integrations"}
            extra = next((extra for names, extra in missing.items() if re.search(names, str(error))), "train")
            remedy = f" Install what this command needs: pip install 'lrlora[{extra}]'"
        # What a damaged file holds need not be printable.
        said = f"{str(error) or type(error).__name__}{remedy}".encode("utf-8", "backslashreplace").decode()
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(said)}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. {after_interrupt}", highlight=False)
        raise typer.Exit(130) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"lrlora {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
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
        from .report.page import write_page
        from .report.table import rank_table
        from .training.demo import DemoSettings, load_reports, run_demo
        from .training.runs import load_runs

        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        settings = DemoSettings(steps=steps, r=r, learning_rate=learning_rate, seed=seed)
        results = run_demo(output, settings, overwrite=overwrite, announce=console.print)
        reports = load_reports(output)
        picture = output / "ranks.png"
        save_rank_figure(reports["lr-lora"], picture, title=f"LR-LoRA on movie reviews, {steps} steps")
        page = output / "report.html"
        write_page(load_runs([output]), page, title=f"Movie reviews, {steps} steps, r = {r}")
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
        console.print(
            escape(f"Adapters, reports and history: {output}\nPicture: {picture}\nPage: {page}"), highlight=False
        )


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
        _quiet()
        for path in (json, csv, picture):
            if path and not path.parent.is_dir():
                raise FileNotFoundError(f"The folder {path.parent} for {path.name} does not exist.")
        if picture:
            from .report.figure import check_picture, save_rank_figure

            check_picture(picture)
        from .rank import rank_report
        from .report.table import rank_table
        from .saved import load_measurable

        report = rank_report(load_measurable(adapter, with_base_weights=with_base), progressbar=True)
        console.print(rank_table(report, escape(f"Learned ranks, {adapter}")))
        if json:
            report.to_json(json)
        if csv:
            report.to_csv(csv)
        if picture:
            save_rank_figure(report, picture)


@app.command()
def report(
    sources: Annotated[
        list[str], typer.Argument(metavar="ADAPTER|RUN_DIR...", help="Saved adapters and output folders of runs.")
    ],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("lrlora-report.html"),
    pictures: Annotated[Path | None, typer.Option(help="Folder for pictures as SVG and PNG, for papers.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page and the pictures.")] = False,
) -> None:
    """Show what was learned, of one run or of several beside each other: one HTML page that needs no network."""
    with _one_clear_error():
        _quiet()
        from .report.page import write_page
        from .report.pictures import save_pictures
        from .training.runs import load_runs

        if output.exists() and not overwrite:
            raise FileExistsError(f"The file {output} exists already. Give another --output, or --overwrite.")
        if not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"The folder {output.parent} for {output.name} does not exist.")
        if pictures and not overwrite and pictures.exists() and any(pictures.iterdir()):
            raise FileExistsError(f"The folder {pictures} is not empty. Give another one, or --overwrite.")
        runs = load_runs(sources)
        write_page(runs, output, title=f"Learned ranks: {', '.join(run.name for run in runs)}")
        console.print(escape(f"Page: {output}, {output.stat().st_size / 2**20:.1f} MiB"), highlight=False)
        if pictures:
            save_pictures(runs, pictures)
            console.print(escape(f"Pictures: {pictures}"), highlight=False)


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file with these settings; options on the command line override it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, folder or embedded:NAME.")] = None,
    data: Annotated[str | None, typer.Option(help="Hub name, file, folder or embedded:NAME.")] = None,
    task: Annotated[str | None, typer.Option(help="classify, regress, multiple-choice or causal-lm.")] = None,
    method: Annotated[
        str | None, typer.Option(help="lr-lora, lora, dora, adalora, hira, randlora, loha, vera, full.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME: what a column of the data holds.")] = None,
    validation: Annotated[str | None, typer.Option(help="Data to validate on.")] = None,
    validation_share: Annotated[
        float | None, typer.Option(help="Share of the training data to validate on, if --validation is not given.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank r of BA.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    head_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of a new head, if it differs from the rest.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step, on each device.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut examples after so many tokens.")] = None,
    early_stopping: Annotated[int | None, typer.Option(help="Stop after so many evaluations without gain.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: a field of the PEFT configuration.")] = None,
    training: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: a field of TrainingArguments.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
) -> None:
    """Fine-tune your model on your data; save adapter, metrics and learned ranks."""
    with _one_clear_error():
        _quiet()
        from .report.table import rank_table
        from .training.config import RUN_FILE, TrainConfig, parse_assignments, parse_pairs, read_run, read_yaml
        from .training.train import Interrupted, rank_report_of, resume_hint, train

        options = {
            "model": model,
            "data": data,
            "task": task,
            "method": method,
            "output": None if output is None else str(output),
            "validation": validation,
            "validation_share": validation_share,
            "max_length": max_length,
            "head_learning_rate": head_learning_rate,
            "early_stopping": early_stopping,
            "seed": seed,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        arguments = {
            "learning_rate": learning_rate,
            "num_train_epochs": epochs,
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
        }
        nested = {
            "columns": parse_pairs(column or (), "--column"),
            "adapter": parse_assignments(adapter or (), "--adapter"),
            "training": parse_assignments(training or (), "--training")
            | {name: value for name, value in arguments.items() if value is not None},
        }
        if resume is not None:
            if config or given or rank is not None or any(nested.values()):
                raise ValueError("--resume goes on with the settings of the run: give nothing else.")
            run = read_run(resume).config
        else:
            content = read_yaml(config) if config else {}
            content |= given
            if rank is not None:
                nested["adapter"]["target_r" if content.get("method") == "adalora" else "r"] = rank
            for name, values in nested.items():
                if values:
                    content[name] = {**(content.get(name) or {}), **values}
            run = TrainConfig.from_dict(content)
        try:
            result = train(run, resume=resume is not None, overwrite=overwrite, announce=_announce)
        except (Interrupted, KeyboardInterrupt) as stop:
            folder = Path(run.output)
            hint = resume_hint(folder) if (folder / RUN_FILE).exists() else "Nothing was written."
            Console(stderr=True).print(escape(str(stop) or f"Interrupted. {hint}"), highlight=False)
            raise typer.Exit(130) from None
        if not result.is_first:
            return
        report = rank_report_of(result.output)
        if report is not None:
            console.print(rank_table(report, "Learned ranks"))
        _print_metrics(result.metrics, "Validation, best checkpoint")
        console.print(escape(f"Everything is in {result.output}"), highlight=False)
        if report is not None:
            console.print(escape(f"To look at it: lrlora report {result.output}"), highlight=False)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Output folder of `lrlora train`.")],
    data: Annotated[str, typer.Option(help="Hub name, file, folder or embedded:NAME.")],
    split: Annotated[
        str | None, typer.Option(help="Split of the data; default: test, or validation if there is none.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME, if not as in training.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the metrics here.")] = None,
) -> None:
    """Evaluate a finished run on data."""
    with _one_clear_error():
        _quiet()
        from .files import write_json
        from .training.config import parse_pairs
        from .training.inference import evaluate

        columns = parse_pairs(column, "--column") if column else None
        metrics = evaluate(run, data, split=split, columns=columns)
        _print_metrics(metrics, f"{run} on {data}")
        if json:
            write_json(json, metrics)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Output folder of `lrlora train`.")],
    data: Annotated[str, typer.Option(help="Hub name, file, folder or embedded:NAME.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write.")],
    split: Annotated[
        str | None, typer.Option(help="Split of the data; default: test, or validation if there is none.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=NAME, if not as in training.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Predict with a finished run: a line of JSON for each example."""
    with _one_clear_error():
        _quiet()
        from .training.config import parse_pairs
        from .training.inference import predict, write_predictions

        if output.exists() and not overwrite:
            raise FileExistsError(f"The file {output} exists already. Give another --output, or --overwrite.")
        columns = parse_pairs(column, "--column") if column else None
        count = write_predictions(output, predict(run, data, split=split, columns=columns))
        console.print(escape(f"{count:,} predictions: {output}"), highlight=False)


_ADAPTER = Annotated[str, typer.Argument(help="Folder or hub name of a saved LR-LoRA adapter.")]
_ENERGY = Annotated[float | None, typer.Option(help="Keep this share of each module's ‖ΔW‖², in (0, 1].")]
_BUDGET = Annotated[
    str | None, typer.Option(help="Parameters in all: 250000, 250k, 1.5M, or r4 for those of LoRA of rank 4.")
]
_MAX_RANK = Annotated[int | None, typer.Option(min=1, help="Largest rank of any module.")]
_DROP_BELOW = Annotated[float, typer.Option(help="Leave out modules with less than this share of all ‖ΔW‖².")]
_OUTPUT = Annotated[Path, typer.Option(help="Folder to write; must be empty or not exist.")]


@app.command()
def export(
    adapter: _ADAPTER,
    output: _OUTPUT,
    energy: _ENERGY = None,
    budget: _BUDGET = None,
    max_rank: _MAX_RANK = None,
    drop_below: _DROP_BELOW = 0.0,
    dtype: Annotated[str, typer.Option(help="Precision of the factors: float32, bfloat16 or float16.")] = "float32",
    pad: Annotated[bool, typer.Option("--pad", help="One rank for all, padded with zeros (llama.cpp).")] = False,
    check: Annotated[bool, typer.Option(help="Load the base model and measure what the export changes.")] = True,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="No weights: a LoraConfig, to train plain LoRA at these ranks.")
    ] = False,
) -> None:
    """Turn a learned update into a plain LoRA adapter that anything can serve."""
    with _one_clear_error("Nothing was written."):
        _quiet()
        from .export import factorize, save_as_lora, save_lora_config
        from .export.files import check_output
        from .export.loading import check_base, check_names
        from .export.table import factors_table

        if pad and config_only:
            raise ValueError("--pad is about weights, and --config-only writes none. Leave one of them out.")
        precision = _dtype(dtype)
        check_output(output)
        model = _load_lr_lora(adapter)
        wish = _wish(model, energy, budget, max_rank, drop_below)
        if check and not config_only:
            check_base(adapter, model)
        else:
            check_names(model)
        factors = factorize(model, **wish, progressbar=True)
        console.print(factors_table(factors, escape(f"LoRA for {adapter}")))
        if config_only:
            save_lora_config(factors, adapter, output)
            console.print(escape(f"To train with: LoraConfig.from_pretrained({str(output)!r})"), highlight=False)
            return
        console.print(_sizes(model, sum(part.parameters for part in factors)), highlight=False)
        save_as_lora(factors, adapter, output, dtype=precision, pad=pad)
        size = sum(file.stat().st_size for file in output.iterdir())
        console.print(escape(f"LoRA adapter: {output}, {size / 2**20:.2f} MiB"), highlight=False)
        if check:
            _print_difference(adapter, output)


def _sizes(model: Any, exported: int) -> str:
    from .export.factorize import exact_parameters

    trained = sum(p.numel() for name, p in model.named_parameters() if ".lrlora_" in name)  # a shared φ once
    exact = exact_parameters(model)
    without_loss = "" if exact is None else f", {exact:,} as LoRA without loss"
    return f"Parameters: {trained:,} as trained{without_loss}, {exported:,} as exported."


def _print_difference(adapter: str, output: Path) -> None:
    from .export import output_difference

    try:
        difference = output_difference(adapter, output)
    except Exception as error:  # whatever a model may say of inputs that are not its own, the export is there
        reason = " ".join(str(error).split()) or type(error).__name__
        console.print(escape(f"What the export changes could not be measured: {reason}"), highlight=False)
        return
    largest = "" if difference.largest is None else f"; largest difference of a logit: {difference.largest:.2g}"
    console.print(
        f"On random inputs {difference.relative:.2%} of the adapter's effect on the last hidden state is lost{largest}",
        highlight=False,
    )


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or hub name of a saved adapter.")],
    output: _OUTPUT,
    dtype: Annotated[str | None, typer.Option(help="Precision of the model; default: as stored.")] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Dequantise a base model that is stored quantised.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file of weights.")] = "5GB",
) -> None:
    """Add the update to the base model, and write a full model that needs no adapter."""
    with _one_clear_error("Nothing was written."):
        _quiet()
        from .export import merge_adapter

        precision = None if dtype is None else _dtype(dtype)
        merge_adapter(
            adapter, output, dtype=precision, dequantize=dequantize, max_shard_size=max_shard_size, progressbar=True
        )
        size = sum(file.stat().st_size for file in output.iterdir())
        console.print(escape(f"Model: {output}, {size / 2**20:.1f} MiB"), highlight=False)


def _dtype(name: str) -> Any:
    import torch

    from .training.config import require_known

    require_known("dtype", name, ("float32", "bfloat16", "float16"))
    return getattr(torch, name)


def _load_lr_lora(adapter: str) -> Any:
    from .saved import load_measurable

    model: Any = load_measurable(adapter)
    method = model.peft_config["default"].peft_type.value
    if method != "LRLORA":
        raise ValueError(f"{adapter} is an adapter of type {method}; only LR-LoRA's need to be exported.")
    return model


def _wish(
    model: Any, energy: float | None, budget: str | None, max_rank: int | None, drop_below: float
) -> dict[str, Any]:
    """The arguments of `factorize` that the options ask for."""
    from .export.factorize import check_wish, parameters_of_rank

    wish: dict[str, Any] = {"energy": energy, "max_rank": max_rank, "drop_below": drop_below}
    if budget is not None:
        match = re.fullmatch(r"(r?)(\d+(?:\.\d+)?)([kM]?)", budget)
        if match is None or (match[1] and (match[3] or "." in match[2])):
            raise ValueError(f"--budget must be like 250000, 250k, 1.5M or r4, and is {budget!r}.")
        number = float(match[2]) * {"": 1, "k": 1e3, "M": 1e6}[match[3]]
        wish["budget"] = parameters_of_rank(model, int(number)) if match[1] else int(number)
    check_wish(**wish)
    return wish


@app.command()
def compare(
    suite: Annotated[
        str,
        typer.Argument(help="offline-nlu, offline-commonsense, capacity, glue, commonsense or smoke, or a YAML file."),
    ],
    methods: Annotated[str | None, typer.Option(help="Names with commas between; default: the main ones.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the suite with commas between; default: all.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="Learning rates with commas between; default: each method's.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of each method on each task.")] = 3,
    rank: Annotated[int, typer.Option(min=1, help="Rank r of BA.")] = 4,
    hours: Annotated[float | None, typer.Option(min=0.0, help="Hours after which no new job is started.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; default: lrlora-compare-SUITE.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: write the report of what was asked for last.")
    ] = False,
) -> None:
    """Compare methods on tasks, with tuned rates and several seeds. Run it again to resume, or once per GPU or core."""
    with _one_clear_error():
        from .compare import Comparison, run_comparison
        from .compare.jobs import parse_rates, read_comparison, read_records
        from .compare.report import write_report

        folder = output or Path(f"lrlora-compare-{Path(suite).stem}")
        wish: dict[str, Any] = {"seeds": seeds, "rank": rank}
        for name, value in (("methods", methods), ("tasks", tasks)):
            if value is not None:
                wish[name] = tuple(part.strip() for part in value.split(","))
        if rates is not None:
            wish["rates"] = parse_rates(rates)
        comparison = read_comparison(suite, folder) if report else Comparison(suite, **wish)
        left = [] if report else run_comparison(comparison, folder, hours=hours, announce=_announce)
        path = write_report(comparison, folder)
        failed = sum(bool(record.get("failure")) for record in comparison.select(read_records(folder)).values())
        if failed:
            console.print(f"{failed} jobs failed: the report says why.", highlight=False)
        if left:
            count = len(comparison.cells_left(left))
            console.print(f"{count} jobs or more are left: run the same command again to go on.", highlight=False)
        console.print(escape(f"Report: {path}"), highlight=False)


@app.command()
def inputs() -> None:
    """List the models and data that come with packages, for `embedded:NAME`."""
    with _one_clear_error():
        from .training.embedded import EMBEDDED_DATA, EMBEDDED_MODELS

        table = Table(title="Models and data that need no model hub", title_justify="left")
        for heading in ("name", "for", "what"):
            table.add_column(heading, no_wrap=heading != "what")
        for name, model in EMBEDDED_MODELS.items():
            table.add_row(f"embedded:{name}", "--model", model.description)
        for name, data in EMBEDDED_DATA.items():
            table.add_row(f"embedded:{name}", f"--data, {data.task}", data.description)
        console.print(table)


def _announce(line: str) -> None:
    console.print(escape(line), highlight=False)


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # It would ask whether to run the code that some models bring along: nobody may be there, and none is run.
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    if importlib.util.find_spec("datasets"):
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _print_metrics(metrics: dict[str, float], title: str) -> None:
    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, value in metrics.items():
        if name != "epoch":
            table.add_row(name, f"{value:.4f}")
    console.print(table)
