"""Shrink a trained LoRA to the smallest size that keeps a share of its gain, in the units of its own loss.

The loss is that of the training: the Trainer's, on its evaluation batches, or a function. Candidates are written into
the live factors, so that losses that switch the adapter off, such as DPO's, see them as they see the adapter.

The held-out batches are divided into three parts: one finds the size, one confirms it, and the third gives the
interval, since the part that chose a size is biased in its favor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from ..adapters import Factors
from ..checks import DEFAULT_KEEP, check_truncation
from .directions import LossCurve, directions, smallest
from .gain import Gain, Kept, losses_of, mean_of
from .learned_ranks import unwrapped
from .live_lora import lora_factors, lora_layers, lora_weights, make_small, peft_model, put, require_plain_lora
from .moments import Loss, Moments, channel_dim, model_loss, watch
from .sharded import processes

if TYPE_CHECKING:
    from transformers import Trainer  # imports `datasets`, which an adapter does without

FEWEST_UNITS = 30  # of each part
WHOLE_FOLDER = "whole"  # in the Trainer's output folder
_PARTS = 3
_GRADIENT_BATCHES = (8, 32)  # at least and at most; between, a tenth of those of the training
_EXAMPLES, _BATCHES = 600, 120  # held-out, the larger of both
_SAME = {"rel_tol": 0.01, "abs_tol": 1e-4}  # losses of the Trainer and of its model


@dataclass(frozen=True)
class Shrunk:
    """A LoRA of the smallest size found.

    Attributes:
        kept: share of the gain that it keeps, on the part of the held-out data that did not choose it.
        gain: loss without the adapter minus loss with the whole one, on that part.
        ranks: module → rank.
        parameters, whole: number of parameters, now and before.
        equal_rank: smallest rank that keeps the share if all modules have it; that of the whole adapter at most.
        parameters_per_rank: of one rank in all modules.
        units: number of units of the statistics, in all parts.
        unit: "held-out examples", "held-out batches", "training examples" or "training batches".

    """

    kept: Kept
    gain: float
    ranks: dict[str, int]
    parameters: int
    whole: int
    equal_rank: int
    parameters_per_rank: int
    units: int
    unit: str

    def __str__(self) -> str:
        size = self.parameters / self.parameters_per_rank
        return (
            f"The adapter keeps {self.kept} of its gain of {self.gain:.4g} in {self.parameters:,} of {self.whole:,} "
            f"parameters, as many as LoRA r = {size:.2g}; its largest rank is {max(self.ranks.values())}, and equal "
            f"ranks would need r = {self.equal_rank}. {self.units} {self.unit} chose this size: report on others."
        )


@dataclass(frozen=True)
class _Source:
    """Batches of one's own, and their loss.

    Attributes:
        batches: for the gradients.
        held_out: for the losses.
        loss: mean loss of a batch, with a graph.
        losses: sum of the loss terms of each unit of batches, and their number, (units, 2).
        unit: what `losses` are of, in words.

    """

    batches: Sequence[Any]
    held_out: Sequence[Any]
    loss: Callable[[Any], Tensor]
    losses: Callable[[Sequence[Any]], Tensor]
    unit: str = "held-out examples"

    @classmethod
    def of_batches(cls, model: PeftModel, batches: Iterable[Any], held_out: Iterable[Any], loss: Loss) -> _Source:
        def mean(batch: Any) -> Tensor:
            sums, numbers = loss(model, batch)
            return sums.sum() / numbers.sum()

        return cls(list(batches), list(held_out), mean, lambda part: losses_of(model, part, loss))

    @classmethod
    def of_trainer(cls, trainer: Trainer, model: PeftModel, on: str) -> _Source:
        data = "training" if on == "train" else "held-out"
        whole: Any = trainer.model  # which may be around the PEFT model
        steps = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        fewest, most = _GRADIENT_BATCHES
        training = list(islice(trainer.get_train_dataloader(), min(most, max(fewest, steps // 10))))
        held_out = _held_out(trainer, on)

        def loss(batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                result: Any = trainer.compute_loss(whole, trainer._prepare_inputs(dict(batch)))
            return result[0] if isinstance(result, tuple) else result

        def examples(part: Sequence[Any]) -> Tensor:
            with trainer.compute_loss_context_manager():
                return losses_of(model, map(trainer._prepare_inputs, map(dict, part)), model_loss)

        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError), torch.no_grad():
            if math.isclose(mean_of(examples(held_out[:1])), loss(held_out[0]).item(), **_SAME):
                return cls(training, held_out, loss, examples, f"{data} examples")

        def by_batch(part: Sequence[Any]) -> Tensor:
            sizes = [len(next(value for value in batch.values() if hasattr(value, "__len__"))) for batch in part]
            with torch.no_grad():
                means = [loss(batch).item() for batch in part]
            return torch.tensor([[mean * size, size] for mean, size in zip(means, sizes, strict=True)]).double()

        return cls(training, held_out, loss, by_batch, f"{data} batches")


def _held_out(trainer: Trainer, on: str) -> list[Any]:
    """Batches of a sample of the evaluation data, or of training data."""
    most = max(_EXAMPLES, _BATCHES * trainer.args.eval_batch_size)
    if on == "train":
        return list(islice(trainer.get_train_dataloader(), -(-most // trainer.args.train_batch_size)))
    data: Any = trainer.eval_dataset
    if len(data) > most and hasattr(data, "shuffle"):
        data = data.shuffle(seed=0).select(range(most))
    return list(islice(trainer.get_eval_dataloader(data), -(-most // trainer.args.eval_batch_size)))


def shrink(
    model: Any,
    batches: Iterable[Any] = (),
    held_out: Iterable[Any] = (),
    *,
    keep: float = DEFAULT_KEEP,
    loss: Loss = model_loss,
    max_rank: int | None = None,
    on: str = "eval",
) -> Shrunk:
    """Shrink a LoRA after training, to the smallest size found that keeps a share of its gain.

        trainer.train()
        print(lrlora.shrink(trainer, keep=0.99))
        trainer.save_model("small")

    The adapter becomes smaller, not better, and stays a plain LoRA. The whole one is saved beside it, in the folder
    `whole` (then `whole-2`, …) of the Trainer's output folder. A LoRA that is trained at this size may gain more or
    less. It takes as long as about 15 evaluations of 200 examples.

    Args:
        model: Trainer after training, of transformers, TRL or sentence-transformers; or a PEFT model, with `batches`.
        batches: training batches, on the model's device, for the gradients.
        held_out: batches that were not trained on, for the losses.
        keep: share of the gain, in (0, 1).
        loss: of batches: returns the sum of the loss terms of each example, and their number, both (examples,).
        max_rank: largest rank of any module.
        on: "eval" for the Trainer's evaluation data, or "train" for its training data, which it may have learned by
            heart.

    Raises:
        ValueError: there are too few held-out examples, or no gain; or the adapter cannot be cut.

    """
    check_truncation(keep=keep)
    is_trainer = hasattr(model, "compute_loss")
    live = peft_model(model.model if is_trainer else model)
    adapter = require_plain_lora(live)
    if is_trainer:
        require_measurable(model, on)
    if processes() > 1:
        raise ValueError("shrink runs in one process. Save the adapter, and load it in a script of its own.")
    with _at_rest(live):
        source = (
            _Source.of_trainer(model, live, on) if is_trainer else _Source.of_batches(live, batches, held_out, loss)
        )
        curve = _curve(live, adapter, source)
        stored = [weight.detach().clone() for weight in _weights(live, adapter)]
        try:
            factors, found = _search(live, adapter, source, curve, keep, max_rank)
        finally:
            _restore(live, adapter, stored)
    if is_trainer:
        live.save_pretrained(str(_free(Path(str(model.args.output_dir)))), selected_adapters=[adapter])
    put(live, adapter, factors)
    optimizer = getattr(model, "optimizer", None)
    make_small(live, adapter, found.ranks, None if optimizer is None else unwrapped(optimizer)[-1])
    return found


def _free(output: Path) -> Path:
    """Folder for the whole adapter that does not exist yet: whole, whole-2, …"""
    names = chain([WHOLE_FOLDER], (f"{WHOLE_FOLDER}-{number}" for number in count(2)))
    return next(output / name for name in names if not (output / name).exists())


def require_measurable(trainer: Trainer, on: str) -> None:
    """Raise ValueError for a Trainer whose loss does not tell what its adapter gained."""
    if hasattr(trainer, "reward_funcs"):
        raise ValueError(
            f"The loss of {type(trainer).__name__} on stored data does not tell what the adapter gained. Save it, and "
            "cut it by data: lrlora export ADAPTER --keep 0.99 --data FILE --output SMALL"
        )
    if on not in ("eval", "train"):
        raise ValueError(f"on must be eval or train, got {on!r}.")
    if on == "eval" and trainer.eval_dataset is None:
        raise ValueError(
            "shrink measures the gain on held-out data, but the Trainer has no eval_dataset. Pass one, or on='train' "
            "for the data that was trained on."
        )
    if on == "eval" and isinstance(trainer.eval_dataset, dict):
        raise ValueError("shrink measures the gain on one evaluation set, but the Trainer has several. Pass one.")
    if on == "eval" and (examples := len(trainer.eval_dataset)) < _PARTS * FEWEST_UNITS:  # type: ignore[arg-type]
        raise ValueError(_too_few(f"{examples} held-out examples"))


def _too_few(units: str) -> str:
    return (
        f"{units} are too few to tell which share of the gain a smaller adapter keeps. Pass at least "
        f"{_PARTS * FEWEST_UNITS} examples, in at least {_PARTS} batches; {_PARTS * FEWEST_UNITS} batches where the "
        "loss is known by batch alone."
    )


@contextlib.contextmanager
def _at_rest(model: PeftModel) -> Iterator[None]:
    """Evaluation mode, and afterwards no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.zero_grad()


def _weights(model: PeftModel, adapter: str) -> list[torch.nn.Parameter]:
    return [weight for layer in lora_layers(model, adapter).values() for weight in lora_weights(layer, adapter)]


@torch.no_grad()
def _restore(model: PeftModel, adapter: str, stored: Sequence[Tensor]) -> None:
    for weight, value in zip(_weights(model, adapter), stored, strict=True):
        weight.copy_(value)


def _curve(model: PeftModel, adapter: str, source: _Source) -> LossCurve:
    """Curve of the live adapter, from the gradients of its batches."""
    whole, layers = lora_factors(model, adapter), lora_layers(model, adapter)
    device = lora_weights(next(iter(layers.values())), adapter)[0].device
    moments = {part.module: Moments.zeros(part, device) for part in whole if part.energy}

    def collect(path: str, down: torch.nn.Module, inputs: Any, z: Tensor) -> None:
        if z.requires_grad:
            watch(z, moments[path], channel_dim(down))

    hooks = [layers[path].lora_A[adapter].register_forward_hook(partial(collect, path)) for path in moments]
    try:
        for batch in source.batches:
            source.loss(batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
    known = {path: of.to("cpu") for path, of in moments.items()}
    return LossCurve([directions(part, known.get(part.module), 1) for part in whole])


def _search(
    model: PeftModel, adapter: str, source: _Source, curve: LossCurve, keep: float, max_rank: int | None
) -> tuple[list[Factors], Shrunk]:
    if (batches := len(source.held_out)) < _PARTS:
        raise ValueError(_too_few(f"{batches} batches of held-out data"))
    parts = [source.held_out[at::_PARTS] for at in range(_PARTS)]
    whole = [source.losses(part) for part in parts]
    units = sum(map(len, whole))
    if min(map(len, whole)) < FEWEST_UNITS:
        raise ValueError(_too_few(f"{units} {source.unit}"))

    bar = tqdm(desc="Shrinking", unit="measurement")

    def losses(factors: Sequence[Factors], at: int) -> Tensor:
        put(model, adapter, factors)
        bar.update()
        return source.losses(parts[at])

    nothing = [of.factors(0) for of in curve.modules]
    gains = [Gain(losses(nothing, at), whole[at]) for at in range(_PARTS)]
    if min(gain.low for gain in gains) <= 0:
        raise ValueError(
            f"The adapter gains too little for {units} {source.unit} to tell which share of it a smaller one keeps: "
            f"{', '.join(f'{gain.nats:.3g}' for gain in gains)} in three parts of them. Pass more."
        )

    def kept(factors: Sequence[Factors], at: int) -> Kept:
        return gains[at].kept(losses(factors, at))

    factors, _ = smallest(
        curve, lambda each: kept(each, 0), keep, max_rank=max_rank, confirm=lambda each: kept(each, 1).share
    )
    equal_rank, equal = _smallest_equal(curve, lambda each: kept(each, 0).low >= keep and kept(each, 1).share >= keep)
    if max_rank is None or equal_rank <= max_rank:
        factors = min(factors, equal, key=lambda each: sum(part.parameters for part in each))
    interval = kept(factors, 2)
    bar.close()
    return factors, Shrunk(
        kept=interval,
        gain=gains[2].nats,
        ranks={part.module: part.rank for part in factors},
        parameters=sum(part.parameters for part in factors),
        whole=curve.parameters,
        equal_rank=equal_rank,
        parameters_per_rank=sum(part.parameters_per_rank for part in factors),
        unit=source.unit,
        units=units,
    )


def _smallest_equal(curve: LossCurve, keeps: Callable[[Sequence[Factors]], bool]) -> tuple[int, list[Factors]]:
    """Smallest rank of all modules that keeps the share, and its factors; the largest if none does."""
    largest = max(len(of.rises) for of in curve.modules)
    low, high = 0, largest  # `high` keeps it
    while high - low > 1:
        rank = (low + high) // 2
        if keeps([of.factors(rank) for of in curve.modules]):
            high = rank
        else:
            low = rank
    return high, [of.factors(high) for of in curve.modules]
