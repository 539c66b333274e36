"""Commands on adapters: ranks, report, export, merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..checks import check_truncation, require_known
from ..files import free_folder, require_adapter
from .common import app, console, one_clear_error, quiet

if TYPE_CHECKING:
    from ..saved import SavedAdapter


@app.command()
def ranks(
    adapter: Annotated[str, typer.Argument(help="Folder or hub name of a saved LR-LoRA or LoRA adapter.")],
    with_base: Annotated[bool, typer.Option("--with-base", help="Load the base model too, for ‖ΔW‖/‖W0‖.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the report here as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows here as CSV.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw them here (.png, .svg, .pdf).")] = None,
) -> None:
    """Print the learned ranks of a saved adapter. Its base model is not needed."""
    with one_clear_error():
        for path in (json, csv, picture):
            if path and not path.parent.is_dir():
                raise FileNotFoundError(f"The folder {path.parent} for {path.name} does not exist.")
        require_adapter(adapter)
        quiet()
        if picture:
            from ..report.figure import check_picture, save_rank_figure

            check_picture(picture)
        from ..rank import rank_report
        from ..report.table import rank_table
        from ..saved import load_on_skeleton

        report = rank_report(load_on_skeleton(adapter, with_base_weights=with_base), progressbar=True)
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
    with one_clear_error():
        if output.exists() and not overwrite:
            raise FileExistsError(f"The file {output} exists already. Give another --output, or --overwrite.")
        if not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"The folder {output.parent} for {output.name} does not exist.")
        if pictures and not overwrite and pictures.exists() and any(pictures.iterdir()):
            raise FileExistsError(f"The folder {pictures} is not empty. Give another one, or --overwrite.")
        quiet()
        from ..report.page import write_page
        from ..report.pictures import save_pictures
        from ..report.runs import load_runs

        runs = load_runs(sources)
        write_page(runs, output, title=f"Learned ranks: {', '.join(run.name for run in runs)}")
        console.print(escape(f"Page: {output}, {output.stat().st_size / 2**20:.1f} MiB"), highlight=False)
        if pictures:
            save_pictures(runs, pictures)
            console.print(escape(f"Pictures: {pictures}"), highlight=False)


_ADAPTER = Annotated[str, typer.Argument(help="Folder or hub name of a saved LR-LoRA adapter.")]
_ENERGY = Annotated[float | None, typer.Option(help="Keep this share of each module's ‖ΔW‖², in (0, 1].")]
_BUDGET = Annotated[
    str | None, typer.Option(help="Parameters in all: 250000, 250k, 1.5M, or r4 for those of LoRA of rank 4.")
]
_MAX_RANK = Annotated[int | None, typer.Option(min=1, help="Largest rank of any module.")]
_DROP_BELOW = Annotated[float, typer.Option(help="Leave out modules with less than this share of all ‖ΔW‖².")]
_DTYPES = ("float32", "bfloat16", "float16")
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
    with one_clear_error("Nothing was written."):
        if pad and config_only:
            raise ValueError("--pad is about weights, and --config-only writes none. Leave one of them out.")
        require_known("dtype", dtype, _DTYPES)
        number, is_rank = (None, False) if budget is None else _parse_budget(budget)
        truncation: dict[str, Any] = {"energy": energy, "max_rank": max_rank, "drop_below": drop_below}
        check_truncation(**truncation, budget=number)
        free_folder(output)
        require_adapter(adapter)
        quiet()
        from ..export import factorize, save_as_lora, save_lora_config
        from ..export.factorize import parameters_of_rank
        from ..export.loading import check_base, check_names
        from ..export.table import factors_table
        from ..saved import SavedAdapter

        saved = SavedAdapter.read(adapter)
        model = _load_lr_lora(saved)
        truncation["budget"] = parameters_of_rank(model, number) if is_rank and number is not None else number
        if check and not config_only:
            check_base(saved, model)
        else:
            check_names(model)
        factors = factorize(model, **truncation, progressbar=True)
        console.print(factors_table(factors, escape(f"LoRA for {adapter}")))
        if config_only:
            save_lora_config(factors, saved, output)
            console.print(escape(f"To train with: LoraConfig.from_pretrained({str(output)!r})"), highlight=False)
            return
        console.print(_sizes(model, sum(part.parameters for part in factors)), highlight=False)
        save_as_lora(factors, saved, output, dtype=_dtype(dtype), pad=pad)
        size = sum(file.stat().st_size for file in output.iterdir())
        console.print(escape(f"LoRA adapter: {output}, {size / 2**20:.2f} MiB"), highlight=False)
        if check:
            _print_difference(saved, output)


def _sizes(model: Any, exported: int) -> str:
    from ..export.factorize import exact_parameters

    trained = sum(p.numel() for name, p in model.named_parameters() if ".lrlora_" in name)  # a shared φ once
    exact = exact_parameters(model)
    without_loss = "" if exact is None else f", {exact:,} as LoRA without loss"
    return f"Parameters: {trained:,} as trained{without_loss}, {exported:,} as exported."


def _print_difference(adapter: SavedAdapter, output: Path) -> None:
    from ..export import output_difference

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
    with one_clear_error("Nothing was written."):
        if dtype is not None:
            require_known("dtype", dtype, _DTYPES)
        free_folder(output)
        require_adapter(adapter)
        quiet()
        from ..export import merge_adapter

        precision = None if dtype is None else _dtype(dtype)
        merge_adapter(
            adapter, output, dtype=precision, dequantize=dequantize, max_shard_size=max_shard_size, progressbar=True
        )
        size = sum(file.stat().st_size for file in output.iterdir())
        console.print(escape(f"Model: {output}, {size / 2**20:.1f} MiB"), highlight=False)


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _load_lr_lora(saved: SavedAdapter) -> Any:
    from ..saved import load_on_skeleton

    method = saved.config.peft_type.value
    if method != "LRLORA":
        raise ValueError(f"{saved.name} is an adapter of type {method}; only LR-LoRA's need to be exported.")
    return load_on_skeleton(saved)


def _parse_budget(text: str) -> tuple[int, bool]:
    """How many parameters, or the rank of the LoRA whose parameters they are, and whether it is a rank."""
    match = re.fullmatch(r"(r?)(\d+(?:\.\d+)?)([kM]?)", text)
    if match is None or (match[1] and (match[3] or "." in match[2])):
        raise ValueError(f"--budget must be like 250000, 250k, 1.5M or r4, and is {text!r}.")
    return int(float(match[2]) * {"": 1, "k": 1e3, "M": 1e6}[match[3]]), bool(match[1])
