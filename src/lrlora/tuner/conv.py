"""Adapter for convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from .layer import LrLoraLayer


class Conv(LrLoraLayer):
    """1D to 3D convolution with W + ΔW; W (m, n/groups, k, …) is flattened to (m, n/groups·k·…)."""

    plain_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    adds_products = True

    def _features(self) -> tuple[int, int]:
        return self.base_layer.weight[0].numel(), self.base_layer.out_channels

    def _in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base_layer.weight.shape)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        return self.base_layer._conv_forward(x, self._delta(adapter).to(x.dtype), None)

    def _fused_output(self, x: Tensor, adapter: str) -> Tensor:
        base = self.base_layer
        return base._conv_forward(x, base.weight + self._delta(adapter).to(base.weight.dtype), base.bias)
