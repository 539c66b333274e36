"""Learned ranks of an adapter, as data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import require_type
from ..files import parse_json, read_text, readable, values_of, write_whole
from .measures import MEASURES

if TYPE_CHECKING:
    import pandas as pd


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
        rank_limit: maximum rank of an update of this form: r of LoRA, r·Q of an expansion, r² of LoHa, the smaller of m
            and n of φ(BA) and of full matrices; None in older reports.
        loss_rank: rank in the smallest LoRA within 1 % (or the requested share) of the loss; None if not measured.

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
    rank_limit: int | None = None
    loss_rank: int | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankRow:
        """Build a row from a file; ignores the gate field of older files."""
        return cls(**{name: value for name, value in values.items() if name != "active_factors"})


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
    """Learned ranks of one adapter: per adapted module a row, the curve of φ, and the spectrum.

    Attributes:
        rows: rows in model order.
        curves: module → its φ; empty for plain LoRA.
        spectra: module → its singular values; omits modules with zero update.

    """

    rows: list[RankRow]
    curves: dict[str, Curve] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """Rows as a DataFrame. Requires `pip install '.[plots]'`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=[f.name for f in fields(RankRow)])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, for `from_json`."""
        rows = [asdict(row) for row in self.rows]
        write_whole(path, json.dumps({"rows": rows, "curves": self.curves, "spectra": self.spectra}))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RankReport:
        """Read the output of `to_json`.

        Raises:
            ValueError: the file is not a report.

        """
        try:
            content = parse_json(Path(path))
            curves = {module: Curve(*parts) for module, parts in content["curves"].items()}
            # Older reports have no spectra.
            spectra = {module: Spectrum(*parts) for module, parts in content.get("spectra", {}).items()}
            report = cls([RankRow.from_dict(row) for row in content["rows"]], curves, spectra)
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
        for line in read_text(path).split("\n")[:-1]:
            content = values_of(line)
            report = RankReport([RankRow.from_dict(row) for row in content["rows"]])
            require_type(content["step"], int, "step")
            report.require_numbers()
            records.append((content["step"], report))
    return records
