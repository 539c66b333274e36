"""Regenerate the conformance vectors with lrlora's reference in float64: python docs/update_conformance.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lrlora.adapters import Factors
from lrlora.learned.directions import DAMPING, directions
from lrlora.learned.moments import RIDGE, Moments
from lrlora.lora.factors import PLAIN
from lrlora.ops.expansion import Expansion
from lrlora.ops.phi import TransferSpec
from lrlora.ops.reference import reference_delta_weight, reference_expansion_delta
from lrlora.ops.transfer import Transfer

FILE = Path(__file__).parent / "conformance" / "vectors.safetensors"
M, N, R, TOKENS, TERMS = 24, 20, 3, 5, 4
FORMS = {"residual": (None, 8, 10.0), "sinc": (1.0, 50, 1.0)}  # g, N, μ
SCALING, INTERVAL = 2.0, 3.0


def vectors() -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Settings of the cases, and their tensors, float64."""
    generator = torch.Generator().manual_seed(0)
    cases: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}

    def drawn(*shape: int) -> Tensor:
        # Drawn in float64, since float32 draws differ between processors; of float32, so that none rounds them.
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    for form, (gain, count, multiplier) in FORMS.items():
        phi = Transfer(TransferSpec(form, count, INTERVAL, multiplier))
        given = {"A": 0.3 * drawn(R, N), "B": drawn(M, R)}
        given = {name: part.float().double().requires_grad_() for name, part in given.items()}
        phi.amplitude.data = 0.1 * drawn(count)
        phi.bandwidth.data = 0.1 * drawn(count)
        delta = reference_delta_weight(given["A"], given["B"], phi, scaling=SCALING, input_gain=gain)
        start = {"start": phi.spec.amplitudes(torch.zeros(2, count))}
        tensors |= _case(form, {**given, **dict(phi.named_parameters())}, delta, drawn, start)
        cases[form] = {"form": form, "s": SCALING, "g": gain, "interval": INTERVAL, "mu": multiplier}
    for shape in ((R, N), (M, R), (TOKENS, N), (M, N), (TOKENS, M)):  # of a form since removed: others keep their draws
        drawn(*shape)
    signs = Expansion(TERMS)
    given = {"A": drawn(R, N).requires_grad_(), "B": drawn(M, R).requires_grad_()}
    delta = reference_expansion_delta(given["A"], given["B"], signs, scaling=SCALING)
    cpu = torch.device("cpu")
    fixed = {"P": signs.output_signs(M, cpu).double(), "R": signs.input_signs(N, cpu).double().T}
    tensors |= _case("expansion", given, delta, drawn, fixed)
    cases["expansion"] = {"form": "expansion", "s": SCALING, "g": 1.0, "interval": INTERVAL, "mu": 1.0}
    z, h = drawn(50, R), drawn(50, R)
    part = Factors("module", drawn(R, N), drawn(M, R), R, 1.0, PLAIN, 1.0, 1.0, 1.0)
    moments = Moments.zeros(part)
    moments.add(z, h)
    tensors |= {"cut/A": part.A, "cut/B": part.B, "cut/z": z, "cut/h": h}
    tensors["cut/out_rises"] = directions(part, moments, 50).rises
    cases["cut"] = {"damping": DAMPING, "ridge": RIDGE}
    return cases, tensors


def _case(
    name: str, given: dict[str, Tensor], delta: Tensor, drawn: Any, fixed: dict[str, Tensor]
) -> dict[str, Tensor]:
    x, weight, grad = drawn(TOKENS, N).requires_grad_(), drawn(M, N), drawn(TOKENS, M)
    y = x @ (weight + delta).T
    (y * grad).sum().backward()
    made = {**given, **fixed, "x": x, "W": weight, "d_y": grad, "out_delta": delta, "out_y": y}
    made |= {f"d_{name}": part.grad for name, part in {**given, "x": x}.items() if part.grad is not None}
    return {f"{name}/{key}": value.detach().double().contiguous() for key, value in made.items()}


if __name__ == "__main__":
    cases, tensors = vectors()
    FILE.write_bytes(save(tensors, metadata={"cases": json.dumps(cases)}))
