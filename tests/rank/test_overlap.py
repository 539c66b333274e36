"""How far two subspaces overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lrlora.compress import leading_directions
from lrlora.rank.overlap import grassmann_similarity
from lrlora.updates import read_updates

from ..conftest import TinyModel


def some_basis(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 5), (5, 2), (8, 8)])
def test_is_the_mean_square_cosine_of_the_principal_angles(i: int, j: int) -> None:
    first, second = some_basis(12, i, 0), some_basis(12, j, 1)
    cosines = torch.linalg.svdvals(first.T @ second)
    assert grassmann_similarity(first, second) == pytest.approx(cosines.square().mean().item(), abs=1e-6)
    assert grassmann_similarity(first, second) == pytest.approx(grassmann_similarity(second, first), abs=1e-12)


def test_is_one_where_one_lies_in_the_other_whatever_the_basis() -> None:
    space = some_basis(20, 6, 0)
    turned = space @ some_basis(6, 6, 1)
    assert grassmann_similarity(space, turned) == pytest.approx(1, abs=1e-6)
    assert grassmann_similarity(space, turned[:, :3]) == pytest.approx(1, abs=1e-6)
    assert grassmann_similarity(space, turned) <= 1


def test_is_zero_at_right_angles_and_half_where_half_is_shared() -> None:
    axes = torch.eye(6)
    assert grassmann_similarity(axes[:, :2], axes[:, 2:4]) == 0
    assert grassmann_similarity(axes[:, :2], axes[:, 1:3]) == 0.5
    assert grassmann_similarity(axes[:, :1].bfloat16(), axes[:, :4]) == 1


def test_of_random_subspaces_is_the_larger_number_over_n_on_average() -> None:
    found = [grassmann_similarity(some_basis(40, 2, seed), some_basis(40, 8, 1000 + seed)) for seed in range(300)]
    assert sum(found) / len(found) == pytest.approx(8 / 40, abs=0.02)


@pytest.mark.parametrize("shapes", [((4, 2), (5, 2)), ((4, 0), (4, 2)), ((4,), (4, 2))])
def test_what_is_no_pair_of_subspaces_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    first, second = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="orthonormal columns"):
        grassmann_similarity(first, second)


def test_the_leading_directions_of_an_update_are_sixteen_of_its_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=20, init_lora_weights=False, target_modules=["q_proj"])
    get_peft_model(TinyModel("llama").build(), config).save_pretrained(tmp_path)
    updates = read_updates(tmp_path)
    for update, found, more in zip(
        updates, leading_directions(updates).values(), leading_directions(updates, 20).values(), strict=True
    ):
        assert (found.shape, more.shape) == ((32, 16), (32, 20))
        right = torch.linalg.svd(update.matrix())[2][:16].T
        assert grassmann_similarity(found.double(), right.double()) == pytest.approx(1, abs=1e-4)
