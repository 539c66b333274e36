"""What `lrlora export` and the end of `lrlora train` share: sizes, what is printed of an export, and cuts by loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .common import announce, as_text, console, one_clear_error

if TYPE_CHECKING:
    from ..export import Factors
    from ..lab.by_loss import Cut
    from ..updates import Updates


class Budget(NamedTuple):
    """How much an export may take: a number of `unit`: parameters, bytes, or ranks of LoRA on the same modules."""

    number: float
    unit: str


_SIZES = {"kB": 10**3, "KiB": 2**10, "MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str, option: str) -> Budget:
    """250000, 250k, 1.5M, 8MiB or r4.

    Raises:
        ValueError: it is none of these.

    """
    match = re.fullmatch(r"(r?)(\d+(?:\.\d+)?)([kM]|kB|KiB|[MG]i?B)?", text)
    if match is None or (match[1] and (match[3] or "." in match[2])) or float(match[2]) == 0:
        raise ValueError(f"{option} must be like 250000, 250k, 1.5M, 8MiB or r4, and is {text!r}.")
    number, unit = float(match[2]), match[3]
    if match[1]:
        return Budget(number, "ranks")
    if unit in _SIZES:
        return Budget(number * _SIZES[unit], "bytes")
    return Budget(number * {None: 1, "k": 1e3, "M": 1e6}[unit], "parameters")


def parameters_in(budget: Budget, updates: Updates, dtype: str | None) -> int:
    """How many parameters a size holds, for factors of a dtype; None: as stored."""
    from ..export.factorize import parameters_of_rank

    if budget.unit == "ranks":
        return parameters_of_rank(updates, int(budget.number))
    return int(budget.number / (torch_dtype(dtype, updates).itemsize if budget.unit == "bytes" else 1))


def torch_dtype(name: str | None, updates: Updates) -> Any:
    """The dtype of this name, or that which the updates were stored in."""
    import torch

    from ..export.adapter import stored_dtype

    return stored_dtype(updates.origin) if name is None else getattr(torch, name)


def write_factors(
    factors: Sequence[Factors],
    updates: Updates,
    output: Path,
    *,
    dtype: str | None,
    pad: bool,
    config_only: bool,
    every: bool,
) -> None:
    """Print a table of the factors, and write them, or their configuration alone."""
    from ..compress import save
    from ..export import save_lora_config
    from ..export.table import factors_table

    title = as_text(f"LoRA for {updates.name} ({updates.method})")
    console.print(factors_table(factors, title, width=console.width, every=every))
    for note in updates.notes:
        announce(note)
    if config_only:
        save_lora_config(factors, updates, output)
        announce(f"To train with: LoraConfig.from_pretrained({str(output)!r})")
        return
    announce(_sizes(updates, sum(part.parameters for part in factors)))
    size_on_disk = save(factors, updates, output, dtype=torch_dtype(dtype, updates), pad=pad)
    announce(f"LoRA: {output}, {size_on_disk / 2**20:.2f} MiB")


def _sizes(updates: Updates, exported: int) -> str:
    from ..export.factorize import exact_parameters
    from ..updates.peft_adapter import parameters_as_trained

    trained = parameters_as_trained(updates)
    exact = None if updates.method == "DoRA" else exact_parameters(updates)  # it has magnitudes besides
    as_trained = "" if trained is None else f"{trained:,} as trained, "
    without_loss = "" if exact in (None, trained) else f"{exact:,} as LoRA without loss, "
    return f"Parameters: {as_trained}{without_loss}{exported:,} as exported."


@dataclass(frozen=True)
class Size:
    """How small an export by loss is to be: within a rise of the loss, or a size; and no rank above a largest."""

    loss: float | None
    budget: Budget | None
    max_rank: int | None

    def choose(self, cut: Cut, updates: Updates, dtype: str | None) -> list[Factors]:
        """The factors for it."""
        if self.loss is not None:
            return cut.smallest(self.loss, self.max_rank)
        size = cut.curve.parameters if self.budget is None else parameters_in(self.budget, updates, dtype)
        return cut.curve.within(size, self.max_rank)


def export_by_loss(
    source: str,
    output: Path,
    size: Size,
    examples: Mapping[str, Any],
    *,
    steps: int,
    base: str | None,
    dtype: str | None,
    check: bool,
    **writing: Any,
) -> None:
    """Export what matters to the loss of examples."""
    from ..lab.by_loss import Cut, Subject, heal

    subject = Subject.read(source, base=base, announce=announce, **examples)
    cut = Cut(subject, progressbar=True)
    factors = size.choose(cut, subject.updates, dtype)
    announce(f"Loss of the adapter: {cut.loss:.4g}; {_compared('as cut', cut.measure(factors), cut)}")
    write_factors(factors, subject.updates, output, dtype=dtype, **writing)
    if writing["config_only"]:
        return
    with one_clear_error("The LoRA is written as it was cut."):
        if steps:
            heal(subject, output, steps, announce)
        if check:
            announce(f"Loss of {output} {_compared('as loaded by PEFT', cut.loss_of(output), cut)}")


def _compared(which: str, loss: float, cut: Cut) -> str:
    return f"{which}: {loss:.4g} ({(loss - cut.loss) / abs(cut.loss):+.2%})"
