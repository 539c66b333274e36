"""A cut of a live LoRA: its directions by the loss of batches, and candidates that are measured in place.

It needs a live LoRA, batches and a loss, whoever brings them: a Trainer, a loop of one's own, or a saved adapter.
Candidates are written into the live factors, so that losses that switch the adapter off, such as DPO's, see them as
they see the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import CannotCutError
from ..lora.factors import Factors
from ..lora.host import WITHOUT_KERNELS
from ..lora.live import lora_factors, lora_layers, put, weights_of
from ..progress_bar import progress_bar
from ..sharding import full_value, of_first, process_index, processes, write
from ..shrunk import Shrunk
from .directions import LossCurve, directions, energy_curve
from .gain import lower_losses, mean_of
from .held_out import LiveLosses
from .moments import Moments, watch_layer
from .search import LEARNED, PASSES, SPLITS, Split, describe, find_smallest


def loss_curve(model: Any, adapter: str, losses: LiveLosses, whole: Sequence[Factors] | None = None) -> LossCurve:
    """Directions of a live LoRA, from the gradients of the training batches of all processes; call it on every process.

    Args:
        model: host of the LoRA.
        adapter: its name.
        losses: training batches, and their loss.
        whole: factors of the LoRA; default: `lora_factors`.

    Raises:
        CannotCutError: the update is zero; a module did not run; or the loss is not finite.

    """
    layers = lora_layers(model, adapter)
    whole = lora_factors(model, adapter) if whole is None else whole
    device = weights_of(layers, adapter)[0].device
    moments = {pair.module: Moments.zeros(pair, device) for pair in whole if pair.energy and pair.rank}
    if not moments:
        raise CannotCutError("The adapter gains nothing: all of its updates are zero. Train it first.")
    batches, world = list(losses.training), processes()
    if losses.sample_labels is not None and mean_of(losses.training_losses) < LEARNED:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            batches = [losses.sample_labels(batch) for batch in batches]
    batches = batches[: len(batches) - len(batches) % world] or batches * world
    trained = [parameter for parameter in losses.model.parameters() if parameter.requires_grad]
    losses.model.requires_grad_(False)  # the moments need gradients of z alone
    watchers = [watch_layer(layers[path], adapter, moments[path]) for path in moments]
    has_loss = is_detached = False
    try:
        for batch in progress_bar(batches[process_index() :: world], desc="Gradients of the loss", leave=False):
            loss = losses.objective(batch)
            is_detached |= not loss.requires_grad
            if loss.isfinite() and loss.requires_grad:
                loss.backward()
                has_loss = True
    finally:
        for watcher in watchers:
            watcher.remove()
        for parameter in trained:
            parameter.requires_grad = True
    if not has_loss and is_detached:
        raise CannotCutError(
            "The loss has no graph, so it gives no gradients. Return it from the model's outputs, without detach(), "
            "item() or torch.no_grad()."
        )
    if not has_loss:
        raise CannotCutError(f"The loss on {len(batches)} training batches is not finite. Check the data.")
    if world > 1:
        for module_moments in moments.values():
            dist.all_reduce(module_moments.sums)
    if idle := [path for path, module_moments in moments.items() if not module_moments.calls]:
        raise CannotCutError(
            f"No token reached {idle[0]} ({len(idle)} of {len(moments)} modules), so its effect on the loss is "
            "unknown. Provide more training data, or cut by energy (lrlora export --energy); or a fused kernel "
            f"bypasses PEFT's forward. {WITHOUT_KERNELS}"
        )
    cpu_moments = {path: module_moments.to("cpu") for path, module_moments in moments.items()}
    # Others may round otherwise.
    return of_first(LossCurve([directions(pair, cpu_moments.get(pair.module), 1) for pair in whole]))


@contextlib.contextmanager
def restored(model: Any, adapter: str, *, after_errors_alone: bool = False) -> Iterator[None]:
    """Restore the factors at the end."""
    weights = weights_of(lora_layers(model, adapter), adapter)
    stored = [full_value(weight).clone() for weight in weights]
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if not (is_done and after_errors_alone):
            for weight, value in zip(weights, stored, strict=True):
                write(weight, value)


class LiveCut:
    """Cuts of a live LoRA, measured in place on held-out batches; the model stays as it is.

    Args:
        model: host of the LoRA.
        adapter: its name.
        losses: held-out batches, their losses with the LoRA as it is, and training batches.
        curve: directions of the LoRA.
        is_exact: whether all directions are the adapter that has these losses, not an approximation of it.

    Attributes:
        splits: of the held-out batches, see `find_smallest`.
        training: the training batches as a split; None without any.

    """

    def __init__(
        self, model: Any, adapter: str, losses: LiveLosses, curve: LossCurve, *, is_exact: bool = True
    ) -> None:
        self.model, self.adapter, self.losses, self.curve = model, adapter, losses, curve
        self._all_ranks = [len(module.rises) for module in curve.modules] if is_exact else []
        self._guess = losses.guess()
        self._bar: Any = None
        self._no_factors = [module.factors(0) for module in curve.modules]
        whole_losses = losses.whole_losses or losses.losses_by_batch(losses.held_out)
        self.splits = [
            self._split(torch.cat([*whole_losses[start::SPLITS]]), losses.held_out[start::SPLITS])
            for start in range(SPLITS)
        ]
        self.training = self._split(losses.training_losses, losses.training) if losses.training else None

    def _split(self, whole: Tensor, batches: Sequence[Any]) -> Split:
        without, measure = partial(self._losses_without, batches), partial(self._losses_with, batches)
        return Split(whole, without, measure, self._all_ranks)

    def _losses_with(self, batches: Sequence[Any], factors: Sequence[Factors]) -> Tensor:
        """Losses with these factors in place of the adapter."""
        with self._measuring() if self._bar is None else contextlib.nullcontext():
            put(self.model, self.adapter, factors)
            self._bar.update(len(batches))
            return self.losses.losses(batches)

    def _losses_without(self, batches: Sequence[Any]) -> Tensor:
        """Losses without the adapter, or of the best constant answer."""
        losses, guessed = self._losses_with(batches, self._no_factors), self._guess(batches)
        return losses if guessed is None else lower_losses(losses, guessed)

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        description = f"Shrinking (about {PASSES * len(self.losses.held_out):,} batches)"
        bar = progress_bar(desc=description, unit="batch", disable=process_index() > 0)
        with bar as self._bar, restored(self.model, self.adapter):
            try:
                yield
            finally:
                self._bar = None

    def smallest(self, keep: float, max_rank: int | None = None) -> tuple[list[Factors], Shrunk]:
        """Factors of the smallest size that keeps a share of the gain, and their record; see `find_smallest`."""
        with self._measuring():
            unit, max_units = self.losses.unit, self.losses.max_units
            factors, record = find_smallest(self.splits, self.curve, keep, unit=unit, max_rank=max_rank)
            if max_units is not None and (record.needed or 0) > max_units:
                record = replace(record, needed=None)
            return factors, self._add_training(factors, record)

    def within(self, budget: int | None = None, max_rank: int | None = None) -> tuple[list[Factors], Shrunk]:
        """Factors within a budget, None for all parameters, by loss or by energy, and their record.

        The ones that lose less on held-out batches are taken: where nearly everything is cut, the quadratic model of
        the loss is far outside its range.
        """
        budget = self.curve.parameters if budget is None else budget
        by_energy = energy_curve([module.whole for module in self.curve.modules])
        with self._measuring():
            candidates = [curve.within(budget, max_rank) for curve in (self.curve, by_energy)]
            factors = min(candidates, key=lambda factors: mean_of(self.splits[0].measure(factors)))
            return factors, self._add_training(factors, describe(self.splits, self.curve, factors, self.losses.unit))

    def _add_training(self, factors: Sequence[Factors], record: Shrunk) -> Shrunk:
        if self.training is None or self.losses.unit.startswith("training") or not self.training.gain.low > 0:
            return record
        return replace(record, training=self.training.kept(factors).share)
