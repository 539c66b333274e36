"""Sizes of a LoRA: in ranks, parameters or bytes."""

from __future__ import annotations

from peft import PeftModel

from ..checks import parse_size
from .adapter import lora_layers, lora_weights

WIDTH = 4  # rank at the start, as a multiple of that of the size
_WIDE = 16  # rank at the start for a size in parameters or bytes


def wide_rank(size: str) -> int:
    """Usual rank to start from."""
    number, unit = parse_size(size, "size")
    return WIDTH * int(number) if unit == "ranks" else _WIDE


def costs_of(model: PeftModel, adapter: str) -> dict[str, int]:
    """Module → number of parameters of one rank."""
    return {
        path: sum(getattr(w, "ds_numel", w.numel()) for w in lora_weights(layer, adapter)) // layer.r[adapter]
        for path, layer in lora_layers(model, adapter).items()  # ZeRO-3 leaves parameters empty
    }


def parameters_in(size: str, model: PeftModel, adapter: str, max_rank: int | None = None) -> int:
    """Number of parameters of a size, for a live adapter.

    Raises:
        ValueError: it is not below that of the adapter, or below one rank of its smallest module.

    """
    layers, costs = lora_layers(model, adapter), costs_of(model, adapter)
    whole = sum(cost * layers[path].r[adapter] for path, cost in costs.items())
    budget, (first, *_) = parse_size(size, "size"), layers.values()
    number = budget.parameters(sum(costs.values()), lora_weights(first, adapter)[0].element_size())
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be an integer ≥ 1, got {max_rank!r}.")
    fewest = min(costs.values())
    if number < fewest:
        hint = f" Did you mean r{size}?" if budget.unit == "parameters" else ""
        raise ValueError(
            f"size={size} is {number:,} parameters, but one rank of the smallest module has {fewest:,}.{hint}"
        )
    if number >= whole:
        raise ValueError(
            f"size={size} is {number:,} parameters, but must be below the adapter's {whole:,}. Lower it, or raise r of "
            f"LoraConfig: {WIDTH} times the rank of the size is usual."
        )
    return number
