"""Exports by size or loss, for `lrlora export` and the end of `lrlora train`."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import DEFAULT_KEEP
from ..files import write_json
from ..learned.size import Size
from ..shrunk import SHRUNK_FILE, Shrunk
from ..straightened import STRAIGHTENED_FILE
from .common import announce, as_text, console, one_clear_error

if TYPE_CHECKING:
    from ..adapters import Factors, Updates
    from ..train.compression import Compression
    from ..train.settings import TrainConfig


def parameters_in(size: Size, updates: Updates, dtype: str | None) -> int:
    """Number of parameters of a size, for factors of a dtype; None: as stored."""
    from ..adapters.factorize import parameters_of_rank

    return size.parameters(parameters_of_rank(updates, 1), torch_dtype(dtype, updates.origin.stored_dtype).itemsize)


def torch_dtype(name: str | None, stored: Any = None) -> Any:
    """Dtype of this name; the stored one without a name."""
    import torch

    return stored if name is None else getattr(torch, name)


def write_factors(
    factors: Sequence[Factors],
    updates: Updates,
    output: Path,
    *,
    dtype: str | None,
    server: str | None,
    every: bool,
) -> None:
    """Print a table of the factors, and write them."""
    from peft import PeftConfig

    from ..adapters import save
    from ..adapters.peft_folder import SavedAdapter
    from ..adapters.servers import served
    from ..lora.config import require_exportable
    from ..views.tables import factors_table

    if isinstance(updates.origin, SavedAdapter):
        require_exportable(updates.origin.config)
    title = as_text(f"LoRA for {updates.name} ({updates.method})")
    console.print(factors_table(factors, title, width=console.width, every=every))
    for note in updates.notes:
        announce(note)
    announce(_sizes(updates, sum(part.parameters for part in factors)))
    size_on_disk = save(factors, updates, output, dtype=torch_dtype(dtype), server=server or "peft")
    announce(f"LoRA: {output}, {size_on_disk / 2**20:.2f} MiB")
    ranks = [(part.rank, part.parameters_per_rank) for part in factors]
    if line := served(ranks, PeftConfig.from_pretrained(str(output)) if output.is_dir() else None, server):
        announce(line)


def _sizes(updates: Updates, exported: int) -> str:
    trained, exact = updates.origin.parameters, None
    if updates.are_products and updates.method != "DoRA":  # which has magnitudes besides
        exact = sum(update.limit * sum(update.shape) for update in updates)
    as_trained = "" if trained is None else f"{trained:,} as trained, "
    without_loss = "" if exact in (None, trained) else f"{exact:,} as LoRA without loss, "
    return f"Parameters: {as_trained}{without_loss}{exported:,} as exported."


def _chosen(
    compression: Compression, keep: float | None, size: Size | None, max_rank: int | None, dtype: str | None
) -> tuple[list[Factors], Shrunk]:
    """Factors of a cut by loss, by share of the gain to keep, size or maximum rank; and their record."""
    if keep is not None:
        return compression.smallest(keep, max_rank)
    budget = None if size is None else parameters_in(size, compression.subject.updates, dtype)
    return compression.within(budget, max_rank)


def compression_of(
    source: str, base: str | None, examples: Mapping[str, Any], *, is_asked_for: bool, check: bool, for_share: bool
) -> Compression | None:
    """Prepare a cut by loss; None if its loss cannot be measured, unless `is_asked_for`, which raises."""
    from ..train.compression import Compression, Subject

    try:
        given = {name: value for name, value in examples.items() if value is not None}
        subject = Subject.read(source, base=base, announce=announce, **given)
        return Compression(subject, with_metric=check, for_share=for_share, announce=announce)
    except (ValueError, OSError) as error:
        if is_asked_for:
            raise
        announce(f"Cutting by energy instead of by loss: {error}")
        return None


def export_by_loss(
    compression: Compression,
    output: Path,
    keep: float | None,
    size: Size | None,
    max_rank: int | None,
    *,
    check: bool,
    **writing: Any,
) -> None:
    """Export the directions that matter to the loss of examples."""
    from ..learned.gain import mean_of

    factors, found = _chosen(compression, keep, size, max_rank, writing["dtype"])
    write_factors(factors, compression.subject.updates, output, **writing)
    losses = compression.last.losses(factors)
    announce(f"Loss as cut: {mean_of(losses):.4g}.")
    with one_clear_error("The LoRA is written as it was cut."):
        if check:
            found = _check_loaded(compression, output, found)
    write_json(output / SHRUNK_FILE, asdict(found))
    announce(str(found))


def _check_loaded(compression: Compression, output: Path, found: Shrunk) -> Shrunk:
    """Measure the saved LoRA as PEFT loads it; raise ValueError if it keeps much less of the gain than the cut did."""
    from ..learned.gain import mean_of

    losses = compression.losses_as_loaded(output)
    kept = None if found.kept is None else compression.last.gain.kept(losses)
    share = "" if kept is None else f", {kept} of the gain kept"
    announce(f"As loaded by PEFT from {output}: {mean_of(losses):.4g}{share}.")
    if found.kept is not None and kept is not None and found.kept.share - kept.share > 0.5:
        raise ValueError(
            f"{output} is written, but as loaded by PEFT it loses more than half of the adapter's gain, which the cut "
            "did not. Do not use it; merge the adapter instead (lrlora merge)."
        )
    found = replace(found, kept=kept)
    if compression.metric is None or (after := compression.metric_of(compression.subject.model)) is None:
        return found
    name, before = compression.metric
    return replace(found, metrics={name: [before, after[1]]})


def show_smallest(run: TrainConfig) -> None:
    """Measure and print the smallest size of a finished run's LoRA; write it if the run sets a size or a share."""
    from ..adapters import save_as_lora
    from ..adapters.card import LORA_FOLDER
    from ..locks import remove_left
    from ..train.compression import Compression, Subject, record_shrunk
    from ..views.model_card import write_card

    folder = Path(run.output)
    subject = Subject.read(str(folder), announce=announce)
    compression = Compression(subject, announce=announce)
    if (bend := compression.straightened()) is not None:
        write_json(folder / STRAIGHTENED_FILE, asdict(bend))
        announce(str(bend))
        write_card(folder)
    keep = (run.learned_share or run.keep or DEFAULT_KEEP) if run.size is None else None
    size = None if run.size is None else Size.parse(run.size, "--size")
    try:
        factors, found = _chosen(compression, keep, size, None, None)
    except ValueError as error:
        if keep is None:
            raise
        announce(f"The smallest LoRA was not chosen: {error}")  # the run is finished
        return
    record_shrunk(folder, found)
    announce(str(found))
    if run.filled_by is None:
        command = ["lrlora", "export", str(folder), "--keep", str(keep), "--output", f"{folder}-small"]
        announce(f"To write it: {shlex.join(command)}")
        return
    remove_left(folder)  # by a killed process
    with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as scratch:
        save_as_lora(factors, subject.updates, Path(scratch) / LORA_FOLDER)
        shutil.rmtree(folder / LORA_FOLDER, ignore_errors=True)
        (Path(scratch) / LORA_FOLDER).rename(folder / LORA_FOLDER)
    announce(f"It is in {folder / LORA_FOLDER}.")
