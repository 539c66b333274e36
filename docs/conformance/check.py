"""Check an implementation of LR-LoRA against vectors: python docs/conformance/check.py. It needs torch alone.

To check another implementation, put it in the place of `update` and `cut`. docs/method.md has the equations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-9  # of float64, relative


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of each case, and the tensors, of a safetensors file."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    settings = json.loads(header.pop("__metadata__")["cases"])
    whole = torch.frombuffer(content, dtype=torch.float64, offset=start) if start % 8 == 0 else None
    assert whole is not None, "tensors of float64, aligned"
    places = {name: [offset // 8 for offset in entry["data_offsets"]] for name, entry in header.items()}
    return settings, {name: whole[a:b].view(header[name]["shape"]) for name, (a, b) in places.items()}


def update(given: dict[str, Tensor], form: str, s: float, g: float | None, interval: float, mu: float) -> Tensor:
    """ΔW = (s/g)·φ(g·BA), or s·(P Rᵀ/√Q) ∘ BA. Without g: 0.5 / rms of the nonzero rows."""
    product = given["B"] @ given["A"]
    if form == "expansion":
        return s * (given["P"] @ given["R"].T / given["P"].shape[1] ** 0.5) * product
    if g is None:
        used = product.detach()[(given["B"] != 0).any(1)]
        g = 0.5 / used.square().mean().sqrt().item()
    z = g * product
    count = len(given["amplitude"])
    centers = torch.linspace(-interval, interval, count, dtype=z.dtype)
    base = torch.pi * (count - 1) / (2 * interval)
    a, omega = given["start"] + mu * given["amplitude"], 2 * base * torch.sigmoid(mu * given["bandwidth"])
    inside = z.clamp(-interval, interval) if form == "residual" else z
    u = omega * (inside.unsqueeze(-1) - centers)
    psi = torch.where(u == 0, 1.0, u.sin() / torch.where(u == 0, 1.0, u)) @ a
    return s / g * (psi + (z if form == "residual" else 0))


def cut(given: dict[str, Tensor], damping: float, ridge: float) -> Tensor:
    """½ σ² of M_h^½ M_z^½ for one loss term a token, damped in the span of the update."""
    A, B, z, h = (given[name] for name in "ABzh")
    inner, outer = A @ A.T, B.T @ B
    energy = (inner * outer).sum()
    margin = ridge * energy / len(A)
    h_weight = (h * (h @ torch.linalg.inv(outer + margin * torch.linalg.inv(inner)))).sum(1)
    z_weight = (z * (z @ torch.linalg.inv(inner + margin * torch.linalg.inv(outer)))).sum(1)
    M_z = (z.T * h_weight) @ z / (h_weight * z_weight).sum()
    M_h = (h.T * z_weight) @ h / len(h)
    roots = []
    for moment, gram, other in ((M_h, outer, inner), (M_z, inner, outer)):
        mean = (other * moment).sum() / energy
        values, vectors = torch.linalg.eigh(moment + damping * mean * gram)
        roots.append(values.sqrt()[:, None] * vectors.T)
    return torch.linalg.svdvals(roots[0] @ roots[1].T).square() / 2


def main(path: Path) -> None:
    """Compare all cases; exit 1 if any differs."""
    settings, tensors = read(path)
    failed = 0
    for case, options in settings.items():
        own = {name.split("/")[1]: t for name, t in tensors.items() if name.startswith(f"{case}/")}
        given = {n: t.clone().requires_grad_() for n, t in own.items() if not n.startswith(("d_", "out_"))}
        if case == "cut":
            found = {"out_rises": cut(given, **options)}
        else:
            delta = update(given, **options)
            y = given["x"] @ (given["W"] + delta).T
            (y * own["d_y"]).sum().backward()
            found = {"out_delta": delta, "out_y": y}
            found |= {f"d_{n}": given[n].grad for n in ("x", "A", "B", "amplitude", "bandwidth") if f"d_{n}" in own}
        for name, value in found.items():
            error = ((value - own[name]).norm() / own[name].norm()).item()
            failed += not error <= TOLERANCE
            print(f"{case:10} {name:12} {error:.1e}{'' if error <= TOLERANCE else '  DIFFERS'}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("vectors.safetensors"))
