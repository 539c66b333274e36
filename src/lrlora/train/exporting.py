"""Export of an adapter as a plain LoRA: by loss on examples, or by energy."""

from __future__ import annotations

import copy
import math
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import Factors, Updates, factorize, output_difference, read_updates, save, save_as_lora
from ..adapters.card import LORA_FOLDER
from ..adapters.factorize import parameters_of_rank
from ..adapters.loading import check_layers
from ..adapters.lora_file import free_file
from ..adapters.peft_folder import SavedAdapter
from ..adapters.servers import SERVERS, served
from ..checks import DEFAULT_ENERGY, DEFAULT_KEEP, check_truncation, require_known
from ..files import free_folder, write_json
from ..learned.cut import Cut, Size
from ..learned.gain import mean_of
from ..locks import only_writer, remove_left
from ..lora.config import require_exportable
from ..run_folder import RUN_FILE
from ..shrunk import SHRUNK_FILE, Shrunk
from ..sources import require_source
from ..straightened import STRAIGHTENED_FILE
from ..views.model_card import write_card
from .progress import Announce
from .settings import TrainConfig

if TYPE_CHECKING:
    from .compression import Compression  # imports `datasets`, which a cut by energy does without

Show = Callable[[Sequence[Factors], Updates], None]


def export(
    source: str,
    output: Path,
    *,
    keep: float | None = None,
    size: Size | None = None,
    max_rank: int | None = None,
    energy: float | None = None,
    by: str | None = None,
    examples: Mapping[str, Any] | None = None,
    base: str | None = None,
    dtype: str | None = None,
    server: str | None = None,
    check: bool = True,
    show: Show = lambda factors, updates: None,
    announce: Announce = print,
) -> None:
    """Write an adapter as a plain LoRA of the requested size, as `lrlora export` does.

    Args:
        source: PEFT adapter (folder or hub name), or LoRA in a .safetensors file.
        output: folder to write, new or empty; for a single file, a new file. Written atomically.
        keep: share of the gain on held-out examples that the smallest LoRA keeps.
        size: size instead of a share.
        max_rank: largest rank of any module.
        energy: share of each module's ‖ΔW‖² to keep; default: 0.99, without a size.
        by: "loss" or "energy", the criterion that fills a size; default: loss for a run, or with examples.
        examples: arguments of `Subject.read` on the examples, such as `data`.
        base: base model; default: the one named by the adapter.
        dtype: "float32", "bfloat16" or "float16"; default: as stored.
        server: name in `SERVERS` of the program that loads it; default: peft.
        check: load the base model and measure the difference that the export makes.
        show: receives the factors before they are written.
        announce: receives messages.

    Raises:
        FileExistsError: the output exists.
        FileNotFoundError: the source, its base model or the examples are missing.
        ValueError: an option is invalid or does not fit the source; or the LoRA, which is written, loses much more than
            the cut did.
        KeyboardInterrupt: stopped; the message says what is written.

    """
    examples = {name: value for name, value in (examples or {}).items() if value is not None}
    with only_writer(output):
        is_file = Path(source).is_file()
        if server is not None:
            require_known("--for", server, ("peft", "hot-swap") if is_file else SERVERS)
        loss_settings = {"keep": keep, **examples, "by loss": by if by == "loss" else None}
        loss_options = [f"--{name.replace('_', '-')}" for name, value in loss_settings.items() if value is not None]
        is_by_loss = _is_by_loss(source, by, loss_options, energy=energy, size=keep or size, max_rank=max_rank)
        if all(value is None for value in (energy, keep, size, max_rank)):
            energy = DEFAULT_ENERGY
        check_truncation(energy=energy, keep=keep, max_rank=max_rank, size=size)
        if not is_file:
            if output.suffix == ".safetensors":
                raise ValueError(
                    f"The export of {source} is a folder, but --output {output} names a file. Choose another."
                )
            free_folder(output)
        require_source(source)
        if server is not None and not is_file:
            saved = SavedAdapter.read(source)
            config = copy.copy(saved.config)
            config.use_dora = False  # DoRA may become a plain LoRA
            SERVERS[server].require_readable(config, saved.other_weights(with_magnitudes=False))
        write_options: dict[str, Any] = {"dtype": dtype, "server": server, "show": show, "announce": announce}
        if is_by_loss:
            compression = _compression(
                source,
                base,
                examples,
                is_requested=bool(loss_options),
                with_metric=check,
                for_share=keep is not None,
                announce=announce,
            )
            if compression is not None:
                _export_by_loss(compression, output, keep, size, max_rank, check=check, **write_options)
                return
        elif size is not None and by is None and not is_file:
            announce("Cutting by energy; pass --data to cut by the loss of examples.")
        if is_file:
            free_file(output)
        updates = _read(source, base, check=check)
        budget = None if size is None else _parameters_in(size, updates, dtype)
        factors = factorize(updates, energy=energy, budget=budget, max_rank=max_rank, progressbar=True)
        _write(factors, updates, output, **write_options)
    if check:
        with _written("The LoRA is written, but not compared with the original."):
            _check_difference(updates, factors, output, announce)


def fill_smallest(run: TrainConfig, announce: Announce) -> None:
    """Measure the smallest size of a finished run's LoRA, and what φ is worth; write it if the run asks for a cut."""
    from .compression import Compression, Subject, record_shrunk

    folder = Path(run.output)
    subject = Subject.read(str(folder), announce=announce)
    compression = Compression(subject, announce=announce)
    if (bend := compression.straightened()) is not None:
        write_json(folder / STRAIGHTENED_FILE, asdict(bend))
        announce(str(bend))
        write_card(folder)
    cut = run.cut or Cut(keep=DEFAULT_KEEP)
    try:
        factors, record = _cut(compression, cut.keep, cut.size, None, None)
    except ValueError as error:
        if cut.keep is None:
            raise
        announce(f"The smallest LoRA was not chosen: {error}")  # the run is finished
        return
    record_shrunk(folder, record)
    announce(str(record))
    if run.filled_by is None:
        command = ["lrlora", "export", str(folder), "--keep", str(cut.keep), "--output", f"{folder}-small"]
        announce(f"To write it: {shlex.join(command)}")
        return
    remove_left(folder)  # by a killed process
    with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as scratch:
        save_as_lora(factors, subject.updates, Path(scratch) / LORA_FOLDER)
        shutil.rmtree(folder / LORA_FOLDER, ignore_errors=True)
        (Path(scratch) / LORA_FOLDER).rename(folder / LORA_FOLDER)
    announce(f"It is in {folder / LORA_FOLDER}.")


@contextmanager
def _written(state: str) -> Iterator[None]:
    """Tell what is written if the user stops what follows."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted. {state}") from None


def _is_by_loss(
    source: str, by: str | None, loss_options: list[str], *, energy: float | None, size: Any, max_rank: int | None
) -> bool:
    """Whether to cut by loss: if asked for, or if the source is a run, whose data is known, and a size is given.

    A maximum rank alone is a quick cut by energy, as for any adapter.
    """
    require_known("--by", by or "loss", ("loss", "energy"))
    energy_option = "--by energy" if by == "energy" else "--energy" if energy is not None else None
    if loss_options and energy_option:
        raise ValueError(f"{loss_options[0]} cuts by loss, but {energy_option} by energy. Pass only one of them.")
    if loss_options and size is None and max_rank is None:
        raise ValueError(f"{loss_options[0]} cuts by loss and needs a size: --keep, --size or --max-rank.")
    is_run = (Path(source) / RUN_FILE).is_file()
    if energy_option or not (loss_options or (is_run and size is not None)):
        return False
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a single file, which does not name its base model, so its loss cannot be measured. Cut it by "
            "energy: pass --size, --max-rank or --energy only."
        )
    return True


def _compression(
    source: str,
    base: str | None,
    examples: Mapping[str, Any],
    *,
    is_requested: bool,
    announce: Announce,
    **options: Any,
) -> Compression | None:
    """Prepare a cut by loss; None if its loss cannot be measured, unless `is_requested`, which raises."""
    from .compression import Compression, Subject

    try:
        if getattr(SavedAdapter.read(source).config, "target_parameters", None):
            raise ValueError(
                f"{source} adapts experts in one parameter, whose ranks are cut by energy alone. Pass --energy, --size "
                "or --max-rank without data."
            )
        subject = Subject.read(source, base=base, announce=announce, **examples)
        return Compression(subject, announce=announce, **options)
    except (ValueError, OSError) as error:
        if is_requested:
            raise
        announce(f"Cutting by energy instead of by loss: {error}")
        return None


def _read(source: str, base: str | None, *, check: bool) -> Updates:
    is_model = base is not None and not Path(base).is_file()
    origin = SavedAdapter.read(source).on_base(base) if is_model and not Path(source).is_file() else source
    return check_layers(read_updates(origin, base=base), by_name=not check)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _parameters_in(size: Size, updates: Updates, dtype: str | None) -> int:
    """Number of parameters of a size, for factors of a dtype; None: as stored."""
    itemsize = (_dtype(dtype) or updates.origin.stored_dtype).itemsize
    return size.parameters(parameters_of_rank(updates, 1), itemsize)


def _cut(
    compression: Compression, keep: float | None, size: Size | None, max_rank: int | None, dtype: str | None
) -> tuple[list[Factors], Shrunk]:
    """Factors of a cut by loss, by share of the gain to keep, size or maximum rank; and their record."""
    if keep is not None:
        return compression.smallest(keep, max_rank)
    budget = None if size is None else _parameters_in(size, compression.subject.updates, dtype)
    return compression.within(budget, max_rank)


def _export_by_loss(
    compression: Compression,
    output: Path,
    keep: float | None,
    size: Size | None,
    max_rank: int | None,
    *,
    check: bool,
    announce: Announce,
    **write_options: Any,
) -> None:
    """Export the directions that matter to the loss of examples."""
    factors, record = _cut(compression, keep, size, max_rank, write_options["dtype"])
    _write(factors, compression.subject.updates, output, announce=announce, **write_options)
    announce(f"Loss as cut, on the last third: {mean_of(compression.last.losses(factors)):.4g}.")
    with _written("The LoRA is written as it was cut."):
        if check:
            record = _check_loaded(compression, output, record, announce)
    write_json(output / SHRUNK_FILE, asdict(record))
    announce(str(record))


def _write(
    factors: Sequence[Factors],
    updates: Updates,
    output: Path,
    *,
    dtype: str | None,
    server: str | None,
    show: Show,
    announce: Announce,
) -> None:
    """Show the factors, and write them."""
    if isinstance(updates.origin, SavedAdapter):
        require_exportable(updates.origin.config)
    show(factors, updates)
    for note in updates.notes:
        announce(note)
    magnitudes = sum(update.shape[0] for update in updates) if updates.have_magnitudes else 0
    announce(_sizes(updates, sum(pair.parameters for pair in factors) + magnitudes))
    size_on_disk = save(factors, updates, output, dtype=_dtype(dtype), server=server or "peft")
    announce(f"LoRA: {output}, {size_on_disk / 2**20:.2f} MiB")
    ranks = [(pair.rank, pair.parameters_per_rank) for pair in factors]
    written = SavedAdapter.read(str(output)) if output.is_dir() else None
    keys = () if written is None else written.other_weights(with_magnitudes=False)
    if line := served(ranks, None if written is None else written.config, server, keys):
        announce(line)


def _sizes(updates: Updates, exported: int) -> str:
    trained, exact = updates.origin.parameters, None
    if updates.are_products and updates.method != "DoRA":  # which has magnitudes besides
        exact = sum(update.limit * sum(update.shape) for update in updates)
    as_trained = "" if trained is None else f"{trained:,} as trained, "
    without_loss = "" if exact in (None, trained) else f"{exact:,} as LoRA without loss, "
    return f"Parameters: {as_trained}{without_loss}{exported:,} as exported."


def _check_loaded(compression: Compression, output: Path, record: Shrunk, announce: Announce) -> Shrunk:
    """Measure the saved LoRA as PEFT loads it; raise ValueError if it keeps much less of the gain than the cut did."""
    losses = compression.losses_as_loaded(output)
    kept = None if record.kept is None else compression.last.gain.kept(losses)
    share = "" if kept is None else f", {kept} of the gain kept"
    announce(f"As loaded by PEFT from {output}: {mean_of(losses):.4g}{share}.")
    if record.kept is not None and kept is not None and record.kept.share - kept.share > 0.5:
        raise ValueError(
            f"{output} is written, but as loaded by PEFT it loses more than half of the adapter's gain, which the cut "
            "did not. Do not use it; merge the adapter "
            "instead (model.merge_and_unload(safe_merge=True))."
        )
    record = replace(record, kept=kept)
    if compression.metric is None or (after := compression.metric_of(compression.subject.model)) is None:
        return record
    name, before = compression.metric
    return replace(record, metrics={name: [before, after[1]]})


def _check_difference(updates: Updates, factors: Sequence[Factors], output: Path, announce: Announce) -> None:
    """Compare the adapter and its export; raise ValueError if their outputs differ far more than they should."""
    if not isinstance(updates.origin, SavedAdapter):
        return  # a single file does not name its base model
    try:
        difference = output_difference(updates.origin, output)
    except Exception as error:  # the export is written, whatever a model raises on random inputs
        reason = " ".join(str(error).split()) or type(error).__name__
        announce(f"The export could not be compared with the original: {reason}")
        return
    if not math.isfinite(difference):
        raise ValueError("On random inputs, the outputs of the adapter or of its export are not finite.")
    announce(f"On random inputs {difference:.2%} of the adapter's effect on the last hidden state is lost")
    kept = min(pair.kept for pair in factors if pair.energy)
    if difference > 0.5 and kept >= DEFAULT_ENERGY:  # a cut to less may lose as much
        raise ValueError(
            f"{output} is written, but {difference:.0%} of the adapter's effect is lost, although every module keeps "
            f"at least {kept:.2%} of its energy. Do not use it; merge the adapter "
            "instead (model.merge_and_unload(safe_merge=True))."
        )
