"""Two moments per module, in the bottleneck of its update, and hooks that apply the update to a model.

For y = W0 x + B z with z = A x, let h = ∂L/∂z, where L is the sum of all loss terms. Over the tokens with h ≠ 0:

    M_z = mean of z zᵀ,     M_h = sum of h hᵀ / number of loss terms          both (k, k)

Padding and other tokens that do not affect the loss have h = 0 and count in neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..adapters import Factors
from ..naming import path_in_base
from ..ops.form import at_least_float32

Batch = Mapping[str, Any]
# Batch → (sum of its loss terms, a scalar; their number).
Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]


@dataclass
class Moments:
    """Moments of one module.

    Attributes:
        inputs: Σ z zᵀ, (k, k), float64.
        gradients: Σ h hᵀ, (k, k), float64.
        tokens: count with h ≠ 0, (), int64.
        calls: call count.

    """

    inputs: Tensor
    gradients: Tensor
    tokens: Tensor
    calls: int = 0

    @classmethod
    def zeros(cls, k: int, device: torch.device | str = "cpu") -> Moments:
        sums = torch.zeros(2, k, k, dtype=torch.float64, device=device)
        return cls(sums[0], sums[1], torch.zeros((), dtype=torch.int64, device=device))

    def cpu(self) -> Moments:
        return Moments(self.inputs.cpu(), self.gradients.cpu(), self.tokens.cpu(), self.calls)

    def add(self, z: Tensor, h: Tensor) -> None:
        """Add tokens, except those whose h is 0 or not finite: z and h (..., k), any dtype."""
        z, h = at_least_float32(z.flatten(0, -2)), at_least_float32(h.flatten(0, -2))
        # Not by indexing, which would wait for the GPU.
        counted = (h != 0).any(-1) & h.isfinite().all(-1)
        z, h = (torch.where(counted[:, None], part, 0) for part in (z, h))
        self.inputs += (z.T @ z).to(self.inputs)
        self.gradients += (h.T @ h).to(self.gradients)
        self.tokens += counted.sum().to(self.tokens)


def model_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Loss of a transformers model for a batch with `labels`, as a sum.

    Its terms are the labels other than −100; for a causal language model, without the first of each sequence.
    """
    labels = batch["labels"]
    # transformers treats None as a causal LM as well.
    is_shifted = labels.dim() > 1 and getattr(model, "loss_type", "") in ("ForCausalLM", None)
    terms = int((labels[..., 1:] if is_shifted else labels).ne(-100).sum())
    # With no terms, transformers returns 0/0.
    return (model(**batch).loss * terms if terms else torch.zeros(())), terms


def collect_moments(
    model: nn.Module, factors: Sequence[Factors], batches: Iterable[Any], loss: Loss = model_loss
) -> tuple[dict[str, Moments], int]:
    """Run batches forward and backward with factors in place of the adapter; parameters get no gradient.

    Needs, besides a step's activations, two k × k matrices per module, and z (tokens, k) until the backward is done.

    Args:
        model: unmerged PEFT model with the adapter of the factors, or a base model.
        factors: factors returned by `factorize`.
        batches: inputs of `loss`, on the model's device.
        loss: returns the sum of a batch's loss terms, and their number.

    Returns:
        Module → its moments; and the number of loss terms.

    Raises:
        ValueError: a module is missing or did not run, or a loss is not finite.

    """
    moments = {part.module: Moments.zeros(part.rank) for part in factors if part.rank}
    total = 0
    with thin_updates(model, factors, moments) as base, torch.enable_grad():
        for batch in batches:
            value, terms = loss(base, batch)
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
    modules = {path_in_base(path): module for path, module in model.named_modules()}
    # Trained tokens are not a module's update and stay unchanged.
    kept = {
        part for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper) for part in module.modules()
    }
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer) and module not in kept]
    tuned = [layer for layer in layers if not layer.disable_adapters]
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


def _hook(module: nn.Module, part: Factors, moments: Moments | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    device = next(chain(layer.parameters(), layer.buffers())).device  # a quantized weight may be a buffer
    down, up = _maps(layer, part.A.to(device), part.B.to(device))
    channels_first = isinstance(layer, _ConvNd)

    def add(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        z = down(arguments[0])
        if moments is not None and torch.is_grad_enabled():
            moments.calls += 1
            z.requires_grad_()

            def count(h: Tensor) -> None:
                pair = (z.detach(), h)
                moments.add(*(part.movedim(1, -1) for part in pair) if channels_first else pair)

            z.register_hook(count)
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
