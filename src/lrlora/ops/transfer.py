"""φ as a module: learned parameters, and a layer's ΔW = (s/g)·φ(g·BA). See `phi.py` for the formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .form import Form
from .linear import adapted_linear, delta_weight
from .phi import FORMS, TransferSpec

__all__ = ["FORMS", "Transfer", "TransferSpec"]


class Transfer(Form):
    """φ with its learned parameters, which stay float32 when the model is cast.

    Attributes:
        spec: the fixed part of φ.
        amplitude, bandwidth: float32 parameters of shape (N,), initialized to zero; absent for "sine".

    """

    amplitude: nn.Parameter | None
    bandwidth: nn.Parameter | None

    def __init__(self, spec: TransferSpec) -> None:
        super().__init__()
        self.spec = spec
        for name in ("amplitude", "bandwidth"):
            parameter = nn.Parameter(torch.zeros(spec.num_basis)) if spec.is_learned else None
            self.register_parameter(name, parameter)

    def forward(self, z: Tensor) -> Tensor:
        """φ(z) by the formula, float64, with the shape of z, for inspection. Training reads φ from a table."""
        return self.spec.formula(z, self.amplitude, self.bandwidth)

    def linear(
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, gain: float, added_to: Tensor | None = None
    ) -> Tensor:
        y = adapted_linear(x, None, None, A, B, self, scaling=scaling, input_gain=gain)
        return y if added_to is None else added_to + y

    def fused_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *, scaling: float, gain: float
    ) -> Tensor:
        return adapted_linear(x, weight, bias, A, B, self, scaling=scaling, input_gain=gain)

    def delta(self, A: Tensor, B: Tensor, *, scaling: float, gain: float, rows: Tensor | None = None) -> Tensor:
        B = B if rows is None else F.embedding(rows, B)
        return delta_weight(A, B, self, scaling=scaling, input_gain=gain)

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
            given = next(parameter.dtype for parameter in self.parameters() if parameter.dtype != torch.float32)
            raise RuntimeError(
                f"Parameters of {type(self).__name__} must be float32, got {given}. If a library cast them (TRL does "
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
