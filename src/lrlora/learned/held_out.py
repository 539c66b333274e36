"""Losses of a live adapter on held-out batches, and the smallest LoRA that keeps a share of its gain there.

The loss is that of the training: the Trainer's, on its evaluation batches, or a function. Candidates are written into
the live factors, so that losses that switch the adapter off, such as DPO's, see them as they see the adapter.

In several processes, each measures its share of the batches, and all find the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapters import Factors
from ..progress_bar import progress_bar
from ..sharding import full_value, process_index, processes, write
from ..shrunk import Shrunk
from .directions import LossCurve
from .gain import at_most, constant_losses, losses_of
from .live_lora import lora_layers, put, weights_of
from .moments import IGNORED, Loss, model_loss, with_sampled_labels
from .search import FEWEST_UNITS, PARTS, PASSES, Part, describe, find_smallest, too_few

if TYPE_CHECKING:
    from transformers import Trainer  # imports `datasets`, which an adapter does without

_GRADIENT_BATCHES = (8, 32)  # at least and at most; between, a tenth of those of the training
_EXAMPLES = (150, 600)  # held-out, at least and at most; between, a share of those trained on
_DIVIDED = 12  # least number of batches, where an example is the unit
_BATCHES = 120  # held-out, where the loss is known by batch alone
_SHARE = 1 / 20  # so that about six forward passes cost a tenth of the training, of a forward and a backward pass
_SAME = {"rel_tol": 2e-3, "abs_tol": 1e-4}  # losses of the Trainer and of its model
_REPEATED = 1e-2  # relative difference of losses that are the same, on hardware that adds in any order
_CHECKED = 4  # batches on which they are compared


@dataclass(frozen=True)
class LiveLosses:
    """Batches, and their losses by the live model.

    Attributes:
        training: batches for the gradients; empty where they are known.
        held_out: batches for the losses.
        loss: mean loss of a batch, with a graph.
        units: sum of the loss terms of each unit of a batch, and their number, (units, 2).
        unit: of these, in words.
        most: number of units that is measured at most; None without a limit.
        sampled: returns a batch with labels sampled from the model; None without labels.

    """

    training: Sequence[Any]
    held_out: Sequence[Any]
    loss: Callable[[Any], Tensor]
    units: Callable[[Any], Tensor]
    unit: str = "held-out examples"
    most: int | None = None
    sampled: Callable[[Any], Any] | None = None

    @classmethod
    def of_batches(
        cls, model: nn.Module, held_out: Iterable[Any], loss: Loss, training: Iterable[Any] = ()
    ) -> LiveLosses:
        """Losses of a function, on batches of one's own; `model` is the one that the function gets."""
        held_out = list(held_out)
        for batch in held_out[:1]:
            require_terms(model, loss, batch)

        def mean(batch: Any) -> Tensor:
            sums, numbers = loss(model, batch)
            return sums.sum() / numbers.sum()

        sampled = partial(with_sampled_labels, model) if loss is model_loss else None
        return cls(list(training), held_out, mean, partial(_units, model, loss), sampled=sampled)

    @classmethod
    def of_trainer(cls, trainer: Trainer, model: Any, on: str = "eval", *, with_gradients: bool = True) -> LiveLosses:
        """The Trainer's loss on its data: of each example, if that is the model's own loss, else of each batch."""
        data: Any = trainer.train_dataset if on == "train" else trainer.eval_dataset
        kind = "training" if on == "train" else "held-out"
        with _on_every_process(trainer):
            training = _training_batches(trainer) if with_gradients else []

        def prepared(batch: Any) -> Any:
            return trainer._prepare_inputs(dict(batch))

        def loss(batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                result: Any = trainer.compute_loss(cast(Any, trainer.model), prepared(batch))
            return result[0] if isinstance(result, tuple) else result

        def by_example(batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                return _units(model, model_loss, prepared(batch))

        def by_batch(batch: Any) -> Tensor:
            # Of sentence-transformers, with the name of a data set.
            size = len(next(part for part in batch.values() if hasattr(part, "__len__") and not isinstance(part, str)))
            with torch.no_grad():
                return torch.tensor([[loss(batch).item() * size, size]]).double()

        def sampled(batch: Any) -> Any:
            with trainer.compute_loss_context_manager():
                return with_sampled_labels(model, prepared(batch))

        def is_sum_of_examples(batch: Any) -> bool:
            sums, numbers = by_example(batch).sum(0).tolist()
            with torch.no_grad():
                return not numbers or math.isclose(sums / numbers, loss(batch).item(), **_SAME)

        if not _is_by_batch(trainer):
            size = held_out_examples(trainer)
            held_out, of_batch = _held_out(trainer, data, size, is_divided=True)
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
                if all(map(is_sum_of_examples, held_out[:_CHECKED])):
                    if len(by_example(held_out[0])) < of_batch:  # examples in one row, without padding
                        held_out, _ = _held_out(trainer, data, size, is_divided=True, of_batch=1)
                    return cls(training, held_out, loss, by_example, f"{kind} examples", size, sampled)
        held_out, _ = _held_out(trainer, data, _BATCHES * trainer.args.eval_batch_size, is_divided=False)
        return cls(training, held_out, loss, by_batch, f"{kind} batches", _BATCHES)

    def __post_init__(self) -> None:
        if len(self.held_out) < PARTS:
            batches = f"{len(self.held_out)} batches of {self.unit.split()[0]} data"
            raise ValueError(too_few(batches, by_batch=self.unit.endswith("batches")))

    def losses(self, batches: Sequence[Any]) -> Tensor:
        """Losses of the units of batches, (units, 2), the same on every process."""
        world, rank = processes(), process_index()
        # As many on each, since a sharded model needs all processes.
        own = [self.units(batches[at % len(batches)]) for at in range(rank, -(-len(batches) // world) * world, world)]
        if world == 1:
            return torch.cat(own)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, own)
        return torch.cat([everyone[at % world][at // world] for at in range(len(batches))])


def require_terms(model: nn.Module, loss: Loss, batch: Any) -> None:
    """Raise ValueError unless a loss returns terms by example, and the same ones each time."""
    with at_rest(model, None), torch.no_grad(), torch.random.fork_rng():
        try:
            found, again = (loss(model, batch) for _ in range(2))
        except (KeyError, TypeError) as error:
            if loss is not model_loss:
                raise
            raise ValueError(f"The model does not return the loss of a held-out batch ({error}). Pass loss.") from error
    if not (isinstance(found, tuple) and [getattr(part, "ndim", None) for part in found] == [1, 1]):
        kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            "loss must return two tensors of shape (examples,), the sum of the loss terms of each example and their "
            f"number, but returned {kind}."
        )
    if not torch.allclose(found[0], again[0], rtol=_REPEATED, equal_nan=True):
        raise ValueError(
            "loss must return the same each time, but two calls on a batch differ. Store random values, such as noise "
            "and timesteps, in the batches."
        )


@torch.no_grad()
def _units(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    return losses_of(model, [batch], loss)


@contextlib.contextmanager
def _on_every_process(trainer: Trainer) -> Iterator[None]:
    """Data loaders that give every process all batches, on the CPU."""
    arguments, accelerator = trainer.args, trainer.accelerator
    persistent, arguments.dataloader_persistent_workers = arguments.dataloader_persistent_workers, False
    setattr(accelerator, "prepare", lambda loader, **options: loader)  # noqa: B010 (of this one alone)
    try:
        yield
    finally:
        del accelerator.prepare
        arguments.dataloader_persistent_workers = persistent


def _is_by_batch(trainer: Trainer) -> bool:
    """Whether the loss is surely not the model's own on single examples."""
    is_embedding = hasattr(trainer, "evaluator")  # of sentence-transformers, as its batches are not the model's
    return is_embedding or getattr(trainer, "label_smoother", None) is not None


def _number_of_examples(data: Any) -> int:
    return sum(map(len, data.values())) if isinstance(data, Mapping) else len(data)


def sample(data: Any, size: int) -> Any:
    """Random examples of a data set, or of several by their sizes, the same every time; all of one without a length."""
    if isinstance(data, Mapping):
        share = min(1.0, size / _number_of_examples(data))
        return type(data)({name: sample(part, math.ceil(share * len(part))) for name, part in data.items()})  # type: ignore[call-arg]
    if not hasattr(data, "__len__") or len(data) <= size:
        return data
    if hasattr(data, "shuffle"):
        return data.shuffle(seed=0).select(range(size))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.Subset(data, order[:size].tolist())


def _training_batches(trainer: Trainer) -> list[Any]:
    fewest, most = _GRADIENT_BATCHES
    number = trainer.state.global_step * trainer.args.gradient_accumulation_steps // 10
    number = min(most, max(fewest, number - number % fewest))
    data: Any = trainer.train_dataset
    if not hasattr(data, "__len__"):
        return list(islice(trainer.get_train_dataloader(), number))
    return list(islice(trainer.get_eval_dataloader(sample(data, number * trainer.args.eval_batch_size)), number))


def held_out_examples(trainer: Trainer) -> int:
    """Number of held-out examples: so that their losses cost at most a tenth of the training, or as few as suffice."""
    of_batch = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * processes()
    fewest, most = _EXAMPLES
    return min(most, max(fewest, int(_SHARE * trainer.state.global_step * of_batch)))


def _held_out(
    trainer: Trainer, data: Any, size: int, *, is_divided: bool, of_batch: int | None = None
) -> tuple[list[Any], int]:
    """Batches of a sample of this size, and their size: small enough to be divided into parts, or the Trainer's."""
    arguments = trainer.args
    known = arguments.per_device_eval_batch_size
    there = min(size, _number_of_examples(data)) if hasattr(data, "__len__") else size
    if is_divided:
        arguments.per_device_eval_batch_size = of_batch or max(1, min(known, there // _DIVIDED))
    try:
        with _on_every_process(trainer):
            loader = trainer.get_eval_dataloader(sample(data, size))
            used = arguments.per_device_eval_batch_size
            return list(islice(loader, -(-size // used))), used
    finally:
        arguments.per_device_eval_batch_size = known


def require_measurable(trainer: Trainer, on: str) -> None:
    """Raise ValueError for a Trainer whose loss does not tell what its adapter gained."""
    if any(hasattr(trainer, name) for name in ("reward_funcs", "reward_model", "value_model")):
        raise ValueError(
            f"The loss of {type(trainer).__name__} on stored data does not tell what the adapter gained. Save it, and "
            "cut it by data: lrlora export ADAPTER --keep 0.99 --data FILE --output SMALL"
        )
    if on not in ("eval", "train"):
        raise ValueError(f"on must be eval or train, got {on!r}.")
    if on == "train":
        return
    data: Any = trainer.eval_dataset
    if data is None:
        raise ValueError(
            "shrink measures the gain on held-out data, but the Trainer has no eval_dataset. Pass one, or on='train' "
            "for the data that was trained on."
        )
    if isinstance(data, dict) and not hasattr(trainer, "evaluator"):  # sentence-transformers mixes them
        raise ValueError(
            f"shrink measures the gain on one evaluation set, but the Trainer has a dict of them ({', '.join(data)}). "
            "Pass one of them, or datasets.concatenate_datasets of all."
        )
    other: Any = trainer.train_dataset
    mark = getattr(data, "_fingerprint", None)  # of `datasets`, also where a Trainer has tokenized both
    if data is other or (mark is not None and mark == getattr(other, "_fingerprint", None)):
        raise ValueError(
            "shrink measures the gain on held-out data, but eval_dataset is the train_dataset. Pass other examples, or "
            "on='train' for the data that was trained on."
        )
    if not hasattr(data, "__len__"):
        return
    units, unit = _number_of_examples(data), "examples"
    if by_batch := _is_by_batch(trainer):
        units, unit = -(-units // trainer.args.eval_batch_size), "batches"
    if units < PARTS * FEWEST_UNITS:
        raise ValueError(too_few(f"{units} held-out {unit}", by_batch=by_batch))


@contextlib.contextmanager
def at_rest(model: nn.Module, trainer: Any) -> Iterator[None]:
    """Evaluation mode of a model and all around it; what TRL counts for its log stays as it is."""
    modes = [(module, module.training) for module in model.modules()]
    counted = copy.deepcopy(getattr(trainer, "_metrics", None))
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if counted is not None:
            trainer._metrics = counted


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


def find_in_place(
    model: Any,
    adapter: str,
    source: LiveLosses,
    curve: LossCurve,
    *,
    keep: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
) -> tuple[list[Factors], Shrunk]:
    """Factors of the smallest size that keeps a share of the gain, or of a budget; the model stays as it is.

    Raises:
        ValueError: see `find_smallest`.

    """
    batches = [*(source.held_out[at::PARTS] for at in range(PARTS)), source.training]
    bar = progress_bar(total=PASSES * len(source.held_out), desc="Shrinking", unit="batch", disable=process_index() > 0)
    nothing = [of.factors(0) for of in curve.modules]
    # Other losses than the model's own are not those of a guess.
    known = None if source.sampled is None else _answers(source.training or source.held_out)

    def measure(batches: Sequence[Any], factors: Sequence[Factors]) -> Tensor:
        put(model, adapter, factors)
        bar.total = max(bar.total, bar.n + len(batches))
        bar.update(len(batches))
        return source.losses(batches)

    def without(batches: Sequence[Any]) -> Tensor:
        losses, given = measure(batches, nothing), _answers(batches)
        return losses if known is None or given is None else at_most(losses, constant_losses([given], [known]))

    whole = [source.losses(part) for part in batches if part]
    parts = [Part(of, partial(without, part), partial(measure, part)) for of, part in zip(whole, batches, strict=False)]
    held_out, training = parts[:PARTS], parts[PARTS:]
    with bar, restored(model, adapter):
        if keep is not None:
            factors, found = find_smallest(held_out, curve, keep, unit=source.unit, max_rank=max_rank)
            if source.most is not None and (found.needed or 0) > source.most:
                found = replace(found, needed=None)
        else:
            factors = curve.within(curve.parameters if budget is None else budget, max_rank)
            found = describe(held_out, curve, factors, source.unit)
        if training and training[0].gain.low > 0 and not source.unit.startswith("training"):
            found = replace(found, training=training[0].kept(factors).share)
        bar.total = bar.n  # the number of passes was an estimate
    return factors, found


def _answers(batches: Sequence[Any]) -> Tensor | None:
    """Labels of single examples; None for tokens or pairs, or if some are missing."""
    labels = [batch["labels"].cpu() if isinstance(batch, Mapping) and "labels" in batch else None for batch in batches]
    known = [part for part in labels if part is not None and part.dim() == 1]
    if not known or len(known) < len(labels) or any(bool((part == IGNORED).any()) for part in known):
        return None
    return torch.cat(known)
