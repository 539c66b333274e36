"""`rank_report`: measure the update of every adapted module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters import Update, Updates
from ..adapters.layers import updates_of_model
from ..adapters.update import require_finite
from ..naming import layer_index, module_kind, module_type
from ..ops import singular_values_of_product
from ..ops.transfer import Transfer
from .measures import MEASURES, curvature, spectrum
from .report import Curve, RankReport, RankRow, Spectrum

CURVE_POINTS = 201
# Spectra store the first FIRST_VALUES values in full, and SPECTRUM_POINTS log-spaced indices overall.
FIRST_VALUES, SPECTRUM_POINTS = 64, 64
SMALLEST_SHARE = 1e-4


def rank_report(source: nn.Module | Updates, adapter: str | None = None, *, progressbar: bool = False) -> RankReport:
    """Measure the update of every module that an adapter changes.

    On an FSDP2-sharded model, gathers one wrapped module at a time; call it on all processes.

    Args:
        source: an unmerged PEFT model with an adapter of any mergeable method, or the result of
            `lrlora.adapters.read_updates`.
        adapter: name of the adapter in the model; default: the active one.
        progressbar: show a progress bar; a dense 4096 × 4096 matrix takes several seconds on a CPU.

    Raises:
        ValueError: no module has this adapter, the adapter is merged into the base weights, or an update is not finite.

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
    report = RankReport([])
    updates = source if isinstance(source, Updates) else updates_of_model(source, adapter)
    total = len(updates) if isinstance(updates, Updates) else None
    for update in tqdm(updates, total=total, desc="Measuring ranks", disable=not progressbar):
        row, curve, values = _measure(update)
        report.rows.append(row)
        if curve is not None:
            report.curves[row.module] = curve
        if values.number:
            report.spectra[row.module] = values
    return report


@torch.no_grad()
def _measure(update: Update) -> tuple[RankRow, Curve | None, Spectrum]:
    """Row, curve of φ, and spectrum of a module's update."""
    learned = update.learned
    phi_zero, bend, curve = 0.0, 0.0, None
    factors = update.factors()
    if factors is not None:
        energies = singular_values_of_product(*factors).square()
    else:
        delta = update.matrix()
        energies = spectrum(delta)
        if learned is not None and (phi := learned.phi) is not None:
            z = learned.transfer_input()
            # `phi.forward` instead of `phi`: FSDP2 treats the first call of a wrapped module as the model's.
            phi_zero, bend, curve = phi.forward(z.new_zeros(())).item(), curvature(z, delta), _sample(phi, z)
    plain: list[float] = []
    if learned is not None:
        linear = learned.linear()
        require_finite(update.module, *linear)
        plain = _short(_of_note(singular_values_of_product(*linear)))
    norm = update.weight_norm()
    row = RankRow(
        module=update.module,
        layer=layer_index(update.module),
        type=module_type(update.module),
        kind=module_kind(update.module),
        m=update.shape[0],
        n=update.shape[1],
        r=update.r,
        relative_norm=None if norm is None else energies.sum().sqrt().item() / norm,
        phi_zero=phi_zero,
        curvature=bend,
        rank_limit=update.limit,
        **{name: measure.of(energies) for name, measure in MEASURES.items()},  # type: ignore[arg-type]
    )
    return row, curve, _thinned(energies.sqrt(), plain)


def _sample(phi: Transfer, z: Tensor) -> Curve:
    """φ, learned and initial, at equally spaced points over the central 99 % of the entries of z."""
    some = z.flatten()[:: 1 + z.numel() // 2**15].float()
    start, end = some.quantile(some.new_tensor([0.005, 0.995])).tolist()
    grid = torch.linspace(start, end, CURVE_POINTS, device=z.device)
    untrained = Transfer(phi.spec).to(z.device)
    counts = torch.histc(some, CURVE_POINTS - 1, start, end) if end > start else grid.new_zeros(CURVE_POINTS - 1)
    return Curve(_short(grid), _short(phi.forward(grid)), _short(untrained(grid)), _short(counts / some.numel()))


def _of_note(sigma: Tensor) -> Tensor:
    """Select descending singular values above 1e-4 of the first."""
    return sigma[: int((sigma > SMALLEST_SHARE * sigma[0]).sum())]


def _thinned(sigma: Tensor, linear: list[float]) -> Spectrum:
    """Select descending singular values distinguishable on a log axis."""
    count = len(_of_note(sigma))
    some = torch.logspace(0, math.log10(max(count, 1)), SPECTRUM_POINTS).round().int().tolist()
    index = [i for i in sorted({*range(1, FIRST_VALUES + 1), *some}) if i <= count]
    return Spectrum(index, _short(sigma[[i - 1 for i in index]]), linear)


def _short(values: Tensor) -> list[float]:
    """Round to six digits, enough to plot, to cut file size."""
    return [float(f"{value:.6g}") for value in values.tolist()]
