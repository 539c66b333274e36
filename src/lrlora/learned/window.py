"""Moments of the ordinary steps before a cut, of all processes together.

Forward hooks on `lora_A` collect them, so that no extra pass over data is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..lora.host import WITHOUT_KERNELS
from ..lora.live import lora_factors, lora_layers, lora_weights
from ..sharding import local_part, processes
from .moments import Moments, channel_dim, watch

_MAX_STEPS = 32  # steps


class Window:
    """Steps whose moments choose the ranks.

    Args:
        model: host of the LoRA.
        adapter: its name.
        cut_step: step at whose end the window closes.
        loss_scale: returns the factor of the loss in the next backward; None without a loss scaler.

    Attributes:
        moments: module → its moments; those of modules whose update is zero are missing.
        length: number of steps.

    """

    def __init__(self, model: Any, adapter: str, cut_step: int, loss_scale: Callable[[], float] | None) -> None:
        self._model, self._adapter, self._layers = model, adapter, lora_layers(model, adapter)
        self._loss_scale = loss_scale
        # The metric of the moments is that of the window's begin: not of the first steps, when B is nearly 0.
        self.length = min(_MAX_STEPS, (cut_step + 1) // 2)
        self.moments: dict[str, Moments] = {}
        self._local_moments: dict[str, Moments] = {}  # of this process, since its last step
        self._scale = 1.0  # of the loss in these
        self._reached: set[str] | None = set()  # modules whose lora_A ran in the first step
        self._watchers: list[Any] = []
        self._watch(_reach)

    def __reduce__(self) -> Any:
        """Copies and pickles of a model collect nothing."""
        return type(None), ()

    def _watch(self, hook: Callable[..., None] | None) -> None:
        """Remove the forward hooks on lora_A; install `hook` unless None."""
        for watcher in self._watchers:
            watcher.remove()
        self._watchers = []
        if hook is not None:
            for path, layer in self._layers.items():
                self._watchers.append(layer.lora_A[self._adapter].register_forward_hook(partial(hook, self, path)))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not notice hooks that come and go

    def end_first_step(self, *, is_deepspeed: bool) -> None:
        """Raise ValueError if a kernel trains a module without calling its lora_A, whose values would not be seen."""
        reached = self._reached
        if reached is None:
            return
        for path, layer in self._layers.items():
            gradient = lora_weights(layer, self._adapter)[1].grad  # ZeRO keeps it elsewhere
            has_gradient = gradient is not None and bool(local_part(gradient).any())
            if path not in reached and (not reached if is_deepspeed else has_gradient):
                raise ValueError(
                    f"{path} trains without a call of its lora_A: a fused kernel bypasses PEFT's forward. "
                    f"{WITHOUT_KERNELS}"
                )
        self._reached = None
        self._watch(None)

    def open(self) -> None:
        """Begin or continue to collect moments of the modules whose update is not zero."""
        if not self._watchers:
            self._watch(_collect)
        if len(self.moments) < len(self._layers):
            for pair in lora_factors(self._model, self._adapter):
                if pair.energy and pair.module not in self.moments:
                    self.moments[pair.module] = Moments.zeros(pair, self._device(pair.module))
        for path, moments in self.moments.items():
            if path not in self._local_moments:
                self._local_moments[path] = moments._replace(sums=torch.zeros_like(moments.sums))

    def load(self, moments: Mapping[str, Moments]) -> None:
        """Continue with the moments of a checkpoint."""
        self.close()
        self.moments = {path: module_moments.to(self._device(path)) for path, module_moments in moments.items()}

    def close(self) -> None:
        """Collect no more."""
        self.moments, self._local_moments, self._reached = {}, {}, None
        self._watch(None)

    def _device(self, path: str) -> torch.device:
        return lora_weights(self._layers[path], self._adapter)[0].device

    def end_step(self) -> None:
        """Add the moments of the last step of all processes; each has the gradient of its own mean loss."""
        if not self._local_moments:
            return
        flat = torch.cat([moments.sums for moments in self._local_moments.values()])
        if processes() > 1:
            dist.all_reduce(flat)
        sums = flat.div_((processes() * self._scale) ** 2).split(
            [moments.sums.numel() for moments in self._local_moments.values()]
        )
        for path, module_sums in zip(self._local_moments, sums, strict=True):
            self.moments[path].sums.add_(module_sums)
        self.drop_step()

    def drop_step(self) -> None:
        """Forget the moments of a step that was skipped."""
        for moments in self._local_moments.values():
            moments.sums.zero_()

    def _read_scale(self) -> None:
        """Before a module's moments: the scale of the loss, which changes after a step that was skipped."""
        if self._loss_scale is not None and (scale := self._loss_scale()) != self._scale:
            self.drop_step()
            self._scale = scale


def _reach(window: Window | None, path: str, *args: Any) -> None:
    """Forward hook in the first step; without `window` in a copy of the model."""
    if window is None or window._reached is None:
        return
    if args[-1].dtype is torch.float16 and window._loss_scale is None:
        raise ValueError(
            "Fitted ranks in float16 need the scaler of the loss, whose scale changes. Pass it: "
            "FittedRanks(..., scaler=scaler); without one, scaler=torch.amp.GradScaler(enabled=False)."
        )
    window._reached.add(path)


@torch.compiler.disable  # hooks on gradients cannot be traced
def _collect(window: Window | None, path: str, down: nn.Module, inputs: Any, z: Tensor) -> None:
    """Forward hook in the steps that give moments."""
    if window is not None and z.requires_grad and path in window._local_moments:
        window._read_scale()
        watch(z, window._local_moments[path], channel_dim(down))
