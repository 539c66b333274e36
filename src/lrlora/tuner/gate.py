"""Gates: how many of the r factors of BA a layer keeps.

    ΔW = (s/g) · φ(g · B diag(γ) A),    γ = max(0, 1 + μ·gate)

φ lifts the rank above r; a gate on every factor lets the optimizer also go below it, as in SoRA (arXiv:2311.11696).
After each step of the optimizer, every gate that is still open moves down by

    lr · λ · c̄/c,    c = γ·‖b‖·‖a‖ the size of its factor, c̄ the mean over the open factors of the layer

so that weak factors pay more than strong ones and give way to them. (With the same pace for all, B would grow as γ
shrinks, and all factors would share the work to the end.) The penalty λ is decoupled from the loss, as AdamW's weight
decay is: it does not depend on the loss's scale, or on how many batches a gradient is gathered from, and it has a
meaning. Adam itself moves a gate by up to lr a step, so a factor of average size survives if the loss holds it up in
more than a share λ of the steps. Where γ reaches 0 it is exactly 0, gets no gradient and stays there.

The penalty hangs on every `torch.optim.Optimizer` through PyTorch's own hook: no training loop has to change.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..transfer import KeepsFloat32

# μ. At LoRA's learning rates the steps of a run add up to some tenths: alone, they would not close a gate.
LR_MULTIPLIER = 10.0
# What DeepSpeed sets on a parameter in stage 3, and in stages 1 and 2.
_MARKS_OF_ZERO = ("ds_id", "_hp_mapping")
# The most that a vanishing factor pays in multiples of an average one.
_MAX_PACE = 100.0


class Gate(KeepsFloat32):
    """A gate for every factor of one layer, or of one layer's stacked experts.

    Args:
        A: whose weight is (experts·r, n), one expert in general.
        B: whose weight is (experts·m, r).
        penalty: λ ≥ 0.

    Attributes:
        weight: float32 parameter of shape (experts·r,), zero at the start, where every γ is 1.

    """

    def __init__(self, A: nn.Linear, B: nn.Linear, penalty: float) -> None:
        super().__init__()
        self.penalty = penalty
        self._gated = (A, B)  # in a tuple, so that they are not registered here too
        self.weight = nn.Parameter(torch.zeros(len(A.weight)))
        _GATES.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _GATES.add(self)  # a copy

    def values(self) -> Tensor:
        """γ (experts·r,), float32, differentiable."""
        return torch.relu(1 + LR_MULTIPLIER * self.weight)

    def forward(self, A: Tensor) -> Tensor:
        """diag(γ) A, (experts·r, n), float32 at least."""
        return self.values().unsqueeze(1) * A

    def make_ready(self) -> None:
        """As for all that keeps float32.

        Raises:
            NotImplementedError: DeepSpeed's ZeRO trains the gate on a partition of its own, where it cannot be closed.

        """
        super().make_ready()
        if self.weight.requires_grad and any(hasattr(self.weight, name) for name in _MARKS_OF_ZERO):
            raise NotImplementedError(
                "rank_penalty has no effect under DeepSpeed's ZeRO, which steps partitions of its own. Leave "
                "rank_penalty out, or use DDP."
            )

    @torch.no_grad()
    def close(self, learning_rate: float) -> None:
        """Move every open gate down, after a step of the optimizer with this learning rate.

        Raises:
            NotImplementedError: FSDP2 has sharded the factors, of which no process has whole columns.

        """
        if hasattr(self.weight, "device_mesh"):
            raise NotImplementedError(
                "rank_penalty needs the factors whole, and FSDP2 has sharded them. Leave rank_penalty out, or use DDP."
            )
        A, B = self._gated
        gamma = self.values().view(-1, B.weight.shape[1])
        columns = B.weight.float().view(len(gamma), -1, gamma.shape[1])
        sizes = gamma * columns.norm(dim=1) * A.weight.float().norm(dim=1).view_as(gamma)
        mean = sizes.sum(1, keepdim=True) / (gamma > 0).sum(1, keepdim=True).clamp_min(1)
        # At the start B is zero and all factors are alike.
        pace = torch.where(mean > 0, mean / sizes, torch.ones_like(sizes)).clamp_(max=_MAX_PACE)
        self.weight.sub_((pace * (gamma > 0)).nan_to_num_(0.0).flatten() * (learning_rate * self.penalty))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, penalty={self.penalty}"


_GATES: weakref.WeakSet[Gate] = weakref.WeakSet()


def _close_gates(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _GATES:
        return
    # A fused optimizer is called for a step that GradScaler skips, and skips it itself.
    overflow = getattr(optimizer, "found_inf", None)
    if overflow is not None and bool(overflow):
        return
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for gate in _GATES:
        if id(gate.weight) in rates and gate.weight.grad is not None:
            gate.close(rates[id(gate.weight)])


register_optimizer_step_post_hook(_close_gates)
