"""Forms of φ: all that differs between them. `phi.py` has what they share; `FORMS` names them.

A form is φ(z) = β·z + ψ(z) with a backbone of fixed slope β and a bandlimited series ψ(z) = Σ_k a_k · basis_k(z):

    residual     β = 1    ψ is learned curvature on top of plain LoRA, clipped to [−I, I]
    sinc         β = 0    the paper's form: ψ alone, not clipped, natural tails outside [−I, I]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class PhiForm:
    """A form of φ on its grid. Subclass it for another basis, and name the subclass in `FORMS`.

    Args:
        num_basis: N ≥ 2, number of terms.
        interval: I > 0, half-width of the grid.

    Attributes:
        backbone: β.
        is_clipped: whether ψ(z) is ψ(±I) beyond ±I.
        parameters: names of the P learned vectors (N,): amplitudes, then those that shape the basis. All start at zero.

    """

    backbone: ClassVar[float]
    is_clipped: ClassVar[bool]
    parameters: ClassVar[tuple[str, ...]]

    num_basis: int
    interval: float

    @property
    def band_limit(self) -> float:
        """Bound on the angular frequencies of ψ, in radians per unit of z, whatever the parameters: ψ is tabulated."""
        raise NotImplementedError

    def start(self, device: torch.device) -> Tensor:
        """Amplitudes a⁰ at the start, (N,), float64, with which φ is odd and has slope 1 at 0: zero if β = 1."""
        return torch.zeros(self.num_basis, dtype=torch.float64, device=device)

    def basis(self, z: Tensor, shape: Tensor) -> Tensor:
        """basis_k(z), differentiable, float64, z.shape + (N,), for float64 z and `shape` (P − 1, N)."""
        raise NotImplementedError

    def basis_slope(self, z: Tensor, shape: Tensor) -> Tensor:
        """basis_k′(z) for |z| > I, as `basis`. Of a form that is not clipped."""
        raise NotImplementedError

    def gradients(self, z: Tensor, grad: Tensor, basis: Tensor, amplitudes: Tensor, shape: Tensor) -> Tensor:
        """∂L/∂(a, shape) (P, N) from ∂L/∂ψ(z) = `grad` (points,) at z (points,) with its basis (points, N), float64.

        Override it if P > 1. Equals autograd through `basis`, without evaluating the basis again.
        """
        return (grad @ basis).unsqueeze(0)


class SincSeries(PhiForm):
    """ψ(z) = Σ_k a_k · sinc(ω_k (z − c_k)),  sinc(u) = sin(u) / u  (arXiv:2606.04325).

    The N centers c_k are fixed and equally spaced on [−I, I], h apart. Bandwidths are learned:

        ω = 2·ω₀·σ(μ·bandwidth),  ω₀ = π/h, the Shannon rate of the grid

    The logistic σ keeps ω inside (0, 2·ω₀), which bounds the error of the table.
    """

    parameters = ("amplitude", "bandwidth")

    @property
    def base_bandwidth(self) -> float:
        """ω₀ = π/h."""
        return math.pi * (self.num_basis - 1) / (2 * self.interval)

    @property
    def band_limit(self) -> float:
        return 2 * self.base_bandwidth

    def centers(self, device: torch.device) -> Tensor:
        """Centers c (N,), float64."""
        # Symmetrized explicitly: linspace is not exactly antisymmetric, and an odd φ requires it.
        grid = torch.linspace(-self.interval, self.interval, self.num_basis, dtype=torch.float64, device=device)
        return (grid - grid.flip(0)) / 2

    def bandwidths(self, shape: Tensor) -> Tensor:
        """ω (N,) from `shape` (1, N)."""
        return self.band_limit * torch.sigmoid(shape[0])

    def basis(self, z: Tensor, shape: Tensor) -> Tensor:
        return _sinc((z.unsqueeze(-1) - self.centers(z.device)) * self.bandwidths(shape))

    def basis_slope(self, z: Tensor, shape: Tensor) -> Tensor:
        distance = z.unsqueeze(-1) - self.centers(z.device)  # not zero: away from every center
        return (torch.cos(distance * self.bandwidths(shape)) - self.basis(z, shape)) / distance

    def gradients(self, z: Tensor, grad: Tensor, basis: Tensor, amplitudes: Tensor, shape: Tensor) -> Tensor:
        omega = self.bandwidths(shape)
        cosine = torch.cos((z.unsqueeze(-1) - self.centers(z.device)) * omega)
        # dω/dρ = ω·(1 − ω/(2ω₀)), and ω·∂sinc(ω d)/∂ω = cos(ω d) − sinc(ω d).
        slope = (1 - omega / self.band_limit) * amplitudes
        return torch.stack([grad @ basis, slope * (grad @ (cosine - basis))])


class Residual(SincSeries):
    """Learned curvature on top of plain LoRA."""

    backbone, is_clipped = 1.0, True


class Sinc(SincSeries):
    """The paper's form."""

    backbone, is_clipped = 0.0, False

    def start(self, device: torch.device) -> Tensor:
        return _identity_amplitudes(self, device=device)


FORMS: dict[str, type[PhiForm]] = {"residual": Residual, "sinc": Sinc}


def _sinc(u: Tensor) -> Tensor:
    """sin(u) / u, differentiable; overwrites zeros of u. `torch.sinc` takes three times as long."""
    is_zero = u == 0
    u.masked_fill_(is_zero, 1.0)
    return (torch.sin(u) / u).masked_fill_(is_zero, 1.0)


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute a tensor once on the CPU, usable by autograd from any context; cache it per device."""

    @functools.cache
    def fetch(*arguments: object, device: torch.device) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return function(*arguments).to(device)

    return fetch


@constant
def _identity_amplitudes(form: SincSeries) -> Tensor:
    """Amplitudes (N,), float64, with which ψ(z) ≈ z with slope 1 at 0, exactly antisymmetric.

    Zero amplitudes would make B = 0 a saddle point without any gradient. Ridge least-squares fit at ω₀, weighted by a
    Gaussian of standard deviation I/4. Without the weight, the fit is dominated by the jump at ±I and ripples at the
    band edge: its slope at 0 is 1.55 for N = 50 and 0.53 for N = 9. With it, the slope is within 0.05 of 1 from N = 8
    on, and ψ within 0.01 of z on the inner half.
    """
    z = torch.linspace(-form.interval, form.interval, 40 * form.num_basis + 1, dtype=torch.float64)
    weight = torch.exp(-(z / (form.interval / 4)).square() / 2)
    basis = form.basis(z, torch.zeros(1, form.num_basis, dtype=torch.float64))
    gram = basis.T @ (weight.unsqueeze(-1) * basis)
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(form.num_basis, dtype=torch.float64)
    fitted = torch.linalg.solve(gram + ridge, basis.T @ (weight * z))
    return (fitted - fitted.flip(0)) / 2
