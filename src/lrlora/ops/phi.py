"""φ, the transfer function applied to every entry of the low-rank product.

    φ(z) = β·z + ψ(clip(z, −I, I)),    ψ(z) = Σ_k a_k · basis_k(z)

β, the basis, and whether ψ is clipped depend on the form (`phi_forms.py`). The stored parameters are float32 vectors
that start at zero, so that weight decay pulls toward the start: amplitudes first, then those that shape the basis, such
as bandwidths. Both enter after multiplication by μ:

    a = a⁰ + μ·phi[0],    shape of the basis = μ·phi[1:]

μ is the learning-rate multiplier: under Adam, a step of size lr moves a by μ·lr, with any optimizer setup.

φ is a function of one variable, so `table.py` samples it once on a fine grid and interpolates every entry: the cost per
entry does not depend on N.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .phi_forms import FORMS, PhiForm


@dataclass(frozen=True)
class TransferSpec:
    """The fixed part of φ. Its methods take the learned part `phi`, (P, N) float32: rows as in `phi_form.parameters`.

    Args:
        form: a name in `lrlora.ops.phi_forms.FORMS`.
        num_basis: N ≥ 2, number of terms of ψ.
        interval: I > 0, half-width of the grid.
        lr_multiplier: μ > 0, learning rate of φ relative to A and B.

    """

    form: str = "residual"
    num_basis: int = 8
    interval: float = 3.0
    lr_multiplier: float = 1.0

    @functools.cached_property
    def phi_form(self) -> PhiForm:
        return FORMS[self.form](self.num_basis, self.interval)

    def amplitudes(self, phi: Tensor) -> Tensor:
        """Amplitudes a (N,), float64."""
        return self.phi_form.start(phi.device) + self.lr_multiplier * phi[0].double()

    def basis(self, z: Tensor, phi: Tensor) -> Tensor:
        """basis_k(z) by the formula, float64, z.shape + (N,)."""
        return self.phi_form.basis(z.double(), self._shape(phi))

    def series(self, z: Tensor, phi: Tensor) -> Tensor:
        """ψ(z) by the formula, not clipped, float64, with the shape of z. Allocates numel(z) × N elements."""
        return self.sum(self.basis(z, phi), phi)

    def sum(self, basis: Tensor, phi: Tensor) -> Tensor:
        """Σ_k a_k · basis[..., k]."""
        a = self.amplitudes(phi)
        # Summing from both ends makes an odd ψ exactly odd, and ψ(0) exactly 0, despite rounding.
        return (basis @ a + basis.flip(-1) @ a.flip(-1)) / 2

    def series_gradient(self, z: Tensor, grad: Tensor, basis: Tensor, phi: Tensor) -> Tensor:
        """∂L/∂phi (P, N), float64, from ∂L/∂ψ(z) = `grad` (points,) at z (points,) with its basis (points, N).

        Equals autograd through `series`, without evaluating the basis again.
        """
        gradients = self.phi_form.gradients(z.double(), grad, basis, self.amplitudes(phi), self._shape(phi))
        return self.lr_multiplier * gradients

    def tail_slope(self, z: Tensor, phi: Tensor) -> Tensor:
        """ψ′(z) by the formula, float64, with the shape of z, for |z| > I, of a form that is not clipped."""
        return self.phi_form.basis_slope(z.double(), self._shape(phi)) @ self.amplitudes(phi)

    def formula(self, z: Tensor, phi: Tensor) -> Tensor:
        """φ(z) by the formula, differentiable, float64, with the shape of z."""
        inside = z = z.double()
        if self.phi_form.is_clipped:  # with the slope of the inside at ±I, which `clamp` has in some PyTorch versions
            inside = torch.where(z.abs() <= self.interval, z, self.interval * z.sign())
        return self.phi_form.backbone * z + self.series(inside, phi)

    def _shape(self, phi: Tensor) -> Tensor:
        """Parameters of the basis, (P − 1, N), float64."""
        return self.lr_multiplier * phi[1:].double()
