"""Two moments per module, in the bottleneck of its update, and hooks that apply the update to a model.

For y = W0 x + B z with z = A x, let h = ∂L/∂z, where L is the sum of all loss terms. The curvature of the loss is about
Σ_t (h hᵀ) ⊗ (z zᵀ), and its partial traces over the tokens t are

    M_z = Σ w_h z zᵀ / T,     M_h = Σ w_z h hᵀ / number of loss terms          both (k, k)
    w_h = hᵀ(BᵀB)⁻¹h,     w_z = zᵀ(AAᵀ)⁻¹z,     T = Σ w_h w_z

w_h and w_z are the squares of ∂L/∂y and x within the span of the update. So padding, whose h is 0, counts in neither;
no token counts, or does not, because of rounding; and nothing depends on how ΔW is split into B and A. Neither does the
ridge of the inverses: λ(AAᵀ)⁻¹ is added to BᵀB, and λ(BᵀB)⁻¹ to AAᵀ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..lora.factors import Factors
from ..lora.host import tuner_layers
from ..naming import PEFT_PREFIX
from ..ops.form import at_least_float32

RIDGE = 1e-2  # share of the mean σ² of the update
Batch = Mapping[str, Any]
IGNORED = -100  # label
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
    def zeros(cls, part: Factors, device: torch.device | str | None = None) -> Moments:
        """Moments of no tokens yet, for an update."""
        AAt, BtB = grams(part)
        ridge = RIDGE * (AAt * BtB).sum() / part.rank * torch.eye(part.rank, dtype=AAt.dtype)
        # (BᵀB + λ(AAᵀ)⁻¹)⁻¹, and the reverse, without the inner inverse: early in training, B is nearly singular.
        h_metric = AAt @ torch.linalg.inv(BtB @ AAt + ridge)
        z_metric = BtB @ torch.linalg.inv(AAt @ BtB + ridge)
        return cls(h_metric.to(device), z_metric.to(device), AAt.new_zeros(2 * part.rank**2 + 2, device=device))

    def to(self, device: torch.device | str, *, copy: bool = False) -> Moments:
        """Moments on a device."""
        return Moments(*(part.to(device, copy=copy) for part in self))

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
        z, h = (at_least_float32(part).reshape(-1, part.shape[-1]) for part in (z, h))
        h_weight = ((h @ self.h_metric.to(h)) * h).sum(-1)
        z_weight = ((z @ self.z_metric.to(z)) * z).sum(-1)
        counted = (h_weight * z_weight).isfinite()
        # Not by indexing, which would wait for the GPU.
        h_weight, z_weight = (torch.where(counted, part, 0) for part in (h_weight, z_weight))
        h, z = (torch.where(counted[:, None], part, 0) for part in (h, z))
        inputs, gradients = z.T @ (h_weight[:, None] * z), h.T @ (z_weight[:, None] * h)
        weight = (h_weight * z_weight).sum()
        self.sums[:-1].add_(torch.cat([inputs.flatten(), gradients.flatten(), weight[None]]).to(self.sums))


def grams(part: Factors) -> tuple[Tensor, Tensor]:
    """Gram matrices of the two sides of an update: AAᵀ and BᵀB, (k, k), float64."""
    into, out = sides(part)
    return into @ into.T, out.T @ out


def sides(part: Factors) -> tuple[Tensor, Tensor]:
    """Matrices that map inputs to z, (k, n), and z to outputs, (m, k), float64.

    An embedding looks up rows of B, so its bottleneck is on that side.
    """
    A, B = part.A.double(), part.B.double()
    return (B.T, A.T) if part.layout.is_embedding else (A, B)


def _predicts_next(model: Any) -> bool:
    """Whether transformers shifts the labels of a model; None as a kind of loss is that of a causal LM as well."""
    kind = getattr(model, "loss_type", "")
    return kind in ("ForCausalLM", None) or (kind == "ForConditionalGeneration" and not model.config.is_encoder_decoder)


def model_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses of the examples of a batch with `labels`, from the logits of a transformers model.

    The terms are the cross-entropies of labels other than −100, for a causal language model of the next token; the
    squared errors of labels of floating point.

    Returns:
        Sum of the terms of each example, and their number; both (examples,).

    Raises:
        ValueError: the model itself computes another loss.

    """
    outputs, labels = model(**batch), batch["labels"]
    logits, own = outputs.logits, outputs.loss.item()
    del outputs  # and the graph of the model's loss
    sums, numbers = loss_terms(model, logits, labels)
    mean = (sums.sum() / numbers.sum()).item()
    # With no terms, both are 0/0.
    if math.isfinite(mean) and not math.isclose(mean, own, **_ROUNDING):
        raise ValueError(
            f"{type(model).__name__} computes a loss of {own:.4g}, but the mean cross-entropy (or squared error) of "
            f"its logits is {mean:.4g}. Pass its loss as a function (loss=)."
        )
    return sums, numbers


def loss_terms(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss terms of each example, and their number, as in `model_loss`; both (examples,)."""
    logits = at_least_float32(logits)
    if labels.is_floating_point():
        terms = (logits.reshape(len(labels), -1) - labels.reshape(len(labels), -1)).square()
        is_counted = torch.ones_like(terms, dtype=torch.bool)
    else:
        if labels.dim() > 1 and _predicts_next(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        terms = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
        terms, is_counted = (part.reshape(len(labels), -1) for part in (terms, labels != IGNORED))
    return terms.sum(1), is_counted.sum(1)


@torch.no_grad()
def with_sampled_labels(model: nn.Module, batch: Batch) -> Batch:
    """Batch with labels sampled from the model, whose gradients give its Fisher information.

    Where the labels are learned by heart, their own gradients vanish. Labels of floating point, or of another shape
    than the logits, stay.
    """
    labels = batch["labels"]
    logits = at_least_float32(model(**batch).logits)
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return batch
    drawn = torch.distributions.Categorical(logits=logits).sample()
    if labels.dim() > 1 and _predicts_next(model):
        drawn = torch.cat([labels[:, :1], drawn[:, :-1]], 1)
    return {**batch, "labels": torch.where(labels == IGNORED, labels, drawn)}


def collect_moments(
    model: nn.Module, factors: Sequence[Factors], batches: Iterable[Any], loss: Loss = model_loss
) -> tuple[dict[str, Moments], int]:
    """Run batches forward and backward with factors in place of the adapter; parameters get no gradient.

    Needs, besides a step's activations, two k × k matrices per module, and z (tokens, k) until the backward is done.

    Args:
        model: unmerged PEFT model with the adapter of the factors, or a base model.
        factors: factors returned by `factorize`.
        batches: inputs of `loss`, on the model's device.
        loss: returns the sum of the loss terms of each example of a batch, and their number, both (examples,).

    Returns:
        Module → its moments; and the number of loss terms.

    Raises:
        ValueError: a module is missing or did not run, or a loss is not finite.

    """
    moments = {part.module: Moments.zeros(part) for part in factors if part.rank}
    total = 0
    with thin_updates(model, factors, moments) as base, torch.enable_grad():
        for batch in batches:
            sums, numbers = loss(base, batch)
            value, terms = sums.sum(), int(numbers.sum())
            if not terms:
                continue
            if not torch.isfinite(value):
                raise ValueError(
                    f"The loss on the data is {value.item()}, so its gradients cannot be used. Check the data."
                )
            value.backward()
            total += terms
    if not total:
        raise ValueError("The data has no batch with a label, so there is no loss.")
    if idle := [module for module, of in moments.items() if not of.calls]:
        raise ValueError(
            f"No token reached {idle[0]} ({len(idle)} of {len(moments)} modules), so its effect on the loss is "
            "unknown. Provide more data, or cut by energy (--by energy)."
        )
    return moments, total


@contextlib.contextmanager
def thin_updates(
    model: nn.Module, factors: Sequence[Factors], moments: Mapping[str, Moments] | None = None
) -> Iterator[nn.Module]:
    """Compute y = W0 x + B A x in every module of `factors`, in place of the PEFT adapter.

    Trained heads and biases are kept. Inside the context, the model is in eval mode and its parameters are frozen.

    Args:
        model: unmerged PEFT model, or a base model.
        factors: factors of its modules; products use their dtype.
        moments: updated at every backward, if given.

    Yields:
        The base model to call.

    Raises:
        ValueError: a module is missing, or is not a linear layer, convolution or embedding.

    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = {path.removeprefix(PEFT_PREFIX): module for path, module in model.named_modules()}
    tuned = [layer for _, layer in tuner_layers(model) if not layer.disable_adapters]
    if any(layer.merged for layer in tuned):
        raise ValueError("The adapter is merged into the base weights. Call unmerge_adapter() first.")
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as undo:
        for module, mode in modes:
            undo.callback(setattr, module, "training", mode)
        for parameter, is_trained in trained:
            undo.callback(parameter.requires_grad_, is_trained)
        model.eval()
        for part in factors:
            if not part.rank:
                continue
            target = modules.get(part.module)
            if target is None:
                raise ValueError(f"The model has no module {part.module}, so it is not the base model of the adapter.")
            counted = None if moments is None else moments[part.module]
            undo.callback(target.register_forward_hook(_hook(target, part, counted)).remove)
        for layer in tuned:
            undo.callback(layer.enable_adapters, True)
            layer.enable_adapters(False)
        model.requires_grad_(False)
        yield base


def channel_dim(layer: nn.Module) -> int:
    """Dimension of z that holds its k values."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def watch(z: Tensor, moments: Moments, channels: int) -> None:
    """Add z and its gradient to the moments at every backward; `channels` is the dimension of size k."""
    moments.sums[-1].add_(1)
    values = z.detach().movedim(channels, -1)
    z.register_hook(lambda h: moments.add(values, h.detach().movedim(channels, -1)))


def _hook(module: nn.Module, part: Factors, moments: Moments | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    device = next(chain(layer.parameters(), layer.buffers())).device  # a quantized weight may be a buffer
    down, up = _maps(layer, part.A.to(device), part.B.to(device))
    channels = channel_dim(layer)

    def add(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        z = down(arguments[0])
        if moments is not None and torch.is_grad_enabled():
            watch(z.requires_grad_(), moments, channels)
        return output + up(z).to(output.dtype)

    return add


def _maps(layer: Any, A: Tensor, B: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions that map a layer's input to z, and z to its output; both in the dtype of A."""
    if isinstance(layer, nn.Embedding):
        scale = getattr(layer, "embed_scale", 1.0)  # Gemma's embeddings
        return (lambda x: F.embedding(x, B)), (lambda z: scale * (z @ A))
    if isinstance(layer, _ConvNd):
        kernel = A.unflatten(1, (-1, *layer.kernel_size))
        return (lambda x: layer._conv_forward(x.to(A.dtype), kernel, None)), (
            lambda z: torch.einsum("mk,bk...->bm...", B, z)
        )
    if A.shape[1] != getattr(layer, "in_features", A.shape[1]):
        raise ValueError(f"A layer has {layer.in_features} inputs, but its update has {A.shape[1]}.")
    return (lambda x: F.linear(x.to(A.dtype), A)), (lambda z: F.linear(z, B))
