"""Two moments per module, in the bottleneck of its update, and the hooks that collect them.

For y = W0 x + B z with z = A x, let h = ∂L/∂z, where L is the sum of all loss terms. The curvature of the loss is about
Σ_t (h hᵀ) ⊗ (z zᵀ), and its partial traces over the tokens t are

    M_z = Σ w_h z zᵀ / T,     M_h = Σ w_z h hᵀ / number of loss terms          both (k, k)
    w_h = hᵀ(BᵀB)⁻¹h,     w_z = zᵀ(AAᵀ)⁻¹z,     T = Σ w_h w_z

w_h and w_z are the squares of ∂L/∂y and x within the span of the update. So padding, whose h is 0, counts in neither;
no token counts, or does not, because of rounding; and nothing depends on how ΔW is split into B and A. Neither does the
ridge of the inverses: λ(AAᵀ)⁻¹ is added to BᵀB, and λ(BᵀB)⁻¹ to AAᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Embedding
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from ..lora.factors import Factors
from ..lora.live import lora_weights
from ..ops.form import at_least_float32

RIDGE = 1e-2  # share of the mean σ² of the update
Batch = Mapping[str, Any]
IGNORED = -100  # label
_AT_ONCE = 2**24  # logits in float32, 64 MiB; those of a batch of texts and a large vocabulary have several GiB
_ROUNDING = {"rel_tol": 0.05, "abs_tol": 1e-3}  # of a model that computes its loss in bfloat16
# Model and batch → sum of the loss terms of each example, and their number, both (examples,).
Loss = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


class Moments(NamedTuple):
    """Moments of one module.

    Attributes:
        h_metric, z_metric: (BᵀB)⁻¹ and (AAᵀ)⁻¹ with ridge, (k, k), float64.
        sums: all sums below, in one tensor, (2 k² + 2,), float64.

    """

    h_metric: Tensor
    z_metric: Tensor
    sums: Tensor

    @classmethod
    def zeros(cls, pair: Factors, device: torch.device | str | None = None) -> Moments:
        """Moments of no tokens yet, for an update."""
        AAt, BtB = grams(pair)
        ridge = RIDGE * (AAt * BtB).sum() / pair.rank * torch.eye(pair.rank, dtype=AAt.dtype)
        # (BᵀB + λ(AAᵀ)⁻¹)⁻¹, and the reverse, without the inner inverse: early in training, B is nearly singular.
        h_metric = AAt @ torch.linalg.inv(BtB @ AAt + ridge)
        z_metric = BtB @ torch.linalg.inv(AAt @ BtB + ridge)
        return cls(h_metric.to(device), z_metric.to(device), AAt.new_zeros(2 * pair.rank**2 + 2, device=device))

    def to(self, device: torch.device | str, *, copy: bool = False) -> Moments:
        """Moments on a device."""
        return Moments(*(tensor.to(device, copy=copy) for tensor in self))

    @property
    def inputs(self) -> Tensor:
        """Σ w_h z zᵀ, (k, k)."""
        return self.sums[: self.h_metric.numel()].view_as(self.h_metric)

    @property
    def gradients(self) -> Tensor:
        """Σ w_z h hᵀ, (k, k)."""
        return self.sums[self.h_metric.numel() : -2].view_as(self.h_metric)

    @property
    def weight(self) -> Tensor:
        """T = Σ w_h w_z, ()."""
        return self.sums[-2]

    @property
    def calls(self) -> Tensor:
        """Number of calls of the module, ()."""
        return self.sums[-1]

    def add(self, z: Tensor, h: Tensor) -> None:
        """Add tokens, except those with values that are not finite: z and h (..., k), any dtype."""
        z, h = (at_least_float32(values).reshape(-1, values.shape[-1]) for values in (z, h))
        h_weight = ((h @ self.h_metric.to(h)) * h).sum(-1)
        z_weight = ((z @ self.z_metric.to(z)) * z).sum(-1)
        counted = (h_weight * z_weight).isfinite()
        # Not by indexing, which would wait for the GPU.
        h_weight, z_weight = (torch.where(counted, values, 0) for values in (h_weight, z_weight))
        h, z = (torch.where(counted[:, None], values, 0) for values in (h, z))
        inputs, gradients = z.T @ (h_weight[:, None] * z), h.T @ (z_weight[:, None] * h)
        weight = (h_weight * z_weight).sum()
        self.sums[:-1].add_(torch.cat([inputs.flatten(), gradients.flatten(), weight[None]]).to(self.sums))


def grams(pair: Factors) -> tuple[Tensor, Tensor]:
    """Gram matrices of the two sides of an update: AAᵀ and BᵀB, (k, k), float64."""
    into, out = sides(pair)
    return into @ into.T, out.T @ out


def sides(pair: Factors) -> tuple[Tensor, Tensor]:
    """Matrices that map inputs to z, (k, n), and z to outputs, (m, k), float64.

    An embedding looks up rows of B, so its bottleneck is on that side.
    """
    A, B = pair.A.double(), pair.B.double()
    return (B.T, A.T) if pair.layout.is_embedding else (A, B)


def _predicts_next(model: Any) -> bool:
    """Whether transformers shifts the labels of a model; None as a kind of loss is that of a causal LM as well."""
    kind = getattr(model, "loss_type", "")
    return kind in ("ForCausalLM", None) or (kind == "ForConditionalGeneration" and not model.config.is_encoder_decoder)


def model_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses of the examples of a batch with `labels`, from the logits of a transformers model.

    The terms are the cross-entropies of labels other than −100, for a causal language model of the next token; of
    labels of floating point the squared errors, or the binary cross-entropies where an example may have several.

    Returns:
        Sum of the terms of each example, and their number; both (examples,).

    Raises:
        ValueError: the model itself computes another loss.

    """
    outputs, labels = model(**batch), batch["labels"]
    logits, reported = outputs.logits, outputs.loss.item()
    del outputs  # and the graph of the model's loss
    sums, numbers = loss_terms(model, logits, labels)
    mean = (sums.sum() / numbers.sum()).item()
    # With no terms, both are 0/0.
    if math.isfinite(mean) and not math.isclose(mean, reported, **_ROUNDING):
        raise ValueError(
            f"{type(model).__name__} computes a loss of {reported:.4g}, but the mean cross-entropy (or squared error) "
            f"of its logits is {mean:.4g}. Pass its loss as a function (loss=)."
        )
    return sums, numbers


def loss_terms(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss terms of each example, and their number, as in `model_loss`; both (examples,)."""
    if labels.is_floating_point():
        logits, labels = (values.reshape(len(labels), -1) for values in (at_least_float32(logits), labels))
        if is_multi_label(model):
            terms = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
        else:
            terms = (logits - labels).square()
        is_counted = torch.ones_like(terms, dtype=torch.bool)
    else:
        if labels.dim() > 1 and _predicts_next(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        labels = labels.reshape(len(labels), -1)
        parts = [
            F.cross_entropy(part.flatten(0, 1), part_labels.flatten(), reduction="none").view_as(part_labels)
            for part, part_labels in _slices(logits.reshape(*labels.shape, logits.shape[-1]), labels)
        ]
        terms, is_counted = torch.cat(parts, 1), labels != IGNORED
    return terms.sum(1), is_counted.sum(1)


def _slices(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices along the tokens: of logits (examples, tokens, classes) in float32 or float64, and of labels."""
    tokens = max(1, _AT_ONCE // (len(logits) * logits.shape[-1]))
    for part, part_labels in zip(logits.split(tokens, 1), labels.split(tokens, 1), strict=True):
        yield at_least_float32(part), part_labels


def is_multi_label(model: Any) -> bool:
    """Whether each example of a classifier may have several labels, 0 or 1 for each."""
    return getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"


@torch.no_grad()
def with_sampled_labels(model: nn.Module, batch: Batch) -> Batch:
    """Batch with labels sampled from the model, whose gradients give its Fisher information.

    Where the labels are learned by heart, their own gradients vanish. Labels of floating point, or of another shape
    than the logits, stay.
    """
    labels = batch["labels"]
    logits = model(**batch).logits
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return batch
    rows = labels.reshape(len(labels), -1)
    parts = _slices(logits.reshape(*rows.shape, logits.shape[-1]), rows)
    drawn = torch.cat([torch.distributions.Categorical(logits=part).sample() for part, _ in parts], 1).view_as(labels)
    if labels.dim() > 1 and _predicts_next(model):
        drawn = torch.cat([labels[:, :1], drawn[:, :-1]], 1)
    return {**batch, "labels": torch.where(labels == IGNORED, labels, drawn)}


def channel_dim(layer: nn.Module) -> int:
    """Dimension of z that holds its k values."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def watch(z: Tensor, moments: Moments, channels: int) -> None:
    """Add z and its gradient to the moments at every backward; `channels` is the dimension of size k."""
    moments.sums[-1].add_(1)
    values = z.detach().movedim(channels, -1)
    z.register_hook(lambda h: moments.add(values, h.detach().movedim(channels, -1)))


def watch_layer(layer: Any, adapter: str, moments: Moments) -> RemovableHandle:
    """Add z and its gradient to the moments, whenever a LoRA layer runs with gradients; `remove` ends it."""
    if isinstance(layer, Embedding):
        return layer.register_forward_hook(partial(_watch_embedding, adapter, moments))

    def collect(down: nn.Module, inputs: Any, z: Tensor) -> None:
        if torch.is_grad_enabled():
            watch(z.requires_grad_(), moments, channel_dim(down))

    return layer.lora_A[adapter].register_forward_hook(collect)


def _watch_embedding(adapter: str, moments: Moments, layer: Any, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook of an embedding, which looks z up in a parameter: adds 0 with the gradient of z."""
    if not torch.is_grad_enabled():
        return output
    A, B = lora_weights(layer, adapter)
    z = F.embedding(inputs[0], A.T).requires_grad_()
    watch(z, moments, -1)
    scale = layer.scaling[adapter] * getattr(layer.get_base_layer(), "embed_scale", 1.0)  # of Gemma's embeddings
    return output + (scale * (z - z.detach()) @ B.T).to(output.dtype)
