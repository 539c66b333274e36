"""`rank_report`: measure the update of every adapted module; and its result as data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import Update, Updates
from ..adapters.factorize import svd_of_product
from ..adapters.layers import updates_of_model
from ..checks import require_type
from ..files import parse_json, readable, write_whole
from ..lora.factors import require_finite
from ..naming import layer_index, module_kind, module_type
from ..ops.transfer import Transfer
from ..progress_bar import progress_bar
from .measures import MEASURES, curvature, spectrum

if TYPE_CHECKING:
    import pandas as pd

CURVE_POINTS = 201
# Spectra store the first FIRST_VALUES values in full, and SPECTRUM_POINTS log-spaced indices overall.
FIRST_VALUES, SPECTRUM_POINTS = 64, 64
SMALLEST_SHARE = 1e-4
# Of the printed table, so that it fits into a terminal, and below 25 lines.
_MOST_TYPES, _MOST_COLUMNS = 20, 10


@dataclass(frozen=True)
class RankRow:
    """Ranks of one adapted module.

    Attributes:
        module: path in the base model; for stacked experts, with the expert's index at the end.
        layer: index of the transformer layer; None outside of layers.
        type: path within a layer, the same in all layers.
        kind: "attention", "mlp" or "other".
        m, n: outputs and inputs of the layer; tokens and width of an embedding.
        r: rank of the product BA; None without one, e.g. full fine-tuning.
        stable_rank, effective_rank, energy90_rank, energy99_rank: rank measures of ΔW.
        relative_norm: ‖ΔW‖_F / ‖W0‖_F; None if W0 is zero or unavailable.
        phi_zero: φ(0), which adds a constant matrix to ΔW.
        curvature: 1 − R² of the best linear fit to φ over its inputs.
        rank_limit: maximum rank of an update of this form: r of LoRA, r·Q of an expansion, else the smaller of m and n.
        loss_rank: rank in the smallest LoRA within 1 % (or the requested share) of the loss; None if not measured.
        expert: index of an expert among those of one parameter; None elsewhere.

    """

    module: str
    layer: int | None
    type: str
    kind: str
    m: int
    n: int
    r: int | None
    stable_rank: float
    effective_rank: float
    energy90_rank: int
    energy99_rank: int
    relative_norm: float | None
    phi_zero: float
    curvature: float
    rank_limit: int
    loss_rank: int | None = None
    expert: int | None = None


class Curve(NamedTuple):
    """φ of one module over the central 99 % of its inputs.

    Attributes:
        z: equally spaced points.
        phi: φ at these points.
        start: φ at these points before training.
        entries: share of the entries between consecutive points, in total ≤ 1.

    """

    z: list[float]
    phi: list[float]
    start: Sequence[float] = ()
    entries: Sequence[float] = ()


class Spectrum(NamedTuple):
    """Singular values of one module's update, descending, down to 1e-4 of the largest.

    Attributes:
        number: their indices, from 1: all of the first 64, then increasingly sparse.
        sigma: singular values of ΔW.
        linear: singular values of s·BA, the plain-LoRA update, 1 to r; empty for plain LoRA.

    """

    number: list[int]
    sigma: list[float]
    linear: Sequence[float] = ()


@dataclass
class RankReport:
    """Ranks of one adapter: per adapted module a row, the curve of φ, and the spectrum.

    Attributes:
        rows: rows in model order.
        curves: module → its φ; empty for plain LoRA.
        spectra: module → its singular values; omits modules with zero update.

    """

    rows: list[RankRow]
    curves: dict[str, Curve] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    def __str__(self) -> str:
        """Table of stable ranks: a line for each type of module, a column for each layer or group of layers."""
        layers = sorted({row.layer for row in self.rows if row.layer is not None})
        size = -(-len(layers) // _MOST_COLUMNS) or 1
        groups = [layers[start : start + size] for start in range(0, len(layers), size)]
        types = dict.fromkeys(row.type for row in self.rows)
        shown = list(types)[:_MOST_TYPES]
        width = max(map(len, ("layer", *shown)))
        names = (f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
        lines = [f"Stable rank of the updates of {len(self.rows)} modules, by type and layer", f"{'layer':{width}}"]
        lines[1] += "".join(f"{name:>7}" for name in (*names, "all"))
        for kind in shown:
            rows = [row for row in self.rows if row.type == kind]
            cells = [[row.stable_rank for row in rows if row.layer in group] for group in groups]
            cells.append([row.stable_rank for row in rows])
            lines.append(f"{kind:{width}}" + "".join(f"{fmean(cell):7.2f}" if cell else " " * 7 for cell in cells))
        if len(types) > len(shown):
            lines.append(f"… and {len(types) - len(shown)} types more; see to_frame()")
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """Rows as a DataFrame. Requires `pip install '.[plots]'`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=[f.name for f in fields(RankRow)])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, for `from_json`."""
        write_whole(path, json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RankReport:
        """Read the output of `to_json`.

        Raises:
            ValueError: the file is not a report.

        """
        try:
            content = parse_json(Path(path))
            curves = {module: Curve(*values) for module, values in content["curves"].items()}
            spectra = {module: Spectrum(*values) for module, values in content["spectra"].items()}
            report = cls([RankRow(**row) for row in content["rows"]], curves, spectra)
            report.require_numbers()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a readable rank report ({type(error).__name__}: {error}). Remove it, or create it "
                "again: lrlora ranks ADAPTER --json FILE"
            ) from None
        return report

    def with_loss_ranks(self, ranks: Mapping[str, int]) -> RankReport:
        """Copy of the report with the ranks required by the loss."""
        return replace(self, rows=[replace(row, loss_rank=ranks.get(row.module)) for row in self.rows])

    def require_numbers(self) -> None:
        """Raise ValueError unless all values are finite and correctly typed and all curves complete."""
        require_type(self, RankReport, "report")
        json.dumps(asdict(self), allow_nan=False)
        for module, curve in self.curves.items():
            if not 0 < len(curve.z) == len(curve.phi):
                raise ValueError(f"φ of {module} has {len(curve.z)} points but {len(curve.phi)} values.")

    def summary(self) -> dict[str, float]:
        """Mean, minimum and maximum of each measure, and means by kind, as flat scalars for a logger."""
        values: dict[str, float] = {}
        for measure in MEASURES:
            all_ranks = [getattr(row, measure) for row in self.rows]
            values[f"rank/{measure}_mean"] = sum(all_ranks) / len(all_ranks)
            values[f"rank/{measure}_min"] = min(all_ranks)
            values[f"rank/{measure}_max"] = max(all_ranks)
            for kind in sorted({row.kind for row in self.rows}):
                ranks = [getattr(row, measure) for row in self.rows if row.kind == kind]
                values[f"rank/{measure}_{kind}"] = sum(ranks) / len(ranks)
        values["rank/curvature_mean"] = sum(row.curvature for row in self.rows) / len(self.rows)
        return values


def read_history(path: Path) -> list[tuple[int, RankReport]]:
    """Records of a `rank_history.jsonl`, without curves; empty if the file is missing.

    Raises:
        ValueError: a record cannot be read.

    """
    records: list[tuple[int, RankReport]] = []
    if not path.exists():
        return records
    with readable(path, "Remove it to continue without the recorded ranks."):
        # Text after the last newline is an incomplete record of a killed run.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            content = json.loads(line)
            report = RankReport([RankRow(**row) for row in content["rows"]])
            require_type(content["step"], int, "step")
            report.require_numbers()
            records.append((content["step"], report))
    return records


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
    for update in progress_bar(updates, total=total, desc="Measuring ranks", disable=not progressbar):
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
        energies = svd_of_product(*factors)[1].square().cpu()  # where cumsum and histc are deterministic
    else:
        delta = update.matrix()
        energies = spectrum(delta).cpu()
        if learned is not None and (phi := learned.phi) is not None:
            z = learned.transfer_input()
            # `phi.forward` instead of `phi`: FSDP2 treats the first call of a wrapped module as the model's.
            phi_zero, bend, curve = phi.forward(z.new_zeros(())).item(), curvature(z, delta), _sample(phi, z)
    plain: list[float] = []
    if learned is not None:
        linear = learned.linear()
        require_finite(update.module, *linear)
        plain = _short(_significant(svd_of_product(*linear)[1]))
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
        expert=update.expert,
        **{name: measure.compute(energies) for name, measure in MEASURES.items()},  # type: ignore[arg-type]
    )
    return row, curve, _thinned(energies.sqrt(), plain)


def _sample(phi: Transfer, z: Tensor) -> Curve:
    """φ, learned and initial, at equally spaced points over the central 99 % of the entries of z."""
    inputs = z.flatten()[:: 1 + z.numel() // 2**15].float().cpu()
    start, end = inputs.quantile(inputs.new_tensor([0.005, 0.995])).tolist()
    grid, untrained = torch.linspace(start, end, CURVE_POINTS), Transfer(phi.spec)
    counts = torch.histc(inputs, CURVE_POINTS - 1, start, end) if end > start else grid.new_zeros(CURVE_POINTS - 1)
    return Curve(_short(grid), _short(phi.forward(grid)), _short(untrained(grid)), _short(counts / inputs.numel()))


def _significant(sigma: Tensor) -> Tensor:
    """Select descending singular values above 1e-4 of the first."""
    return sigma[: int((sigma > SMALLEST_SHARE * sigma[0]).sum())]


def _thinned(sigma: Tensor, linear: list[float]) -> Spectrum:
    """Select descending singular values distinguishable on a log axis."""
    count = len(_significant(sigma))
    log_spaced = torch.logspace(0, math.log10(max(count, 1)), SPECTRUM_POINTS).round().int().tolist()
    index = [i for i in sorted({*range(1, FIRST_VALUES + 1), *log_spaced}) if i <= count]
    return Spectrum(index, _short(sigma[[i - 1 for i in index]]), linear)


def _short(values: Tensor) -> list[float]:
    """Round to six digits, enough to plot, to cut file size."""
    return [float(f"{value:.6g}") for value in values.tolist()]
