"""Lookup table of φ for one layer, read by the operators and kernels, and the gradient through it.

φ is a function of one variable: it is sampled once on a fine grid and every entry is interpolated, so the cost per
entry does not depend on N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .phi import TransferSpec
from .phi_forms import constant

DEGREE = 5
# Table cells per radian of the highest frequency of ψ. At this density φ and φ′ both err by less than 1e-6 for unit
# amplitudes at ω = 2·ω₀ and N = 50, where φ′ itself reaches 100 (tests/ops/test_transfer.py). Degree 5: for the same
# accuracy of φ′, cubics would need ten times the cells.
CELLS_PER_RADIAN = 20
# ψ has no frequency above its band limit, so it is not sampled at every cell: from samples 8 cells apart,
# interpolation of degree 11 gives the knots between them to 1e-12, at an eighth of the cost.
CELLS_PER_SAMPLE = 8
SAMPLES_PER_STENCIL = 12
# Cells per bin: gradients are summed per bin, and the bins stay in the cache.
CELLS_PER_BIN = 4
# Number of samples by which the outermost stencils extend beyond the cells.
MARGIN = SAMPLES_PER_STENCIL // 2 - 1
# Maximum number of cells: 8 MiB for a kernel to read, and as much for the sums of a thread.
MAX_CELLS = 2**19


class KernelError(RuntimeError):
    """A kernel failed, and plain PyTorch must do its work."""


def is_plain(tensor: Tensor) -> bool:
    """Whether kernels can read a tensor: strided, of a float dtype, and no subclass, which may store no elements."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and tensor.layout == torch.strided
    )


def num_chebyshev_points(radians: float) -> int:
    """Number of Chebyshev points on [−1, 1] that determine functions bandlimited to `radians` to 1e-12; odd.

    Chebyshev coefficients of a sine of that frequency are Bessel functions, which vanish beyond it within a few times
    its cube root.
    """
    return 2 * math.ceil((radians + 10 * radians ** (1 / 3) + 4) / 2) + 1


@constant
def _chebyshev_points(count: int) -> Tensor:
    """Chebyshev points (of the second kind) on [−1, 1], (count,), float64; the middle one is exactly 0."""
    points = torch.cos(torch.arange(count, dtype=torch.float64) * (math.pi / (count - 1)))
    return (points - points.flip(0)) / 2


@constant
def _chebyshev_to_samples(count: int, num_samples: int) -> Tensor:
    """Values at the Chebyshev points → equally spaced samples on [−1, 1], (num_samples, count), float64.

    Barycentric formula (Berrut & Trefethen 2004). The sample at 0 is a Chebyshev point, so ψ(0) stays exact.
    """
    points = _chebyshev_points(count, device=torch.device("cpu"))
    samples = torch.arange(1 - num_samples, num_samples, 2, dtype=torch.float64) / (num_samples - 1)
    weight = 1 - 2 * (torch.arange(count, dtype=torch.float64) % 2)
    weight[0] /= 2
    weight[-1] /= 2
    distance = samples.unsqueeze(1) - points
    matrix = weight / distance
    matrix /= matrix.sum(1, keepdim=True)
    is_hit = (distance == 0).any(1)
    matrix[is_hit] = (distance[is_hit] == 0).double()
    return matrix


@constant
def _chebyshev_coefficients(count: int) -> Tensor:
    """Values at the Chebyshev points → coefficients of T₀ … T₍count−1₎, (count, count), float64."""
    index = torch.arange(count, dtype=torch.float64)
    halves = torch.ones(count, dtype=torch.float64)
    halves[0] = halves[-1] = 0.5
    cosines = torch.cos(index.unsqueeze(1) * index * (math.pi / (count - 1)))
    return halves.unsqueeze(1) * cosines * halves * (2 / (count - 1))


@constant
def _samples_to_quintics() -> Tensor:
    """12 neighboring samples of ψ → coefficients of the quintics on the 8 middle cells, (8, 6, 12).

    A cell's quintic, in 0 ≤ t ≤ 1, passes through its knots −2 … 3, which lie on the samples' common polynomial.
    """
    reach = SAMPLES_PER_STENCIL // 2
    samples = torch.arange(1 - reach, reach + 1, dtype=torch.float64)
    knots = torch.arange(-2, DEGREE - 1, dtype=torch.float64)
    vandermonde = torch.stack([knots**power for power in range(DEGREE + 1)], dim=1)
    # The inverse has exact multiples of 1/5!; rounding to them keeps ψ(0) = 0 exact.
    to_coefficients = (torch.linalg.inv(vandermonde) * 120).round() / 120
    position = (torch.arange(CELLS_PER_SAMPLE).unsqueeze(1) + knots) / CELLS_PER_SAMPLE
    masks = ~torch.eye(SAMPLES_PER_STENCIL, dtype=torch.bool)
    lagrange = torch.stack(
        [
            (position.unsqueeze(-1) - samples[mask]).prod(-1) / (sample - samples[mask]).prod()
            for sample, mask in zip(samples, masks, strict=True)
        ],
        dim=-1,
    )
    return torch.einsum("pk,jks->jps", to_coefficients, lagrange)


@constant
def _samples_to_cubics(derivative: bool) -> Tensor:
    """12 samples of ψ → cubics with the knot values and slopes of the quintics or their derivative, (8, 4, 12).

    At this density, within h⁴/384 < 2e-8 of them, for unit amplitude at the band limit.
    """
    c = _samples_to_quintics(device=torch.device("cpu"))
    if derivative:
        c = F.pad(c[:, 1:] * torch.arange(1, DEGREE + 1).unsqueeze(1), (0, 0, 0, 1))
    return torch.stack([c[:, 0], c[:, 1], c[:, 2] - c[:, 4] - 2 * c[:, 5], c[:, 3] + 2 * c[:, 4] + 3 * c[:, 5]], dim=1)


@constant
def _samples_to_central_moments() -> Tensor:
    """12 samples of ψ → their polynomial on the middle bins, up to the third power of u, (bins, 4, 12)."""
    reach = SAMPLES_PER_STENCIL // 2
    width = CELLS_PER_BIN / CELLS_PER_SAMPLE
    middles = (torch.arange(CELLS_PER_SAMPLE // CELLS_PER_BIN, dtype=torch.float64) + 0.5) * width
    distance = torch.arange(1 - reach, reach + 1, dtype=torch.float64) - middles.unsqueeze(1)
    to_values = (distance / reach).unsqueeze(-1) ** torch.arange(SAMPLES_PER_STENCIL)
    return torch.linalg.inv(to_values)[:, :4] * ((width / reach) ** torch.arange(4)).unsqueeze(1)


class TransferTable:
    """Lookup table of φ for one layer: piecewise quintic on a uniform grid with a knot at 0.

    The series ψ is read from the table; the backbone β·z is computed. A clipped form needs ψ on [−I, I] only. Others,
    such as the paper's (`sinc`), have infinite tails: their table consists of as many panels of that width as the
    entries need. Entries beyond the largest table are computed by the formula.

    The table is linear in the values of ψ at the Chebyshev points of its panels, the only places where the formula is
    evaluated. The gradient is the interpolant's own: `slope` is the derivative of `value`, and `PhiGradient` sums its
    exact adjoint.

    Args:
        spec: the fixed part of φ.
        phi: learned parameters of φ, (P, N).
        dtype: dtype of the entries z (float32 or float64).
        largest: upper bound on |z|, if known; determines how far a form that is not clipped is tabulated.

    Attributes:
        reach: ψ is tabulated on [−reach, reach].
        is_complete: whether no entry up to `largest` needs the formula.
        cells_per_side, spacing: the grid; cell i covers z = (i − cells_per_side + t)·spacing for 0 ≤ t ≤ 1.
        phi: the learned parameters.
        points: Chebyshev points of all panels, (panels · num_points,), float64; each panel's points extend
            `points_reach` to either side of its middle.

    """

    def __init__(
        self,
        spec: TransferSpec,
        phi: Tensor,
        dtype: torch.dtype,
        largest: float = 0.0,
    ) -> None:
        self.spec, self.phi = spec, phi
        self._dtype = dtype
        reach = spec.interval
        samples_per_side = math.ceil(reach * spec.phi_form.band_limit * CELLS_PER_RADIAN / CELLS_PER_SAMPLE)
        sample_spacing = reach / samples_per_side
        samples_per_panel = 2 * (samples_per_side + MARGIN) + 1
        panels = 1
        if not spec.phi_form.is_clipped:
            # An odd number of panels makes 0 a Chebyshev point of the middle one, and ψ(0) exact.
            max_panels = MAX_CELLS // (samples_per_panel * CELLS_PER_SAMPLE)
            panels_needed = (2 * (largest / sample_spacing + MARGIN) + 1) / samples_per_panel
            panels += 2 * math.ceil(max(0, min((panels_needed - 1) / 2, (max_panels - 1) // 2)))
            samples_per_side = (panels * samples_per_panel - 1) // 2 - MARGIN
            reach = samples_per_side * sample_spacing
        self.cells_per_side = CELLS_PER_SAMPLE * samples_per_side
        self.spacing = sample_spacing / CELLS_PER_SAMPLE
        self.reach = reach
        self.is_complete = spec.phi_form.is_clipped or largest <= reach
        self.samples_per_panel = samples_per_panel
        self.points_reach = (samples_per_panel - 1) / 2 * sample_spacing
        self.num_points = num_chebyshev_points(self.points_reach * spec.phi_form.band_limit)
        with torch.no_grad():
            points = self.points_reach * self.constant(_chebyshev_points, self.num_points)
            middles = torch.arange(panels, dtype=points.dtype, device=points.device) - panels // 2
            self.points = (middles.unsqueeze(1) * (samples_per_panel * sample_spacing) + points).flatten()
            self.basis = spec.basis(self.points, phi)
            self.values = spec.sum(self.basis, phi)

    def constant(self, matrix: Callable[..., Tensor], *arguments: float) -> Tensor:
        return matrix(*arguments, device=self.phi.device)

    def to_samples(self) -> Tensor:
        return self.constant(_chebyshev_to_samples, self.num_points, self.samples_per_panel)

    def _interpolate(self, values: Tensor, matrix: Tensor) -> Tensor:
        """ψ at `points` → `matrix` (8, K, 12) applied to the samples around each cell, (cells, K)."""
        samples = (values.unflatten(0, (-1, self.num_points)) @ self.to_samples().T).flatten()
        stencils = samples.unfold(0, SAMPLES_PER_STENCIL, 1)
        return (stencils @ matrix.flatten(0, 1).T).view(-1, matrix.shape[1])

    def interpolate(self, values: Tensor) -> Tensor:
        """ψ at `points` → coefficients of every cell's quintic in t, (2·cells_per_side, 6), float64."""
        return self._interpolate(values, self.constant(_samples_to_quintics))

    @functools.cached_property
    def coefficients(self) -> Tensor:
        """(6, cells), in the dtype of the entries."""
        return self.interpolate(self.values).to(self._dtype).T.contiguous()

    def locate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Locate z: (cell index as int64, position t in [0, 1] inside the cell)."""
        # Measured from 0 instead of −I: small entries, the most frequent ones, keep their relative precision.
        u = (z * (1 / self.spacing)).clamp_(-self.cells_per_side, self.cells_per_side)
        # A NaN entry gets a valid cell and, through t, a NaN value.
        cell = u.floor().clamp_(max=self.cells_per_side - 1).nan_to_num_(0.0)
        return (cell + self.cells_per_side).long(), u - cell

    def value(self, z: Tensor) -> Tensor:
        """φ(z), with the shape and dtype of z."""
        cell, t = self.locate(z.flatten())
        psi = self._read(DEGREE, cell)
        for power in reversed(range(DEGREE)):
            psi = torch.addcmul(self._read(power, cell), psi, t)
        psi = psi.view_as(z)
        if not self.spec.phi_form.is_clipped:
            beyond = z.abs() > self.reach
            if beyond.any():
                psi[beyond] = self.spec.series(z[beyond], self.phi).to(z.dtype)
        return torch.add(psi, z, alpha=self.spec.phi_form.backbone)

    def slope(self, z: Tensor) -> Tensor:
        """φ′(z), with the shape and dtype of z; the inner derivative at z = ±I, where clipping starts."""
        cell, t = self.locate(z.flatten())
        psi = self._read(DEGREE, cell).mul_(DEGREE / self.spacing)
        for power in reversed(range(1, DEGREE)):
            psi = torch.add(psi.mul_(t), self._read(power, cell), alpha=power / self.spacing)
        psi = psi.view_as(z)
        beyond = z.abs() > self.reach
        if self.spec.phi_form.is_clipped:
            psi.masked_fill_(beyond, 0)
        elif beyond.any():
            psi[beyond] = self.spec.tail_slope(z[beyond], self.phi).to(z.dtype)
        return psi.add_(self.spec.phi_form.backbone)

    def cubics(self, derivative: bool) -> Tensor:
        """ψ or ψ′ as cubics for the kernels: coefficients in t, (cells, 4). Half the size of the quintics."""
        matrix = self.constant(_samples_to_cubics, derivative)
        return self._interpolate(self.values, matrix / self.spacing if derivative else matrix).to(self._dtype)

    def _read(self, power: int, cell: Tensor) -> Tensor:
        return self.coefficients[power].index_select(0, cell)


class PhiGradient:
    """Accumulates ∂L/∂φ over all entries of an update into the gradient of φ's parameters.

    Args:
        table: table of φ, whose exact adjoint is summed.

    """

    def __init__(self, table: TransferTable) -> None:
        self.table = table
        self._grad_values = torch.zeros_like(table.values)
        self._tail_gradient = torch.zeros_like(table.phi, dtype=torch.float64)

    def add(self, z: Tensor, grad: Tensor) -> None:
        """Add one block of entries z with ∂L/∂φ(z) = `grad`, of the same shape, to the gradient."""
        z, grad = z.flatten(), grad.flatten()
        if not self.table.spec.phi_form.is_clipped:
            beyond = z.abs() > self.table.reach
            if beyond.any():
                self._add_tails(z[beyond], grad[beyond])
                grad = grad.masked_fill(beyond, 0)
        cell, t = self.table.locate(z)
        moments = torch.zeros_like(self.table.coefficients)
        for power in range(DEGREE + 1):
            moments[power].scatter_add_(0, cell, grad)
            grad = grad * t
        self._add_adjoint(self.table.constant(_samples_to_quintics), moments.T.double().unsqueeze(0))

    def add_central_moments(self, moments: Tensor) -> None:
        """Add the moments Σ ∂L/∂φ · uᵖ, p < 4, of each bin to the gradient: (shares, bins, 4), float64.

        u, in [−1/2, 1/2], is the position in the bin. The gradient of φ in its parameters is smooth: over half a bin of
        1/5 radian, the fourth power is below 5e-6 of it, hardly more than float32 loses in the sums.
        """
        self._add_adjoint(self.table.constant(_samples_to_central_moments), moments)

    def add_chebyshev_moments(self, moments: Tensor) -> None:
        """Add the moments Σ ∂L/∂φ · T_p(clip(z) / points_reach), p < num_points, float64, to the gradient."""
        self._grad_values += moments @ self.table.constant(_chebyshev_coefficients, self.table.num_points)

    def parameter_gradient(self) -> Tensor:
        """∂L/∂phi (P, N) of all added blocks, in its dtype."""
        spec, phi = self.table.spec, self.table.phi
        gradient = spec.series_gradient(self.table.points, self._grad_values, self.table.basis, phi)
        return (gradient + self._tail_gradient).to(phi.dtype)

    def _add_tails(self, z: Tensor, grad: Tensor) -> None:
        spec, phi = self.table.spec, self.table.phi
        self._tail_gradient += spec.series_gradient(z, grad.double(), spec.basis(z, phi), phi)

    def _add_adjoint(self, matrix: Tensor, grad: Tensor) -> None:
        """Add the adjoint of `_interpolate` with this matrix to the gradient of ψ at `points`.

        `grad` may be split into shares, (shares, cells or bins, K), which are summed.
        """
        to_stencils = (grad.unflatten(1, (-1, len(matrix))).flatten(2) @ matrix.flatten(0, 1)).sum(0)
        count = len(to_stencils) + SAMPLES_PER_STENCIL - 1
        grad_samples = F.fold(to_stencils.T.unsqueeze(0), (1, count), (1, SAMPLES_PER_STENCIL)).flatten()
        panels = grad_samples.unflatten(0, (-1, self.table.samples_per_panel))
        self._grad_values += (panels @ self.table.to_samples()).flatten()
