"""φ as a module: learned parameters, and a layer's ΔW = (s/g)·φ(g·BA). See `phi.py` for the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .form import Form
from .fused_linear import adapted_linear, delta_weight
from .phi import TransferSpec

INPUT_RMS = 0.5  # c, chosen in lab/studies/unit_input.md
LEAST_RMS = 1e-12  # B starts at zero


def input_gain(A: Tensor, B: Tensor, gain: float | None) -> Tensor:
    """g, or c / rms(BA) if `gain` is None: entries of the input g·BA of φ of the same size in every module.

    rms(BA)² = tr(BᵀB·AAᵀ) / (m·n) takes two r×r products. It has no gradient. Zero rows of B do not count: those of
    tokens that an embedding has not seen.

    Args:
        A: (..., r, n), float32 or float64.
        B: (..., m, r), with the same leading dimensions.
        gain: g > 0, or None.

    Returns:
        (...), one g for each matrix, with the dtype and device of A.

    """
    if gain is not None:
        return A.new_full(A.shape[:-2], gain)
    # In float32, rounding, which depends on the alignment in memory, would change g from one load to the next.
    dtype, A, B = A.dtype, A.detach().double(), B.detach().double()
    rows = (B != 0).any(-1).sum(-1).clamp(min=1)
    square = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)) / (rows * A.shape[-1])
    return (INPUT_RMS * square.clamp(min=LEAST_RMS**2).rsqrt()).to(dtype)


class Transfer(Form):
    """φ with its learned parameters, which stay float32 when the model is cast.

    They are vectors (N,), named by the form (`amplitude`, `bandwidth`) and initialized to zero.

    Attributes:
        spec: the fixed part of φ.

    """

    def __init__(self, spec: TransferSpec) -> None:
        super().__init__()
        self.spec = spec
        for name in spec.phi_form.parameters:
            self.register_parameter(name, nn.Parameter(torch.zeros(spec.num_basis)))

    def forward(self, z: Tensor) -> Tensor:
        """φ(z) by the formula, float64, with the shape of z, for inspection. Training reads φ from a table."""
        return self.spec.formula(z, self.learned.to(z.device))

    @property
    def learned(self) -> Tensor:
        """All learned parameters, (P, N), float32, differentiable."""
        return torch.stack(tuple(self.parameters()))

    def linear(
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, gain: float | None, added_to: Tensor | None = None
    ) -> Tensor:
        y = self.fused_linear(x, None, None, A, B, scaling=scaling, gain=gain)
        return y if added_to is None else added_to + y

    def fused_linear(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        *,
        scaling: float,
        gain: float | None,
    ) -> Tensor:
        """Compute y = x (W + ΔW)ᵀ + b with ΔW = (s/g)·φ(g·BA), or x ΔWᵀ + b if `weight` is None.

        In half precision, rounding W + ΔW loses part of a small update. W and ΔW are therefore multiplied separately;
        only ∂L/∂x uses their rounded sum, with an error comparable to rounding ∂L/∂x itself. Saves x, W, A, B and the
        parameters of φ for the backward, and no other m×n tensor.

        Args:
            x: (..., n), float64, float32, bfloat16 or float16; unaffected by autocast.
            weight: W (m, n) in the dtype of x; may be a transposed view.
            bias: b (m,).
            A: (r, n).
            B: (m, r).
            scaling: s.
            gain: g > 0, or None: see `input_gain`.

        Returns:
            (..., m) in the dtype of x.

        Raises:
            NotImplementedError: called under a torch.func transform.

        """
        return adapted_linear(x, weight, bias, *self._arguments(x, A, B, scaling, gain, None))

    def delta(self, A: Tensor, B: Tensor, *, scaling: float, gain: float | None, rows: Tensor | None = None) -> Tensor:
        """ΔW = (s/g)·φ(g·BA), differentiable; saves A, B and the parameters of φ, and no m×n tensor.

        Args:
            A: (..., r, n).
            B: (..., m, r), with the same leading dimensions.
            scaling: s.
            gain: g > 0, or None: see `input_gain`.
            rows: indices of the rows to compute, for B (m, r); default: all.

        Returns:
            (..., m, n), or (len(rows), n); float32, or float64 if A or B are.

        Raises:
            NotImplementedError: called under a torch.func transform.

        """
        return delta_weight(*self._arguments(None, A, B, scaling, gain, rows))

    def _arguments(
        self, x: Tensor | None, A: Tensor, B: Tensor, scaling: float, gain: float | None, rows: Tensor | None
    ) -> tuple[Any, ...]:
        """Arguments of the operators in `fused_linear.py`, starting with A."""
        # Forward-mode derivatives would silently treat the operators as zero.
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "torch.func transforms (grad, jvp, vmap, …) are not supported by LR-LoRA layers. Use torch.autograd, "
                "or merge the adapter first (`model.merge_and_unload()`)."
            )
        # At least float32: in half precision, rounding of BA would swamp the entries of ΔW.
        is_double = any(t is not None and t.dtype == torch.float64 for t in (x, A, B))
        dtype = torch.float64 if is_double else torch.float32
        spec = self.spec
        A, B = A.to(dtype), B.to(dtype)
        g = input_gain(A, B, gain)
        B = B if rows is None else F.embedding(rows, B)
        settings = (spec.form, spec.num_basis, float(spec.interval), float(spec.lr_multiplier))
        phi = self.learned.to(A.device)  # of a φ shared across devices, stored on one of them
        return A, B, g, phi, float(scaling), *settings

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transfer:
        # `.to(dtype)`, `.half()` and similar calls move the parameters between devices but keep float32: optimizer
        # steps on them are far smaller than half precision resolves.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def train(self, mode: bool = True) -> Transfer:
        """Also restore float32."""
        self._restore_precision()
        return super().train(mode)

    def prepare_forward(self) -> None:
        """Restore float32 and unshard an FSDP2-sharded module before a forward pass.

        Raises:
            RuntimeError: a parameter is not float32 during distributed training, where it cannot be cast.

        """
        unshard = getattr(self, "unshard", None)
        if unshard is not None:
            unshard()
        if all(parameter.dtype == torch.float32 for parameter in self.parameters()):
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            dtype = next(parameter.dtype for parameter in self.parameters() if parameter.dtype != torch.float32)
            raise RuntimeError(
                f"Parameters of {type(self).__name__} must be float32, got {dtype}. If a library cast them (TRL does "
                "for quantized models), call model.train() before training to restore float32. Before fully_shard in "
                "mixed precision, call lrlora.fully_shard_phi(model, mesh=mesh). For DeepSpeed, set torch_autocast "
                "instead of bf16."
            )
        self._restore_precision()

    def _restore_precision(self) -> None:
        # Undoes casts of `parameter.data` by other libraries, such as TRL.
        for parameter in self.parameters():
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()

    def extra_repr(self) -> str:
        return f"form={self.spec.form!r}, num_basis={self.spec.num_basis}, interval={self.spec.interval}"
