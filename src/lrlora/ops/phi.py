"""φ, the transfer function applied to every entry of the low-rank product.

    φ(z) = β(z) + ψ(clip(z, −I, I)),    ψ(z) = Σ_k a_k · sinc(ω_k (z − c_k)),    sinc(u) = sin(u) / u

The N centers c_k are fixed and equally spaced on [−I, I], h apart. Amplitudes a and bandwidths ω are learned
(arXiv:2606.04325). The backbone β is fixed and odd, and selected by `form`:

    residual     β(z) = z    ψ is learned curvature on top of plain LoRA
    sinc         β(z) = 0    the paper's form: ψ alone, not clipped, natural tails outside [−I, I]

The stored parameters are two float32 vectors that start at zero, so that weight decay pulls toward the start:

    a = a⁰ + μ·amplitude        ω = 2·ω₀·σ(μ·bandwidth)        ω₀ = π/h, the Shannon rate of the grid

μ is the learning-rate multiplier: under Adam, a step of size lr moves a by μ·lr, with any optimizer setup. The logistic
σ keeps ω inside (0, 2·ω₀), which bounds the error of the table. a⁰ is zero except for "sinc", where it is a
least-squares fit of the identity: with zero amplitudes, B = 0 would be a saddle point without any gradient.

φ is a function of one variable, so `table.py` samples it once on a fine grid and interpolates every entry: the cost per
entry does not depend on N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FORMS = ("residual", "sinc")


@dataclass(frozen=True)
class TransferSpec:
    """The fixed part of φ.

    Args:
        form: one of `FORMS`.
        num_basis: N ≥ 2, number of sinc terms.
        interval: I > 0, half-width of the grid of centers.
        lr_multiplier: μ > 0, learning rate of amplitudes and bandwidths relative to A and B.

    """

    form: str = "residual"
    num_basis: int = 8
    interval: float = 3.0
    lr_multiplier: float = 1.0

    @property
    def is_clipped(self) -> bool:
        return self.form != "sinc"

    @property
    def base_bandwidth(self) -> float:
        """ω₀ = π/h."""
        return math.pi * (self.num_basis - 1) / (2 * self.interval)

    @property
    def max_bandwidth(self) -> float:
        """2·ω₀, the open upper bound of every ω_k."""
        return 2 * self.base_bandwidth

    def centers(self, like: Tensor) -> Tensor:
        """Centers c (N,), with the dtype and device of `like`."""
        # Symmetrized explicitly: linspace is not exactly antisymmetric, and an odd φ requires it.
        grid = torch.linspace(-self.interval, self.interval, self.num_basis, dtype=like.dtype, device=like.device)
        return (grid - grid.flip(0)) / 2

    def amplitudes(self, amplitude: Tensor) -> Tensor:
        """Stored `amplitude` (N,) → a (N,), float64."""
        learned = self.lr_multiplier * amplitude.double()
        if self.form != "sinc":
            return learned
        return learned + _identity_amplitudes(self.num_basis, self.interval, device=learned.device)

    def bandwidths(self, bandwidth: Tensor) -> Tensor:
        """Stored `bandwidth` (N,) → ω (N,), float64."""
        return self.max_bandwidth * torch.sigmoid(self.lr_multiplier * bandwidth.double())

    def backbone(self, z: Tensor) -> Tensor:
        """β(z), with the shape and dtype of z."""
        return z if self.form == "residual" else torch.zeros_like(z)

    def backbone_slope(self, z: Tensor) -> Tensor:
        """β′(z), with the shape and dtype of z."""
        return torch.ones_like(z) if self.form == "residual" else torch.zeros_like(z)

    def basis(self, z: Tensor, bandwidth: Tensor) -> Tensor:
        """sinc(ω_k (z − c_k)) by the formula, float64, z.shape + (N,)."""
        z = z.double()
        return _sinc((z.unsqueeze(-1) - self.centers(z)) * self.bandwidths(bandwidth))

    def series(self, z: Tensor, amplitude: Tensor, bandwidth: Tensor) -> Tensor:
        """ψ(z) by the formula, float64, with the shape of z. Allocates numel(z) × N elements."""
        return self.sum(self.basis(z, bandwidth), amplitude)

    def sum(self, basis: Tensor, amplitude: Tensor) -> Tensor:
        """Σ_k a_k · basis[..., k]."""
        a = self.amplitudes(amplitude)
        # Summing from both ends makes an odd ψ exactly odd, and ψ(0) exactly 0, despite rounding.
        return (basis @ a + basis.flip(-1) @ a.flip(-1)) / 2

    def series_gradients(
        self, z: Tensor, grad: Tensor, basis: Tensor, amplitude: Tensor, bandwidth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(∂L/∂amplitude, ∂L/∂bandwidth), float64, from ∂L/∂ψ(z) = `grad` (P,) at z (P,) with its basis (P, N).

        Equals autograd through `series`, without evaluating the basis again.
        """
        omega = self.bandwidths(bandwidth)
        cosine = torch.cos((z.unsqueeze(-1) - self.centers(z)) * omega)
        # dω/dρ = μ·ω·(1 − ω/(2ω₀)), and ω·∂sinc(ω d)/∂ω = cos(ω d) − sinc(ω d).
        slope = self.lr_multiplier * (1 - omega / self.max_bandwidth) * self.amplitudes(amplitude)
        return self.lr_multiplier * (grad @ basis), slope * (grad @ (cosine - basis))

    def tail_slope(self, z: Tensor, amplitude: Tensor, bandwidth: Tensor) -> Tensor:
        """ψ′(z) by the formula, float64, with the shape of z, for |z| > I: away from every center."""
        distance = z.double().unsqueeze(-1) - self.centers(z.double())
        cosine = torch.cos(distance * self.bandwidths(bandwidth))
        return ((cosine - self.basis(z, bandwidth)) / distance) @ self.amplitudes(amplitude)

    def formula(self, z: Tensor, amplitude: Tensor, bandwidth: Tensor) -> Tensor:
        """φ(z) by the formula, differentiable, float64, with the shape of z."""
        inside = z = z.double()
        if self.is_clipped:  # with the slope of the inside at ±I, which `clamp` has in some versions of PyTorch only
            inside = torch.where(z.abs() <= self.interval, z, self.interval * z.sign())
        return self.backbone(z) + self.series(inside, amplitude, bandwidth)


def _sinc(u: Tensor) -> Tensor:
    """sin(u) / u, differentiable; overwrites zeros of u. `torch.sinc` takes three times as long."""
    is_zero = u == 0
    u.masked_fill_(is_zero, 1.0)
    return (torch.sin(u) / u).masked_fill_(is_zero, 1.0)


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute a tensor once on the CPU, usable by autograd from any context; cache it per device."""

    @functools.cache
    def fetch(*arguments: float, device: torch.device) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return function(*arguments).to(device)

    return fetch


@constant
def _identity_amplitudes(num_basis: int, interval: float) -> Tensor:
    """a⁰ of the "sinc" form: φ(z) ≈ z with slope 1 at 0, exactly antisymmetric, (N,), float64.

    Ridge least-squares fit at ω₀, weighted by a Gaussian of standard deviation I/4. Without the weight, the fit is
    dominated by the jump at ±I and ripples at the band edge: its slope at 0 is 1.55 for N = 50 and 0.53 for N = 9. With
    it, the slope is within 0.05 of 1 from N = 8 on, and φ within 0.01 of z on the inner half.
    """
    spec = TransferSpec("residual", num_basis, interval)
    z = torch.linspace(-interval, interval, 40 * num_basis + 1, dtype=torch.float64)
    weight = torch.exp(-(z / (interval / 4)).square() / 2)
    basis = _sinc((z.unsqueeze(-1) - spec.centers(z)) * spec.base_bandwidth)
    gram = basis.T @ (weight.unsqueeze(-1) * basis)
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(num_basis, dtype=torch.float64)
    fitted = torch.linalg.solve(gram + ridge, basis.T @ (weight * z))
    return (fitted - fitted.flip(0)) / 2
