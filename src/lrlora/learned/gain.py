"""Share of an adapter's gain that a smaller one keeps on held-out examples, and its sampling error.

    kept = Σ_i (w_i − c_i) / Σ_i (w_i − a_i)

with the loss of example i, summed over its loss terms, without the adapter (w), with it (a), and with the smaller one
(c). Intervals are those of a paired bootstrap (Efron 1979): examples are drawn with replacement, each with all of its
losses. The losses of an adapter and of most of it are nearly equal on each example, so the share is known far better
than either loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..shrunk import Kept
from .moments import IGNORED, Loss, model_loss

_DRAWS = 2_000
_TAIL = 0.05  # of the bootstrap, on either side
_AT_ONCE = 2**20  # examples drawn at once, 32 MiB


class Gain:
    """Loss that an adapter saves on held-out examples.

    Args:
        without: `losses_of` without the adapter, (examples, 2).
        whole: those with it.

    Attributes:
        nats: mean per loss term.
        low, high: its 5 % and 95 % quantiles; the adapter has a measurable gain if `low` is positive.

    """

    def __init__(self, without: Tensor, whole: Tensor) -> None:
        self._without, self._whole = without, whole
        saved = without[:, 0] - whole[:, 0]
        self.nats = (saved.sum() / whole[:, 1].sum()).item()
        drawn = _drawn_sums(saved, whole[:, 1])
        self.low, self.high = (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([_TAIL, 1 - _TAIL]).double()).tolist()

    def kept(self, cut: Tensor) -> Kept:
        """Share that a smaller adapter keeps.

        Args:
            cut: its `losses_of`, (examples, 2), on the same examples.

        """
        left, saved = (self._without[:, 0] - losses[:, 0] for losses in (cut, self._whole))
        drawn_left, drawn_saved = _drawn_sums(left, saved).unbind(1)
        # A draw without a gain says nothing good of the share.
        shares = torch.where(drawn_saved > 0, drawn_left / drawn_saved, -math.inf)
        share = (left.sum() / saved.sum()).item()
        return Kept(share, *shares.quantile(torch.tensor([_TAIL, 1 - _TAIL]).double(), interpolation="lower").tolist())

    def examples_for(self, kept: Kept, keep: float) -> int:
        """Number of examples that would show that a share above `keep` is above it."""
        return math.ceil(len(self._whole) * ((kept.share - kept.low) / (kept.share - keep)) ** 2)


def _drawn_sums(*columns: Tensor) -> Tensor:
    """Sums of columns of examples over the draws of the bootstrap, (draws, columns); the same draws every time."""
    values = torch.stack(columns, 1).double()
    examples, generator = len(values), torch.Generator().manual_seed(0)
    at_once = max(1, _AT_ONCE // examples)
    sums = []
    for start in range(0, _DRAWS, at_once):
        draws = min(at_once, _DRAWS - start)
        drawn = torch.multinomial(torch.ones(examples), draws * examples, replacement=True, generator=generator)
        rows = torch.arange(draws).repeat_interleave(examples)
        counts = torch.bincount(rows * examples + drawn, minlength=draws * examples).view(draws, examples)
        sums.append(counts.double() @ values)
    return torch.cat(sums)


def mean_of(losses: Tensor) -> float:
    """Mean of `losses_of` over the loss terms."""
    return (losses[:, 0].sum() / losses[:, 1].sum().clamp(min=1)).item()


@torch.no_grad()
def losses_of(model: nn.Module, batches: Iterable[Mapping[str, Any]], loss: Loss = model_loss) -> Tensor:
    """Losses of single examples.

    Args:
        model: of any adapter, or none.
        batches: inputs of `loss`, on the model's device.
        loss: returns the sum of the loss terms of each example of a batch, and their number, both (examples,).

    Returns:
        Sum of the loss terms of each example, and their number, (examples, 2), float64.

    """
    return torch.cat([torch.stack(loss(model, batch), 1).double().cpu() for batch in batches])


def constant_losses(labels: Tensor, reference: Tensor, classes: int, *, are_several: bool = False) -> Tensor:
    """Losses (examples,) of the best constant answer: the mean of reference labels, or their shares, one added to each.

    Without an adapter, the answers of a new head are worse than none, and would make any adapter look good.

    Args:
        labels: (examples,), or (examples, …) with a sum over the labels of an example; -100 does not count as a class.
        reference: other labels of the same task.
        classes: their number; of no matter for labels of floating point.
        are_several: whether an example may have several labels, (examples, classes) of 0 or 1.

    """
    if are_several:
        shares = (reference.double().sum(0) + 1) / (len(reference) + 2)
        terms = nn.functional.binary_cross_entropy(shares.expand(labels.shape), labels.double(), reduction="none")
    elif reference.is_floating_point():
        terms = (labels.double() - reference.double().mean(0)).square()
    else:
        counts = torch.bincount(reference[reference != IGNORED], minlength=classes).double() + 1
        losses = -(counts / counts.sum()).log()
        terms = torch.where(labels == IGNORED, 0.0, losses[labels.clamp(min=0)])
    return terms.reshape(len(terms), -1).sum(1)


def choices_of(batch: Any) -> int | None:
    """Number of choices of each example, which has a row of tokens for each; None for other tasks."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() == 3 else None


def constant_losses_of_choices(batches: Sequence[Any], choices: int) -> Tensor:
    """Losses (examples,) of an answer that prefers no choice: a model does not know their places."""
    return torch.full((sum(len(batch["labels"]) for batch in batches),), math.log(choices)).double()


def lower_losses(losses: Tensor, constant: Tensor) -> Tensor:
    """`losses_of`, or those of constant answers if they are lower in sum."""
    return torch.stack([constant, losses[:, 1]], dim=1) if constant.sum() < losses[:, 0].sum() else losses
