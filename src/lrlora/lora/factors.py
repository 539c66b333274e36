"""`Factors`: the update of one module as a product, of which directions are kept under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Stack(NamedTuple):
    """A parameter that PEFT adapts by name (`target_parameters`): matrices of all experts, or one matrix.

    Attributes:
        parameter: its path in the base model.
        module: path of its wrapper in a PEFT model, which names its weights in a file by the position among the
            wrappers of a module.
        experts: number of matrices.

    """

    parameter: str
    module: str
    experts: int


class Layout(NamedTuple):
    """Meaning of the matrix ΔW (m, n) in its module.

    Attributes:
        kernel: kernel size of a convolution, included in n; else empty.
        is_embedding: whether m counts tokens and n is the width.
        is_known: False if the module may be a linear layer, a convolution or an embedding.
        stack: parameter of which ΔW changes one matrix; None for the weight of a layer.

    """

    kernel: tuple[int, ...] = ()
    is_embedding: bool = False
    is_known: bool = True
    stack: Stack | None = None


PLAIN = Layout()


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of one module's update, or of all experts in one parameter, which have one rank.

    Attributes:
        module: path in the base model.
        A, B: (k, n) and (m, k), float32, BA ≈ ΔW; k = 0 if the module is omitted. Of E experts (E·k, n) and (m, k·E),
            as PEFT stacks them: an expert has consecutive rows of A, and each E-th column of B.
        r: trained rank of the product BA; None if there was none.
        scaling: s used in training.
        layout: meaning of the matrix in the module.
        energy: ‖ΔW‖²_F, exact.
        stable_rank: stable rank of ΔW.
        kept: the share of `energy` that BA keeps.

    """

    module: str
    A: Tensor
    B: Tensor
    r: int | None
    scaling: float
    layout: Layout
    energy: float
    stable_rank: float
    kept: float

    @property
    def experts(self) -> int:
        return 1 if self.layout.stack is None else self.layout.stack.experts

    @property
    def rank(self) -> int:
        return len(self.A) // self.experts

    def padded(self, rank: int) -> Factors:
        """With zero rows of A and columns of B up to `rank`; itself if it has as many."""
        missing = rank - self.rank
        if missing <= 0:
            return self
        A = nn.functional.pad(self.A.unflatten(0, (self.experts, self.rank)), (0, 0, 0, missing)).flatten(0, 1)
        B = nn.functional.pad(self.B, (0, self.experts * missing))  # the rank is before the expert
        return replace(self, A=A, B=B)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """PEFT's A and B in its shapes: of convolutions (k, inputs, …) and (m, k, 1, …), of embeddings Bᵀ and Aᵀ."""
        if self.layout.is_embedding:
            return self.B.T, self.A.T
        if kernel := self.layout.kernel:
            return self.A.unflatten(1, (-1, *kernel)), self.B.reshape(*self.B.shape, *[1] * len(kernel))
        return self.A, self.B

    @property
    def parameters(self) -> int:
        return self.A.numel() + self.B.numel()

    @property
    def parameters_per_rank(self) -> int:
        return self.experts * (self.A.shape[1] + self.B.shape[0])


def changes(old: Factors, new: Factors) -> tuple[Tensor, Tensor]:
    """Sᵀ and T of the least squares B S ≈ B′ and T A ≈ A′, float64, on the CPU: from old factors to new ones.

    Returns:
        (k, k′) transposed to (k′, k), and (k′, k).

    """
    pairs = ((old.B, new.B), (old.A.T, new.A.T))
    S, T = (torch.linalg.lstsq(one.double(), other.double(), driver="gelsd").solution for one, other in pairs)
    return S.T, T.T


def require_finite(name: str, *tensors: Tensor) -> None:
    """Raise ValueError unless a module's update, all its factors, or another trained weight, are finite."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(
            f"The update of {name} contains NaN or infinite values. Training has diverged: go back to an earlier "
            "checkpoint."
        )


def best_per_parameter(values: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """Choose the ranks of all modules under a common budget.

    Args:
        values: per module, the value of each direction, descending.
        costs: per module, parameters of a direction.
        budget: total number of parameters.

    Raises:
        ValueError: the budget is less than one rank of the smallest module.

    """
    if budget < min(costs):
        raise ValueError(
            f"{budget:,} parameters are below the minimum of {min(costs):,}, one rank of the smallest module."
        )
    owner = torch.cat([torch.full((len(directions),), index) for index, directions in enumerate(values)])
    cost = torch.tensor(costs)[owner]
    order = (torch.cat(list(values)) / cost).argsort(descending=True, stable=True)
    order = order[cost[order] <= budget]
    chosen = order[cost[order].cumsum(0) <= budget]
    return torch.bincount(owner[chosen], minlength=len(values)).tolist()
