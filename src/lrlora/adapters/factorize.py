"""ΔW ≈ BA: the best plain LoRA for a learned update, at the rank each module uses.

By the Eckart–Young theorem the leading k singular triples of ΔW are its best approximation of rank k, and keep (σ₁² + …
+ σ_k²) / ‖ΔW‖²_F of its energy. The k of every module is chosen by:

    energy     the smallest k that keeps a share of the module's energy
    budget     the singular values of all modules compete: the best σ² / (m + n) are taken, one rank of an m × n module
               costing m + n parameters, while the sum fits. This keeps the most energy per parameter; if all modules
               have one shape, it is a common threshold on σ.
    max_rank   an upper bound, alone or combined with one of them

These keep the largest directions; see `lrlora.ranks` for the directions that matter to the loss.

Products of thin factors (LoRA, expansion) use a QR of both factors and a small SVD, and are never materialized. Other
small matrices use a full SVD, large ones a randomized SVD (Halko, Martinsson & Tropp 2011) that grows until it
suffices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from ..checks import check_truncation
from ..lora.factors import PLAIN, Factors, Layout, Stack, best_per_parameter
from ..naming import module_type
from ..progress_bar import progress_bar
from .layers import updates_of_model
from .update import Update, Updates

# A randomized SVD costs a few products with ΔW; from a quarter of the full rank on, a full SVD is no slower.
_FULL_SVD_SIZE = 256
_FULL_SVD_SHARE = 4
_OVERSAMPLING = 16
_POWER_ITERATIONS = 2
_FIRST_RANK = 32


class _Svd:
    """Leading singular triples of one update, extended on demand.

    Attributes:
        sigma: descending, float64, without values at rounding level.
        is_complete: whether these are all.

    """

    def __init__(self, update: Update) -> None:
        self.update = update
        factors = update.factors()
        if factors is not None:
            U, sigma, V = svd_of_product(*factors)
            self._store(U.float(), sigma, V.float(), is_complete=True)
            self.energy = sigma.square().sum().item()
        else:
            delta = update.matrix()
            self.energy = delta.double().square().sum().item()
            self._compute(delta.float(), _FIRST_RANK)
        self.stable_rank = self.energy / self.sigma[0].item() ** 2 if len(self.sigma) else 0.0

    def reach(self, rank: int) -> None:
        """Compute more triples, up to `rank` or all."""
        self._compute(self.update.matrix().float(), rank)

    def _compute(self, delta: Tensor, rank: int) -> None:
        full_rank = min(delta.shape)
        if full_rank <= _FULL_SVD_SIZE or rank >= full_rank // _FULL_SVD_SHARE:
            U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
            self._store(U, sigma, Vh.T, is_complete=True)
        else:
            with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
                # Not by `torch.manual_seed`, which would also seed the devices that are not restored.
                generators = torch.cuda.default_generators
                generator = generators[delta.get_device()] if delta.is_cuda else torch.default_generator
                generator.manual_seed(0)
                U, sigma, V = torch.svd_lowrank(delta, rank + _OVERSAMPLING, _POWER_ITERATIONS)
            self._store(U[:, :rank], sigma[:rank], V[:, :rank], is_complete=False)

    def _store(self, U: Tensor, sigma: Tensor, V: Tensor, *, is_complete: bool) -> None:
        is_significant = sigma > min(self.update.shape) ** 0.5 * torch.finfo(torch.float32).eps * sigma[0]
        self.is_complete = is_complete or not bool(is_significant.all())
        self._U, self._V, self.sigma = (
            tensor.cpu() for tensor in (U[:, is_significant], V[:, is_significant], sigma[is_significant].double())
        )

    @property
    def cost(self) -> int:
        """Parameters of a rank."""
        return sum(self.update.shape)

    @property
    def limit(self) -> int:
        """Largest rank."""
        return min(self.update.shape)

    def kept_shares(self) -> Tensor:
        """Share of the energy that the leading 1, 2, … triples keep."""
        energies = self.sigma.square()
        # Float32 SVD rounding, about 1e-7 of the energy, must not count as singular values of that size.
        return energies.cumsum(0) / (energies.sum() if self.is_complete else self.energy)

    def factors(self, rank: int) -> Factors:
        # √σ on both sides keeps the factors within the range of half precision.
        root = self.sigma[:rank].sqrt().float()
        return Factors(
            module=self.update.module,
            A=(self._V[:, :rank] * root).T.contiguous(),
            B=(self._U[:, :rank] * root).contiguous(),
            r=self.update.r,
            scaling=self.update.scaling,
            layout=self.update.layout,
            energy=self.energy,
            stable_rank=self.stable_rank,
            kept=min(1.0, self.kept_shares()[rank - 1].item()) if rank else 0.0,
        )


class _ExpertsSvd:
    """Singular triples of all experts of a parameter, which have one rank in files.

    Attributes:
        sigma: root of the sum of the experts' squares, descending, (largest rank of an expert,); one zero without an
            update, since a parameter that is left out would change the place of others in a file.

    """

    def __init__(self, stack: Stack, updates: Iterable[Update]) -> None:
        self._stack = stack
        self._svds = [_Svd(update) for update in updates]
        sigma = nn.utils.rnn.pad_sequence([svd.sigma for svd in self._svds]).norm(dim=1)
        self.sigma = sigma if len(sigma) else sigma.new_zeros(1)
        self.energy = sum(svd.energy for svd in self._svds)

    @property
    def cost(self) -> int:
        return sum(svd.cost for svd in self._svds)

    @property
    def limit(self) -> int:
        return len(self.sigma)

    def kept_shares(self) -> Tensor:
        energies = self.sigma.square()
        return energies.cumsum(0) / energies.sum() if self.energy else torch.ones_like(energies)

    def factors(self, rank: int) -> Factors:
        own = [svd.factors(min(rank, len(svd.sigma))) for svd in self._svds]
        pairs = [replace(pair, layout=PLAIN).padded(rank) for pair in own]
        largest = max(svd.sigma[0].item() if len(svd.sigma) else 0.0 for svd in self._svds)
        return replace(
            pairs[0],
            module=self._stack.parameter,
            layout=Layout(stack=self._stack),
            A=torch.cat([pair.A for pair in pairs]),
            B=torch.stack([pair.B for pair in pairs], 2).flatten(1),
            energy=self.energy,
            stable_rank=self.energy / largest**2 if largest else 0.0,
            kept=min(1.0, self.kept_shares()[rank - 1].item()),
        )


_AnySvd = _Svd | _ExpertsSvd


def svd_of_product(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of U V without forming it: QR of both factors, then the SVD of a small matrix.

    Args:
        U: (m, k).
        V: (k, n).

    Returns:
        Left singular vectors (m, l), singular values (l,), descending, and right singular vectors (n, l), float64; l is
        the smallest of m, k and n.

    """
    left, right = torch.linalg.qr(U.detach().double()), torch.linalg.qr(V.detach().double().T)
    P, sigma, Qh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ P, sigma, right.Q @ Qh.T


def kept_energy(factors: Sequence[Factors]) -> float:
    """Share of the total energy of all updates that the factors keep."""
    energy = sum(pair.energy for pair in factors)
    return sum(pair.kept * pair.energy for pair in factors) / energy if energy else 1.0


def parameters_of_rank(source: nn.Module | Updates, rank: int) -> int:
    """Parameters of plain LoRA of this rank on an adapter's modules, as a comparison budget."""
    return rank * sum(sum(update.shape) for update in _exportable_updates(source, None))


@torch.no_grad()
def factorize(
    source: nn.Module | Updates,
    *,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    adapter: str | None = None,
    progressbar: bool = False,
) -> list[Factors]:
    """Factorize the update of every module that an adapter changes, in model order.

    Args:
        source: an unmerged PEFT model, or the result of `lrlora.adapters.read_updates`.
        energy: share of each module's ‖ΔW‖²_F to keep, in (0, 1].
        budget: total number of parameters.
        max_rank: maximum rank of a module.
        adapter: adapter name; default: the active one.
        progressbar: show a progress bar.

    Raises:
        ValueError: none of energy, budget and max_rank, or both energy and budget are given; a value is out of range;
            all updates are zero; a module is neither linear nor a convolution; or an update is not finite.

    """
    check_truncation(energy=energy, budget=budget, max_rank=max_rank)
    updates = progress_bar(_exportable_updates(source, adapter), desc="Decomposing updates", disable=not progressbar)
    smallest = int(isinstance(source, Updates) and source.have_magnitudes)  # trained also where BA is 0
    if budget is None:
        # One at a time: of all but the leading triples, the memory is free before the next.
        factors = [_with_energy(svd, energy or 1.0, max_rank or svd.limit) for svd in _decompose(updates)]
    else:
        factors = _within_budget(list(_decompose(updates)), budget, max_rank, smallest)
    factors = [pair.padded(smallest) for pair in factors]
    if not any(pair.energy for pair in factors):
        raise ValueError("All updates are zero: the adapter has not been trained, so there is nothing to export.")
    return factors


def _exportable_updates(source: nn.Module | Updates, adapter: str | None) -> list[Update]:
    """Updates of modules that LoRA can adapt."""
    if isinstance(source, Updates):
        return source.updates
    updates = list(updates_of_model(source, adapter))
    other_types = {module_type(update.module) for update in updates if update.layout._replace(stack=None) != PLAIN}
    if types := sorted(other_types):
        raise ValueError(
            f"Only linear layers can be exported as LoRA, but this adapter also adapts {', '.join(types)}. Merge it "
            "into its base model instead."
        )
    return updates


def rank_for(shares: Tensor, share: float) -> int:
    """Smallest number of leading directions that hold a share, from the shares that each number holds, ascending."""
    # Tolerance: shares that end exactly there must not need another direction due to rounding.
    return int((shares < share - 1e-12).sum().item()) + 1


def _decompose(updates: Iterable[Update]) -> Iterator[_AnySvd]:
    """Decompose updates one by one; of experts in one parameter together."""
    for stack, group in groupby(updates, lambda update: update.layout.stack or update.module):
        members = list(group)
        yield _ExpertsSvd(stack, members) if isinstance(stack, Stack) else _Svd(*members)


def _with_energy(svd: _AnySvd, energy: float, limit: int) -> Factors:
    while (
        (rank := rank_for(svd.kept_shares(), energy)) > len(svd.sigma) and isinstance(svd, _Svd) and not svd.is_complete
    ):
        if len(svd.sigma) >= limit:
            break
        svd.reach(min(2 * len(svd.sigma), limit))
    return svd.factors(min(rank, limit, len(svd.sigma)))


def _within_budget(svds: list[_AnySvd], budget: int, max_rank: int | None, smallest: int) -> list[Factors]:
    limit = max_rank or max(svd.limit for svd in svds)
    kept = [svd for svd in svds if smallest or isinstance(svd, _ExpertsSvd)]
    if budget < (least := sum(svd.cost for svd in kept)):
        kind = "module, which has a magnitude" if smallest else "parameter of experts"
        raise ValueError(f"{budget:,} parameters are below the minimum of {least:,}, one rank of each {kind}.")
    budget -= sum(svd.cost for svd in kept if not len(svd.sigma))  # of zeros
    while True:
        energies = [svd.sigma[:limit].square() for svd in svds]
        for svd, values in zip(svds, energies, strict=True):
            if svd in kept:
                values[:1] = torch.inf
        ranks = best_per_parameter(energies, [svd.cost for svd in svds], budget)
        allocation = list(zip(svds, ranks, strict=True))
        # A module whose known singular values were all taken may have more to offer.
        exhausted = [
            svd
            for svd, rank in allocation
            if isinstance(svd, _Svd) and rank == len(svd.sigma) < limit and not svd.is_complete
        ]
        if not exhausted:
            return [svd.factors(rank) for svd, rank in allocation]
        for svd in exhausted:
            svd.reach(min(2 * len(svd.sigma), limit))
