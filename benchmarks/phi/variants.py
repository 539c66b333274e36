"""Variants of φ that the study tries and the library does not have."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from lrlora.transfer import Transfer, TransferSpec


@dataclass(frozen=True)
class CentredSpec(TransferSpec):
    """φ(z) − φ(0): no constant matrix in ΔW."""

    def basis(self, z: Tensor, bandwidth: Tensor) -> Tensor:
        return super().basis(z, bandwidth) - super().basis(z.new_zeros(()), bandwidth)

    def series_gradients(
        self, z: Tensor, grad: Tensor, basis: Tensor, amplitude: Tensor, bandwidth: Tensor
    ) -> tuple[Tensor, Tensor]:
        zero = z.new_zeros(1)
        at_zero = super().basis(zero, bandwidth)
        gradients = super().series_gradients(z, grad, basis + at_zero, amplitude, bandwidth)
        constant = super().series_gradients(zero, grad.sum().view(1), at_zero, amplitude, bandwidth)
        return gradients[0] - constant[0], gradients[1] - constant[1]


def centre(model: nn.Module) -> None:
    """Make every φ of the model a centred one."""
    for module in model.modules():
        if isinstance(module, Transfer):
            module.spec = CentredSpec(**asdict(module.spec))
