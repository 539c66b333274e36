"""Other criteria for the ranks at the cut of `LearnedRanks`, in the same course of training."""

from __future__ import annotations

from typing import Any

import torch

from lrlora.adapters import Factors
from lrlora.learned import LearnedRanks, LossCurve
from lrlora.learned.directions import directions
from lrlora.learned.live_lora import lora_factors, put

_BISECTIONS = 50


class OwnShare(LearnedRanks):
    """Each module keeps the fewest directions that hold a share of its own predicted rise.

    The criterion of GRIT (arXiv:2601.00231) on the moments of learned ranks. The share is that of all modules, the
    largest that the budget allows. GRIT's own moments, projections and preconditioned gradients are not part of it.
    """

    def _chosen(self, curve: LossCurve) -> list[Factors]:
        cumulated = [of.rises.cumsum(0) / of.rises.sum().clamp(min=1e-300) for of in curve.modules]
        costs = [of.whole.parameters_per_rank for of in curve.modules]

        def ranks(share: float) -> list[int]:
            return [int((of < share).sum()) + 1 if of[-1] > 0 else 0 for of in cumulated]

        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            share = (low + high) / 2
            fits = sum(cost * rank for cost, rank in zip(costs, ranks(share), strict=True)) <= self._budget
            low, high = (share, high) if fits else (low, share)
        return [of.factors(rank) for of, rank in zip(curve.modules, ranks(low), strict=True)]


class Squeeze(LearnedRanks):
    """Each module keeps the same number of singular values, by truncated SVD: LoRA-Squeeze (arXiv:2602.10993)."""

    def _chosen(self, curve: LossCurve) -> list[Factors]:
        rank = self._budget // sum(of.whole.parameters_per_rank for of in curve.modules)
        return _truncated([of.whole for of in curve.modules], rank)


class GradualSqueeze(Squeeze):
    """LoRA-Squeeze in training: to 3/4, 1/2 and 1/4 of the wide rank, in equal intervals up to the cut.

    The optimizer begins anew at each of them; only after the last, the rate warms up.
    """

    def _after_step(self, *args: Any) -> None:
        for share in (1, 2):
            if self.ranks is None and self._done + 1 == round(share * self.cut_step / 3):
                wide = lora_factors(self._model, self._adapter)
                put(self._model, self._adapter, _truncated(wide, max(part.rank for part in wide) * (4 - share) // 4))
                self._restart()
        super()._after_step(*args)


RIVALS: dict[str, type[LearnedRanks]] = {"own-share": OwnShare, "equal": Squeeze, "gradual": GradualSqueeze}


@torch.no_grad()
def _truncated(factors: list[Factors], rank: int) -> list[Factors]:
    return [directions(part, None, 1).factors(rank) for part in factors]
