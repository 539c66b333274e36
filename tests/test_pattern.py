"""Patterns: where they start, what rank they give, and the same signs everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrlora.ops import pattern_delta, pattern_linear
from lrlora.ops.reference import reference_pattern_delta
from lrlora.pattern import Pattern, PatternSpec, signs
from lrlora.rank.measures import effective_rank, spectrum

M, N, R, Q = 40, 56, 3, 4
KINDS: list[dict[str, Any]] = [
    {"form": "expansion", "weights": "fixed"},
    {"form": "expansion", "weights": "term"},
    {"form": "expansion", "weights": "factor"},
    {"form": "expansion", "weights": "full"},
    {"form": "blocks", "weights": "full"},
]


def pattern(kind: dict[str, Any], r: int = R, *, learned: bool = True, **fields: Any) -> Pattern:
    made = Pattern(PatternSpec(num_terms=Q, **{"lr_multiplier": 10.0, **kind, **fields}), r)
    if learned and made.weight is not None:
        with torch.no_grad():
            made.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return made


def factors(dtype: torch.dtype = torch.float32, r: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(r, N, generator=generator, dtype=torch.float64).to(dtype)
    return A, torch.randn(M, r, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_thin_matmuls_are_the_formula(kind: dict[str, Any]) -> None:
    A, B = factors()
    made = pattern(kind)
    expected = reference_pattern_delta(A, B, made, scaling=0.5)
    assert torch.allclose(pattern_delta(A, B, made, scaling=0.5).double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(7, N)
    y = pattern_linear(x, A, B, made, scaling=0.5)
    assert torch.allclose(y.double(), x.double() @ expected.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_half_precision_keeps_the_update(kind: dict[str, Any], dtype: torch.dtype) -> None:
    A, B = factors()
    made = pattern(kind)
    x = torch.randn(9, N).to(dtype)
    for factor, tolerance in ((torch.float32, 1e-6), (dtype, 0.01)):
        y = pattern_linear(x, A.to(factor), B.to(factor), made, scaling=0.5)
        expected = x.double() @ reference_pattern_delta(A.to(factor), B.to(factor), made, scaling=0.5).T
        assert y.dtype == factor
        assert (y.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients(kind: dict[str, Any]) -> None:
    A, B = (factor.requires_grad_() for factor in factors(torch.float64))
    made = pattern(kind)
    x = torch.randn(5, N, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, M, dtype=torch.float64)
    inputs = [x, A, B, *made.parameters()]
    found = torch.autograd.grad((pattern_linear(x, A, B, made, scaling=0.5) * target).sum(), inputs)
    reference = x @ reference_pattern_delta(A, B, made, scaling=0.5).T
    expected = torch.autograd.grad((reference * target).sum(), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual - wanted).norm() / wanted.norm() < 1e-5


@torch.no_grad()
def test_the_start_is_lora_or_of_full_rank() -> None:
    A, B = factors()
    blocks = pattern({"form": "blocks", "weights": "full"}, learned=False)
    assert torch.allclose(pattern_delta(A, B, blocks, scaling=1.0), B @ A, atol=1e-5)
    for weights in ("fixed", "term", "factor", "full"):
        lora = pattern({"form": "expansion", "weights": weights, "start": "lora"}, learned=False)
        assert torch.allclose(pattern_delta(A, B, lora, scaling=1.0), B @ A, atol=1e-5)
        even = pattern({"form": "expansion", "weights": weights}, learned=False)
        delta = pattern_delta(A, B, even, scaling=1.0)
        assert torch.linalg.matrix_rank(delta) == R * Q
        assert effective_rank(spectrum(delta)) > 2 * R
        assert lora.terms() == pytest.approx(1)
        assert even.terms() > 2
        # As large as BA at the same factors, so that both bear the same learning rates.
        assert (delta.norm() / (B @ A).norm()).item() == pytest.approx(1, abs=0.35)


def test_experts_have_factors_of_their_own_and_one_pattern() -> None:
    made = pattern(KINDS[0])
    A, B = torch.randn(2, R, N), torch.randn(2, M, R)
    together = pattern_delta(A, B, made, scaling=1.0)
    for expert in range(2):
        alone = pattern_delta(A[expert], B[expert], made, scaling=1.0)
        assert torch.allclose(together[expert], alone, atol=1e-5)


def test_signs_are_the_same_everywhere() -> None:
    # Adapters rely on it: only the seed is saved with them.
    assert signs(3, 5, "output, 0, 3").tolist() == [[1, 1, 1, -1, -1], [1, 1, 1, 1, -1], [-1, 1, -1, -1, -1]]
    assert not torch.equal(signs(8, 8, "output, 0, 8"), signs(8, 8, "output, 1, 8"))
    many = signs(1000, 100, "input, 0, 1000")
    assert many.abs().eq(1).all()
    assert abs(many.mean().item()) < 0.01


def test_weights_stay_float32() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        with torch.random.fork_rng():
            torch.set_default_dtype(dtype)
            try:
                assert {p.dtype for kind in KINDS for p in pattern(kind).parameters()} == {torch.float32}
            finally:
                torch.set_default_dtype(torch.float32)
    assert [p.dtype for p in pattern(KINDS[1]).to(torch.bfloat16).parameters()] == [torch.float32]
