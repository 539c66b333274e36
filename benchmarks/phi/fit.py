"""What can φ(BA) represent? Fits it to real updates and keeps the share of their energy that each form explains.

    python benchmarks/phi/fit.py        # after updates.py

One line per fit in `docs/phi/fits.jsonl`; interrupt at will, finished fits are not repeated.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lrlora.naming import module_type
from lrlora.ops import delta_weight
from lrlora.rank.measures import energy_rank, spectrum, stable_rank
from lrlora.transfer import Transfer, TransferSpec
from updates import SOURCES, Source

FITS = Path(__file__).parents[2] / "docs" / "phi" / "fits.jsonl"
STEPS = 150
LAYERS = {"minilm": ("0", "5"), "smollm2": ("0", "9")}


@dataclass(frozen=True)
class Form:
    """A family of φ to fit with.

    Args:
        name: for tables.
        form, num_basis: of φ.
        is_learned: fit the series too; otherwise the backbone alone.
        scale: root mean square of Z = g·BA at the start, from which A and B are free to move it.

    """

    name: str
    form: str
    num_basis: int = 8
    is_learned: bool = True
    scale: float = 1.0


# The output scale is free and tanh(εZ)/ε → Z, so that a bounded form can always do as well as the SVD. From Z of size 1
# that takes longer than the steps here: bounded forms start from a small Z too, and the better fit of a module counts.
MAIN = (
    Form("tanh", "saturating", is_learned=False),
    Form("residual N=8", "residual"),
    Form("residual N=50", "residual", 50),
    Form("saturating N=8", "saturating"),
)
SMALL = (
    Form("tanh", "saturating", is_learned=False, scale=0.1),
    Form("saturating N=8", "saturating", scale=0.1),
)
EXTRA = (
    Form("sine", "sine", is_learned=False),
    Form("sine", "sine", is_learned=False, scale=0.1),
    Form("residual N=50", "residual", 50, scale=0.5),
    Form("residual N=50", "residual", 50, scale=2.0),
    Form("saturating N=50", "saturating", 50),
    Form("saturating N=50", "saturating", 50, scale=0.1),
    Form("sinc N=50", "sinc", 50),
    Form("sinc N=50", "sinc", 50, scale=0.3),
)
RANKS = (1, 2, 4, 8)
# The first sources get all ranks, the first two also the extra forms; the others r = 4 only.
WIDE, DEEP = 6, 2


def starts(target: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B): the best rank-r approximation of `target`, with entries of root mean square `scale`."""
    U, S, Vh = torch.linalg.svd(target, full_matrices=False)
    root = S[:r].sqrt()
    A, B = root.unsqueeze(1) * Vh[:r], U[:, :r] * root
    rms = (B @ A).square().mean().sqrt()
    factor = (scale / rms).sqrt()
    return A * factor, B * factor


def fit(targets: list[Tensor], r: int, form: Form, transfers: list[Transfer]) -> tuple[list[float], list[float]]:
    """(energy kept, final rms of Z) of each target, fitted together; a φ may be the same object for several.

    The energy kept is 1 − min_c ‖ΔW* − c·φ(BA)‖² / ‖ΔW*‖²: the output scale is free.
    """
    factors = [starts(target, r, form.scale) for target in targets]
    for A, B in factors:
        A.requires_grad_()
        B.requires_grad_()
    groups: list[dict[str, Any]] = [
        {"params": [p], "lr": 0.02 * p.detach().square().mean().sqrt().item()} for pair in factors for p in pair
    ]
    learned = {id(p): p for phi in transfers for p in phi.parameters()}
    if form.is_learned:
        groups.append({"params": list(learned.values()), "lr": 0.02})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / STEPS)) / 2)

    def kept() -> list[Tensor]:
        shares = []
        for target, (A, B), phi in zip(targets, factors, transfers, strict=True):
            delta = delta_weight(A, B, phi, scaling=1.0, input_gain=1.0)
            shares.append((delta * target).sum().square() / (delta.square().sum() * target.square().sum()))
        return shares

    for _ in range(STEPS):
        optimizer.zero_grad()
        (-sum(kept())).backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return [share.item() for share in kept()], [(B @ A).square().mean().sqrt().item() for A, B in factors]


def describe(source: Source, name: str, target: Tensor) -> dict[str, Any]:
    """What is known of one update without fitting: its ranks, and how its entries are distributed."""
    energies = spectrum(target)
    entries = target.double().flatten()
    return {
        "stable_rank": stable_rank(energies),
        "energy90_rank": energy_rank(energies, 0.9),
        "kurtosis": (entries.pow(4).mean() / entries.square().mean().square()).item(),
        "rms": entries.square().mean().sqrt().item(),
        "largest": entries.abs().max().item(),
        "svd": {
            str(k): (energies[:k].sum() / energies.sum()).item() for k in sorted({*RANKS, *(2 * r for r in RANKS)})
        },
    }


def main() -> None:
    """Fit what is missing."""
    done = set()
    if FITS.exists():
        records = [json.loads(line) for line in FITS.read_text().splitlines()]
        done = {(record["source"], record["fit"]) for record in records}
    for source in SOURCES:
        if not source.path().exists():
            continue
        updates = {
            name: delta
            for name, delta in load_file(source.path()).items()
            if set(name.split(".")) & set(LAYERS[source.model])
        }
        targets = list(updates.values())
        jobs = [(form, r, "module") for r in RANKS for form in MAIN if r == 4 or source in SOURCES[:WIDE]]
        jobs += [(form, 4, "module") for form in SMALL]
        if source in SOURCES[:DEEP]:
            jobs += [(form, 4, "module") for form in EXTRA] + [(form, 4, "global") for form in MAIN[1:]]
        if (source.path().stem, "svd") not in done:
            rows = [{"module": name, **describe(source, name, delta)} for name, delta in updates.items()]
            _write({"source": source.path().stem, **asdict(source), "fit": "svd", "modules": rows})
        for form, r, sharing in jobs:
            label = f"{form.name}, {sharing}, r={r}, Z={form.scale:g}"
            if (source.path().stem, label) in done:
                continue
            torch.manual_seed(0)
            spec = TransferSpec(form.form, form.num_basis)
            shared = Transfer(spec)
            transfers = [shared if sharing == "global" else Transfer(spec) for _ in targets]
            kept, rms = fit(targets, r, form, transfers)
            curves = [[round(v, 4) for v in phi(torch.linspace(-3, 3, 25)).tolist()] for phi in transfers]
            rows = [
                {"module": name, "type": module_type(name), "kept": share, "z_rms": z, "phi": curve}
                for name, share, z, curve in zip(updates, kept, rms, curves, strict=True)
            ]
            _write(
                {
                    "source": source.path().stem,
                    "fit": label,
                    **asdict(form),
                    "r": r,
                    "sharing": sharing,
                    "modules": rows,
                }
            )
            print(source.path().stem, label, round(sum(kept) / len(kept), 4), flush=True)


def _write(record: dict[str, Any]) -> None:
    FITS.parent.mkdir(parents=True, exist_ok=True)
    with FITS.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
