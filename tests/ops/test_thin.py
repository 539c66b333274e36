"""Updates that are a product of thin factors: their singular values without the product."""

from __future__ import annotations

import pytest
import torch

from lrlora.ops import singular_values_of_product, svd_of_product


@pytest.mark.parametrize(("m", "k", "n"), [(40, 6, 30), (30, 6, 40), (5, 9, 7), (8, 9, 3), (4, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_svd_of_a_product(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    U, V = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    left, sigma, right = svd_of_product(U, V)
    product = U.double() @ V.double()
    assert sigma.shape == (min(m, k, n),)
    torch.testing.assert_close(singular_values_of_product(U, V), sigma)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(product)[: len(sigma)])
    torch.testing.assert_close((left * sigma) @ right.T, product)
    for vectors in (left, right):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(sigma), dtype=torch.float64))
