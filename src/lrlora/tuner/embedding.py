"""Adapter for embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import LrLoraLayer


class Embedding(LrLoraLayer):
    """Row i of W + ΔW for token i of an `nn.Embedding` with the weight W (m tokens, n).

    Only the rows in a batch are computed: T·n entries for T tokens. Ignores dropout. Forward: (...) → (..., n).
    """

    def _features(self) -> tuple[int, int]:
        return self.base_layer.num_embeddings, self.base_layer.embedding_dim

    def _new_factors(self, r: int) -> tuple[nn.Linear, nn.Linear]:
        return nn.Linear(self.out_features, r, bias=False), nn.Linear(r, self.in_features, bias=False)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        A, B, phi = self._factors(adapter)
        tokens, padding = x.flatten(), self.base_layer.padding_idx
        delta = phi.delta(A, B, scaling=self.scaling[adapter], gain=self.input_gain[adapter], rows=tokens)
        if padding is not None:
            delta = torch.where((tokens == padding).unsqueeze(-1), delta.detach(), delta)  # padding is not trained
        scale = self._get_embed_scale()
        delta = delta if scale is None else delta * scale
        return delta.view(*x.shape, self.out_features)
