"""Learned ranks: what they are, and the report over a model's layers.

With σ₁ ≥ σ₂ ≥ … the singular values of an update ΔW:

    stable rank      ‖ΔW‖²_F / σ₁²                                             (arXiv:2606.04325)
    effective rank   exp(H(p)), p_i = σ_i / Σσ, H the Shannon entropy           (Roy & Vetterli, EUSIPCO 2007)
    energy rank      the smallest k with σ₁² + … + σ_k² ≥ 90 % or 99 % of ‖ΔW‖²_F

All are 0 where ΔW = 0. An algebraic rank is not reported: counted at any tiny tolerance it reads near full even
where nothing has been learned.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from .distributed import gathered, shard_owners
from .files import require_type, write_whole
from .ops import at_least_float32, svd_of_product
from .transfer import Transfer

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("stable_rank", "effective_rank", "energy90_rank", "energy99_rank")
CURVE_POINTS = 201
SPECTRUM_POINTS = 64
SMALLEST_SHARE = 1e-4


def spectrum(delta: Tensor) -> Tensor:
    """The squared singular values of `delta` (m, n), descending, shape (min(m, n),), float64.

    From the eigenvalues of the smaller of ΔW ΔWᵀ and ΔWᵀ ΔW, several times cheaper than an SVD. Values below the
    rounding error of the largest are returned as 0.
    """
    delta = delta.detach().double()
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    energies = torch.linalg.eigvalsh(gram).flip(0)
    return torch.where(energies > len(energies) * torch.finfo(energies.dtype).eps * energies[0], energies, 0.0)


def stable_rank(energies: Tensor) -> float:
    """‖ΔW‖²_F / σ₁² from the squared singular values, descending."""
    return (energies.sum() / energies[0]).item() if energies[0] > 0 else 0.0


def effective_rank(energies: Tensor) -> float:
    """Exp of the entropy of σ / Σσ from the squared singular values."""
    sigma = energies.sqrt()
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item() if sigma.sum() > 0 else 0.0


def energy_rank(energies: Tensor, fraction: float) -> int:
    """The smallest number of leading directions that hold `fraction` of ‖ΔW‖²_F, from σ² descending."""
    if energies[0] <= 0:
        return 0
    held = energies.cumsum(0) / energies.sum()
    # A spectrum that ends exactly at the fraction must not need one more direction for the last bit.
    return int((held < fraction - 1e-12).sum().item()) + 1


def curvature(inputs: Tensor, outputs: Tensor) -> float:
    """1 − R² of the best straight line through the points (inputs, outputs): 0 for a line, 0 if either is constant."""
    x, y = inputs.detach().double().flatten(), outputs.detach().double().flatten()
    x, y = x - x.mean(), y - y.mean()
    scale = x.dot(x) * y.dot(y)
    return max(0.0, 1 - (x.dot(y).square() / scale).item()) if scale > 0 else 0.0


@dataclass(frozen=True)
class RankRow:
    """One adapted module.

    Attributes:
        module: its path in the base model; for one of several stacked experts, with its index at the end.
        layer: index of the transformer layer it belongs to, None outside one.
        type: its path within a layer, the same in all layers.
        kind: "attention", "mlp" or "other".
        m, n: outputs and inputs of the layer; tokens and width of an embedding.
        r: rank of the product BA.
        stable_rank, effective_rank, energy90_rank, energy99_rank: of ΔW.
        relative_norm: ‖ΔW‖_F / ‖W0‖_F; None where W0 is zero or not at hand.
        phi_zero: φ(0), which adds a constant matrix to ΔW.
        curvature: 1 − R² of the best straight line through φ over the entries it acts on.
        rank_limit: the largest rank that an update of this form can have: r of LoRA, r·Q of an expansion, the smaller
            of m and n of φ(BA); None in older reports.

    """

    module: str
    layer: int | None
    type: str
    kind: str
    m: int
    n: int
    r: int
    stable_rank: float
    effective_rank: float
    energy90_rank: int
    energy99_rank: int
    relative_norm: float | None
    phi_zero: float
    curvature: float
    rank_limit: int | None = None


class Curve(NamedTuple):
    """φ of one module over the central 99 % of the entries it acts on.

    Attributes:
        z: equally spaced points.
        phi: φ at them.
        start: what φ was there before training.
        entries: share of the entries between each point and the next, in all ≤ 1.

    """

    z: list[float]
    phi: list[float]
    start: Sequence[float] = ()
    entries: Sequence[float] = ()


class Spectrum(NamedTuple):
    """Singular values of one module's update, in descending order, down to a ten-thousandth of the largest.

    Attributes:
        number: which ones, from 1: all of the first 32, then ever fewer.
        sigma: of ΔW.
        linear: of s·BA, what plain LoRA would make of the same factors, 1 to r; empty for plain LoRA.

    """

    number: list[int]
    sigma: list[float]
    linear: Sequence[float] = ()


@dataclass
class RankReport:
    """The learned ranks of one adapter: a row per adapted module, the curve of its φ, and its spectrum.

    Attributes:
        rows: in the order of the model.
        curves: module → its φ; empty for plain LoRA.
        spectra: module → its singular values; no module whose update is 0.

    """

    rows: list[RankRow]
    curves: dict[str, Curve] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """The rows as a pandas frame. Needs `pip install lrlora[plots]`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=[f.name for f in fields(RankRow)])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON; `from_json` reads it back."""
        rows = [asdict(row) for row in self.rows]
        write_whole(path, json.dumps({"rows": rows, "curves": self.curves, "spectra": self.spectra}))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RankReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the file holds something else.

        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            curves = {module: Curve(*parts) for module, parts in content["curves"].items()}
            # Reports from before there were spectra have none.
            spectra = {module: Spectrum(*parts) for module, parts in content.get("spectra", {}).items()}
            for row in content["rows"]:
                row.pop("active_factors", None)  # of reports from when there were gates
            report = cls([RankRow(**row) for row in content["rows"]], curves, spectra)
            report.require_numbers()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no rank report that this lrlora reads ({type(error).__name__}: {error}). Remove it, or "
                "make it anew: lrlora ranks ADAPTER --json FILE"
            ) from None
        return report

    def require_numbers(self) -> None:
        """Raise a ValueError unless all values are of the right types, and finite, and all curves whole."""
        require_type(self, RankReport, "report")
        json.dumps(asdict(self), allow_nan=False)
        for module, curve in self.curves.items():
            if not 0 < len(curve.z) == len(curve.phi):
                raise ValueError(f"φ of {module} has {len(curve.z)} points and {len(curve.phi)} values.")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(RankRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_whole(path, text.getvalue())

    def summary(self) -> dict[str, float]:
        """Mean, smallest and largest of every measure, and the mean by kind, as flat scalars for a logger."""
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

    """
    layers = [
        (path.removeprefix("base_model.model."), module, adapter or next(iter(module.active_adapters), None))
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
            energies = svd_of_product(U, V)[1].square()
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
            plain = _short(_of_note(svd_of_product(*_factors_of(linear, index))[1]))
        weight_norm = 0.0
        if weights is not None:
            weight_norm = (weights[index] if is_stack else weights).double().norm().item()
        row = RankRow(
            module=name,
            layer=layer_index(name),
            type=module_type(name),
            kind=_kind(name),
            m=m,
            n=n,
            r=r,
            stable_rank=stable_rank(energies),
            effective_rank=effective_rank(energies),
            energy90_rank=energy_rank(energies, 0.90),
            energy99_rank=energy_rank(energies, 0.99),
            relative_norm=energies.sum().sqrt().item() / weight_norm if weight_norm > 0 else None,
            phi_zero=phi_zero,
            curvature=bend,
            rank_limit=limit,
        )
        yield row, curve, _thinned(energies.sqrt(), plain)


def _factors_of(factors: Any, index: int) -> tuple[Tensor, Tensor]:
    """The two factors of a matrix, or of one of several that are stacked."""
    U, V = factors
    return (U[index], V[index]) if U.dim() == 3 else (U, V)


def require_finite(name: str, *parts: Tensor) -> None:
    """Raise a ValueError unless the update of a module, or all factors of it, are finite."""
    if not all(torch.isfinite(part).all() for part in parts):
        raise ValueError(
            f"The update of {name} holds NaN or infinite values. Training has diverged: go back to an earlier "
            "checkpoint."
        )


def _lora_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """(s·B, A) of PEFT's LoRA on a linear layer; None on other layers."""
    if hasattr(layer, "parameter_name") or adapter not in layer.lora_A:
        return None
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not (isinstance(A, nn.Linear) and isinstance(B, nn.Linear)):
        return None
    return layer.scaling[adapter] * at_least_float32(B.weight), A.weight


def _base_weight(layer: Any) -> Tensor | None:
    """The base weight; None where it is offloaded, or quantised in a way that cannot be undone."""
    try:
        weight: Tensor = layer.get_param().data if hasattr(layer, "get_param") else layer.get_base_weight()
    except (TypeError, NotImplementedError):
        return None
    return None if weight.is_meta else weight


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


def module_type(path: str) -> str:
    """The place of a module in its layer, its path without the numbers: encoder.layer.3.mlp → encoder.layer.mlp"""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def layer_index(path: str) -> int | None:
    """Index of the transformer layer that a module is in, None outside one."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


_ATTENTION = re.compile(r"att|(^|[._])(q|k|v|o|qkv|query|key|value|q_proj|k_proj|v_proj|o_proj)$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|ff\.|feed_?forward|intermediate|experts?|densereludense|fc\d|\.output\.dense$", re.IGNORECASE
)


def _kind(path: str) -> str:
    if _ATTENTION.search(path):
        return "attention"
    return "mlp" if _MLP.search(path) else "other"
