"""Expansions: where they start, what rank they give, and the same signs everywhere."""

from __future__ import annotations

import pytest
import torch

from lrlora.ops.expansion import Expansion, signs
from lrlora.ops.reference import reference_expansion_delta
from lrlora.ranks.measures import effective_rank, spectrum

M, N, R, Q = 40, 56, 3, 4
FLOAT16_BASE = (torch.float16, torch.float32)


def factors(dtype: torch.dtype = torch.float32, r: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(r, N, generator=generator, dtype=torch.float64).to(dtype)
    return A, torch.randn(M, r, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("seed", [0, 5])
def test_two_thin_matmuls_are_the_formula(seed: int) -> None:
    A, B = factors()
    made = Expansion(Q, seed)
    expected = reference_expansion_delta(A, B, made, scaling=0.5)
    assert torch.allclose(made.delta(A, B, scaling=0.5, gain=1.0).double(), expected, rtol=1e-5, atol=1e-5)
    for tokens in (R, 7):  # few and many go different ways
        x, y0 = torch.randn(tokens, N), torch.randn(tokens, M)
        for base in (None, y0, y0.double()):
            y = made.linear(x, A, B, scaling=0.5, gain=1.0, added_to=base)
            wanted = x.double() @ expected.T + (0 if base is None else base)
            assert torch.allclose(y.double(), wanted.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_update(dtype: torch.dtype) -> None:
    A, B = factors()
    made = Expansion(Q)
    x = torch.randn(9, N).to(dtype)
    for factor in (torch.float32, dtype):
        # The range of float16 is too small for products.
        result, tolerance = (torch.float32, 1e-6) if (dtype, factor) == FLOAT16_BASE else (dtype, 0.01)
        y = made.linear(x, A.to(factor), B.to(factor), scaling=0.5, gain=1.0)
        expected = x.double() @ reference_expansion_delta(A.to(factor), B.to(factor), made, scaling=0.5).T
        assert y.dtype == result
        assert (y.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("tokens", [R, 5])
def test_second_derivatives(tokens: int) -> None:
    A, B = (0.1 * factor for factor in factors(torch.float64))
    x = torch.randn(tokens, N, dtype=torch.float64)

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return Expansion(Q).linear(x, A, B, scaling=0.5, gain=1.0).square().sum()

    assert torch.autograd.gradgradcheck(run, tuple(each.requires_grad_() for each in (x, A, B)))


@pytest.mark.parametrize("tokens", [R, 5])
def test_gradients(tokens: int) -> None:
    A, B = (factor.requires_grad_() for factor in factors(torch.float64))
    made = Expansion(Q)
    x, base = (torch.randn(tokens, size, dtype=torch.float64, requires_grad=True) for size in (N, M))
    target = torch.randn(tokens, M, dtype=torch.float64)
    inputs = (x, base, A, B)
    found = torch.autograd.grad((made.linear(x, A, B, scaling=0.5, gain=1.0, added_to=base) * target).sum(), inputs)
    reference = base + x @ reference_expansion_delta(A, B, made, scaling=0.5).T
    expected = torch.autograd.grad((reference * target).sum(), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual - wanted).norm() / wanted.norm() < 1e-10


@torch.no_grad()
def test_the_rank_is_r_times_q_and_the_size_that_of_ba() -> None:
    A, B = factors()
    delta = Expansion(Q).delta(A, B, scaling=1.0, gain=1.0)
    assert torch.linalg.matrix_rank(delta) == R * Q
    assert effective_rank(spectrum(delta)) > 2 * R
    # As large as BA at the same factors, so that both bear the same learning rates.
    assert (delta.norm() / (B @ A).norm()).item() == pytest.approx(1, abs=0.35)
    assert torch.allclose(Expansion(1).delta(A, B, scaling=1.0, gain=1.0), B @ A, atol=1e-5)  # LoRA


def test_stacks_have_factors_of_their_own_and_one_pattern() -> None:
    made = Expansion(Q)
    A, B = torch.randn(2, R, N), torch.randn(2, M, R)
    together = made.delta(A, B, scaling=1.0, gain=1.0)
    for index in range(2):
        alone = made.delta(A[index], B[index], scaling=1.0, gain=1.0)
        assert torch.allclose(together[index], alone, atol=1e-5)


def test_signs_are_the_same_everywhere() -> None:
    # Adapters rely on it: only the seed is saved with them.
    assert signs(3, 5, "output, 0, 3").tolist() == [[1, 1, 1, -1, -1], [1, 1, 1, 1, -1], [-1, 1, -1, -1, -1]]
    assert not torch.equal(signs(8, 8, "output, 0, 8"), signs(8, 8, "output, 1, 8"))
    many = signs(1000, 100, "input, 0, 1000")
    assert many.abs().eq(1).all()
    assert abs(many.mean().item()) < 0.01
