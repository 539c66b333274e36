"""`rank_report`: measure the update of every adapted module of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..distributed import gathered, shard_owners
from ..naming import layer_index, module_kind, module_type, path_in_base
from ..ops import at_least_float32, singular_values_of_product
from ..transfer import Transfer
from .measures import MEASURES, curvature, spectrum
from .report import Curve, RankReport, RankRow, Spectrum

CURVE_POINTS = 201
SPECTRUM_POINTS = 64
SMALLEST_SHARE = 1e-4


def rank_report(model: nn.Module, adapter: str | None = None, *, progressbar: bool = False) -> RankReport:
    """Measure the update of every module that LR-LoRA or plain LoRA adapts in a PEFT model.

    Of a model that FSDP2 has sharded, one wrapped module at a time is gathered: all processes have to call it together.

    Args:
        model: a PEFT model, not merged.
        adapter: name of the adapter; default: the active one.
        progressbar: show one; a 4096 × 4096 layer takes several seconds on a CPU.

    Raises:
        ValueError: no module has an adapter of this name, the adapter is merged into the base weights, or an update
            is not finite.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from lrlora import LrLoraConfig, rank_report
        >>> base = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> config = LrLoraConfig(r=2, target_modules=["0"], init_weights=False)  # B at random: as if trained
        >>> report = rank_report(get_peft_model(base, config))
        >>> [(row.module, row.r, row.energy99_rank >= 2) for row in report.rows]
        [('0', 2, True)]

    """
    layers = [
        (path_in_base(path), module, adapter or next(iter(module.active_adapters), None))
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and {"lrlora_A", "lora_A"} & set(module.adapter_layer_names)
    ]
    measured = [(path, layer, name) for path, layer, name in layers if name in layer._get_available_adapters()]
    if not measured:
        known = sorted({name for _, layer, _ in layers for name in layer._get_available_adapters()})
        if not known:
            raise ValueError("The model has no LR-LoRA or LoRA adapter to measure.")
        raise ValueError(f"No module has an adapter named {adapter!r}. Adapters there are: {', '.join(known)}.")
    if any(layer.merged for _, layer, _ in measured):
        raise ValueError("The adapter is merged, and rank_report needs the base weights: call unmerge_adapter() first.")
    report = RankReport([])
    owners = shard_owners(model)
    for path, layer, name in tqdm(measured, desc="Measuring ranks", disable=not progressbar):
        with gathered(layer, owners):
            parts = list(_measure(path, layer, name))
        for row, curve, values in parts:
            report.rows.append(row)
            if curve is not None:
                report.curves[row.module] = curve
            if values.number:
                report.spectra[row.module] = values
    return report


@torch.no_grad()
def _measure(path: str, layer: Any, adapter: str) -> Iterator[tuple[RankRow, Curve | None, Spectrum]]:
    """Row, curve and spectrum of each matrix of a layer: one, or one for each of its stacked experts."""
    is_learned = adapter in getattr(layer, "lrlora_phi", {})
    thin = layer.thin_factors(adapter) if is_learned else _lora_factors(layer, adapter)
    linear = layer.linear_factors(adapter) if is_learned else None
    deltas = layer.get_delta_weight(adapter) if thin is None else None
    phi = layer.lrlora_phi[adapter] if is_learned else None
    inputs = layer.get_transfer_input(adapter) if isinstance(phi, Transfer) else None
    weights, r = _base_weight(layer), layer.r[adapter]
    parameter = getattr(layer, "parameter_name", None)
    if parameter is not None:
        path = f"{path.replace('.base_layer', '')}.{parameter}"  # wrappers of parameters are nested
    is_stack = parameter is not None and layer.get_param().dim() == 3
    names = [f"{path}.{expert}" for expert in range(layer.num_experts)] if is_stack else [path]
    for index, name in enumerate(names):
        phi_zero, bend, curve = 0.0, 0.0, None
        if deltas is None:
            U, V = _factors_of(thin, index)
            require_finite(name, U, V)
            energies = singular_values_of_product(U, V).square()
            m, n, limit = len(U), V.shape[1], len(energies)
        else:
            delta = (deltas[index] if is_stack else deltas).flatten(1)
            require_finite(name, delta)
            energies = spectrum(delta)
            is_transposed = isinstance(layer.get_base_layer(), Conv1D) or getattr(layer, "_is_transposed", False)
            m, n = delta.T.shape if is_transposed else delta.shape
            limit = len(energies) if is_learned else r
            if isinstance(phi, Transfer) and inputs is not None:
                z = (inputs[index] if is_stack else inputs).flatten(1)
                # `phi.forward` and not `phi`: FSDP2 takes the first call of a module it has wrapped for the model's.
                phi_zero, bend, curve = phi.forward(z.new_zeros(())).item(), curvature(z, delta), _sample(phi, z)
        plain: list[float] = []
        if linear is not None:
            require_finite(name, *_factors_of(linear, index))
            plain = _short(_of_note(singular_values_of_product(*_factors_of(linear, index))))
        weight_norm = 0.0
        if weights is not None:
            weight_norm = (weights[index] if is_stack else weights).double().norm().item()
        row = RankRow(
            module=name,
            layer=layer_index(name),
            type=module_type(name),
            kind=module_kind(name),
            m=m,
            n=n,
            r=r,
            relative_norm=energies.sum().sqrt().item() / weight_norm if weight_norm > 0 else None,
            phi_zero=phi_zero,
            curvature=bend,
            rank_limit=limit,
            **{name: measure.of(energies) for name, measure in MEASURES.items()},  # type: ignore[arg-type]
        )
        yield row, curve, _thinned(energies.sqrt(), plain)


def _factors_of(factors: Any, index: int) -> tuple[Tensor, Tensor]:
    """The two factors of a matrix, or of one of several that are stacked."""
    U, V = factors
    return (U[index], V[index]) if U.dim() == 3 else (U, V)


def _lora_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """(s·B, A) of PEFT's LoRA on a linear layer; None on other layers."""
    if hasattr(layer, "parameter_name") or adapter not in layer.lora_A:
        return None
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not (isinstance(A, nn.Linear) and isinstance(B, nn.Linear)):
        return None
    return layer.scaling[adapter] * at_least_float32(B.weight), A.weight


def _base_weight(layer: Any) -> Tensor | None:
    """The base weight; None where it is offloaded, not there, or quantised in a way that cannot be undone."""
    try:
        weight: Tensor = layer.get_param().data if hasattr(layer, "get_param") else layer.get_base_weight()
    except (TypeError, NotImplementedError):
        return None
    # A skeleton's is one zero, seen as a matrix: as float64, that of a large layer would take gigabytes.
    return None if weight.is_meta or not any(weight.stride()) else weight


def _sample(phi: Transfer, z: Tensor) -> Curve:
    """φ, learned and at the start, at equally spaced points over the central 99 % of the entries of z."""
    some = z.flatten()[:: 1 + z.numel() // 2**15].float()
    start, end = some.quantile(some.new_tensor([0.005, 0.995])).tolist()
    grid = torch.linspace(start, end, CURVE_POINTS, device=z.device)
    untrained = Transfer(phi.spec).to(z.device)
    counts = torch.histc(some, CURVE_POINTS - 1, start, end) if end > start else grid.new_zeros(CURVE_POINTS - 1)
    return Curve(_short(grid), _short(phi.forward(grid)), _short(untrained(grid)), _short(counts / some.numel()))


def _of_note(sigma: Tensor) -> Tensor:
    """Of descending singular values those above a ten-thousandth of the first."""
    return sigma[: int((sigma > SMALLEST_SHARE * sigma[0]).sum())]


def _thinned(sigma: Tensor, linear: list[float]) -> Spectrum:
    """Of descending singular values those that a logarithmic axis can tell apart."""
    count = len(_of_note(sigma))
    some = torch.logspace(0, math.log10(max(count, 1)), SPECTRUM_POINTS).round().int().tolist()
    index = [i for i in sorted({*range(1, 33), *some}) if i <= count]
    return Spectrum(index, _short(sigma[[i - 1 for i in index]]), linear)


def _short(values: Tensor) -> list[float]:
    """Six digits are enough to draw, and a third of the file."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def require_finite(name: str, *parts: Tensor) -> None:
    """Raise a ValueError unless the update of a module, or all factors of it, are finite."""
    if not all(torch.isfinite(part).all() for part in parts):
        raise ValueError(
            f"The update of {name} holds NaN or infinite values. Training has diverged: go back to an earlier "
            "checkpoint."
        )
