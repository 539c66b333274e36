"""TRL's trainer, with evaluations that weight every token alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer  # type: ignore[attr-defined]  # imported lazily

from ...learned.moments import IGNORED


class TokenMeanTrainer(SFTTrainer):
    """`SFTTrainer` whose evaluations do not depend on the batches.

    SFTTrainer averages the means of batches, so that a token counts more the fewer are in its batch.
    """

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        result = super().prediction_step(model, inputs, *args, **options)
        tokens: Tensor = (inputs["labels"][..., 1:] != IGNORED).sum()
        # The mean loss of all processes, and their tokens.
        loss, count = self.accelerator.gather(result[0]).mean(), self.accelerator.gather(tokens).sum()
        self._batches.append((loss.item(), count.item()))
        return result

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        self._batches: list[tuple[float, int]] = []
        output = super().evaluation_loop(*args, **options)
        losses, counts = zip(*self._batches, strict=True)
        metrics: Any = output.metrics
        if sum(counts):
            (name,) = (name for name in metrics if name.endswith("_loss"))
            metrics[name] = float(np.average(losses, weights=counts))
            for values in self._metrics["eval"].values():
                if len(values) == len(counts):
                    values[:] = [float(np.average(values, weights=counts))]
        return output
