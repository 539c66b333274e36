"""Sizes of a LoRA: in ranks, parameters or bytes."""

from __future__ import annotations

from typing import Any

from ..checks import parse_size
from .adapter import lora_layers, lora_weights

WIDTH = 4  # rank at the start, as a multiple of that of the size
_WIDE = 16  # rank at the start for a size in parameters or bytes


def wide_rank(size: str) -> int:
    """Usual rank to start from."""
    number, unit = parse_size(size, "size")
    return WIDTH * int(number) if unit == "ranks" else _WIDE


def parameters_in(size: str, model: Any, adapter: str, max_rank: int | None = None) -> int:
    """Number of parameters of a size, for a live adapter.

    Raises:
        ValueError: it is not below that of the adapter, or below one rank of its smallest module.

    """
    layers = [(layer.r[adapter], *lora_weights(layer, adapter)) for layer in lora_layers(model, adapter).values()]
    # ZeRO-3 leaves parameters empty.
    counts = [(r, sum(getattr(weight, "ds_numel", weight.numel()) for weight in (A, B))) for r, A, B in layers]
    costs, whole = [count // r for r, count in counts], sum(count for _, count in counts)
    budget = parse_size(size, "size")
    number = budget.parameters(sum(costs), layers[0][1].element_size())
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be an integer ≥ 1, got {max_rank!r}.")
    if number < min(costs):
        hint = f" Did you mean r{size}?" if budget.unit == "parameters" else ""
        raise ValueError(
            f"size={size} is {number:,} parameters, but one rank of the smallest module has {min(costs):,}.{hint}"
        )
    if number >= whole:
        raise ValueError(
            f"size={size} is {number:,} parameters, but must be below the adapter's {whole:,}. Lower it, or raise r of "
            f"LoraConfig: {WIDTH} times the rank of the size is usual."
        )
    return number
