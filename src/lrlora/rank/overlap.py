"""How far two updates act on the same directions."""

from __future__ import annotations

from torch import Tensor


def grassmann_similarity(first: Tensor, second: Tensor) -> float:
    """How far two subspaces overlap: ‖firstᵀ second‖²_F / min(i, j), the φ of LoRA's paper (arXiv:2106.09685, § 7.2).

    1 where one of them lies in the other, 0 where they are at right angles; max(i, j) / n on average for two that have
    nothing to do with each other.

    Args:
        first: orthonormal columns, (n, i).
        second: orthonormal columns, (n, j).

    Raises:
        ValueError: they are not of one space, or one of them has no columns.

    Examples:
        >>> import torch
        >>> from lrlora.rank.overlap import grassmann_similarity
        >>> axes = torch.eye(4)
        >>> grassmann_similarity(axes[:, :2], axes[:, 1:3])
        0.5

    """
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second) or not first.numel() or not second.numel():
        raise ValueError(
            "Two subspaces are compared by their orthonormal columns, (n, i) and (n, j); these are "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    shared = (first.double().T @ second.double()).square().sum().item()
    return min(1.0, shared / min(first.shape[1], second.shape[1]))
