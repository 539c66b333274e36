"""Losses of a live adapter on held-out batches.

`LiveLosses` decides what is measured, before the first step as at the cut: the loss of the training (the Trainer's, on
its evaluation batches, or a function), its units, and the loss of a guess.

In several processes, each measures its share of the batches, and all find the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice, starmap
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from ..checks import CannotCutError
from ..lora.host import without_wrapper
from ..sharding import process_index, processes
from .gain import choices_of, constant_losses, constant_losses_of_choices, losses_of
from .moments import IGNORED, Loss, is_multi_label, loss_terms, model_loss, with_sampled_labels
from .search import FEWEST_UNITS, PASSES, SPLITS, require_units, too_few

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments  # imports `datasets`, which an adapter does without

_GRADIENT_BATCHES = (8, 32)  # at least and at most; between, a tenth of those of the training
_EXAMPLES = (150, 600)  # held-out, at least and at most; between, a share of those trained on
_FEWEST_BATCHES = 12  # where an example is the unit
_BATCHES = 120  # held-out, where the loss is known by batch alone
_COST_SHARE = 1 / 20  # so that about six forward passes cost a tenth of the training, of a forward and a backward pass
_LOSS_TOLERANCE = {"rel_tol": 5e-3, "abs_tol": 1e-4}  # losses of the Trainer and of its model
_GRADIENT_TOLERANCE = (
    0.05  # largest difference of gradients that are the same, relative to the largest, also in bfloat16
)
_REPEAT_TOLERANCE = 1e-2  # relative difference of losses that are the same, on hardware that adds in any order
_CHECKED_BATCHES = 4  # batches on which they are compared before training; after it, on all


@dataclass(frozen=True)
class LiveLosses:
    """What is measured: batches, and their losses by the live model.

    Attributes:
        model: what computes the loss: all that is trained, as it is called, not the adapter's host alone.
        training: batches for the gradients; empty where they are known.
        held_out: batches for the losses.
        loss: mean loss of a batch, with a graph.
        objective: loss of a batch whose gradients give the moments, with a graph: the sum of its terms, so that all
            tokens count alike, or the Trainer's mean.
        units: sum of the loss terms of each unit of a batch, and their number, (units, 2).
        unit: of these, in words.
        max_units: number of units that is measured at most; None without a limit.
        sample_labels: returns a batch with labels sampled from the model, whose own loss is measured; None for other
            losses.
        whole_losses: `losses_by_batch` of the held-out batches with the adapter as it is; None where it was not
            measured.
        whole_training_losses: `losses` of the training batches, likewise.

    """

    model: nn.Module
    training: Sequence[Any]
    held_out: Sequence[Any]
    loss: Callable[[Any], Tensor]
    objective: Callable[[Any], Tensor]
    units: Callable[[Any], Tensor]
    unit: str = "held-out examples"
    max_units: int | None = None
    sample_labels: Callable[[Any], Any] | None = None
    whole_losses: Sequence[Tensor] | None = None
    whole_training_losses: Tensor | None = None

    @classmethod
    def of_batches(
        cls,
        model: nn.Module,
        held_out: Iterable[Any],
        loss: Loss,
        training: Iterable[Any] = (),
        *,
        unit: str = "held-out examples",
    ) -> LiveLosses:
        """Losses of a function, on batches of one's own; `model` is the one that the function gets.

        Raises:
            ValueError: the function returns other than it should, or there are fewer than three batches.

        """
        held_out = list(held_out)
        for batch in held_out[:1]:
            _require_terms(model, loss, batch)

        def mean(batch: Any) -> Tensor:
            sums, numbers = loss(model, batch)
            return sums.sum() / numbers.sum()

        def total(batch: Any) -> Tensor:
            return loss(model, batch)[0].sum()

        sample_labels = partial(with_sampled_labels, model) if loss is model_loss else None
        units = partial(_units, model, loss)
        losses = cls(model, list(training), held_out, mean, total, units, unit, sample_labels=sample_labels)
        whole_training_losses = losses.losses(losses.training) if losses.training else None
        return replace(
            losses, whole_losses=losses.losses_by_batch(held_out), whole_training_losses=whole_training_losses
        )

    @classmethod
    def of_trainer(
        cls,
        trainer: Trainer,
        on: str = "eval",
        *,
        with_gradients: bool = True,
        checked: int | None = None,
        step: int | None = None,
    ) -> LiveLosses:
        """The Trainer's loss on its data: of each example, if that is the model's own loss, else of each batch.

        A loss of the Trainer's own is compared with the model's on all held-out batches, which are in random order, or
        on the first `checked`. There are as many held-out examples as after `step`, by default the last one.

        Raises:
            ValueError: there are fewer than three batches.

        """
        wrapped: Any = trainer.model
        model = without_wrapper(wrapped)
        data: Any = trainer.train_dataset if on == "train" else trainer.eval_dataset
        kind = "training" if on == "train" else "held-out"
        with _on_every_process(trainer):
            training = _training_batches(trainer) if with_gradients else []

        def prepare(batch: Any) -> Any:
            return trainer._prepare_inputs(dict(batch))

        def loss(batch: Any) -> Tensor:
            inputs = prepare(batch)
            with trainer.compute_loss_context_manager():
                items = None if trainer.compute_loss_func is None else _items(trainer, inputs)
                result: Any = trainer.compute_loss(wrapped, inputs, num_items_in_batch=items)
            return result[0] if isinstance(result, tuple) else result

        def example_losses(batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                return _units(model, model_loss, prepare(batch))

        def batch_as_unit(batch: Any) -> Tensor:
            # Of sentence-transformers, with the name of a data set.
            size = len(
                next(column for column in batch.values() if hasattr(column, "__len__") and not isinstance(column, str))
            )
            with torch.no_grad():
                return torch.tensor([[loss(batch).item() * size, size]]).double()

        def sample_labels(batch: Any) -> Any:
            with trainer.compute_loss_context_manager():
                return with_sampled_labels(model, prepare(batch))

        if not _is_by_batch(trainer):
            size = held_out_examples(trainer, step)
            held_out, batch_size = _held_out(trainer, data, size, is_divided=True)
            examples = cls(
                wrapped, training, held_out, loss, loss, example_losses, f"{kind} examples", size, sample_labels
            )
            batches = replace(
                examples, units=batch_as_unit, unit=f"{kind} batches", max_units=_BATCHES, sample_labels=None
            )
            compared = held_out[: checked if _has_own_loss(trainer) else 1]
            whole_losses = examples._matching_losses(batches, compared)
            if whole_losses is not None:
                if len(whole_losses[0]) < batch_size:  # examples in one row, without padding
                    held_out, _ = _held_out(trainer, data, size, is_divided=True, batch_size=1)
                    return replace(examples, held_out=held_out)
                return replace(examples, whole_losses=whole_losses if len(whole_losses) == len(held_out) else None)
        held_out, _ = _held_out(trainer, data, _BATCHES * trainer.args.eval_batch_size, is_divided=False)
        return cls(wrapped, training, held_out, loss, loss, batch_as_unit, f"{kind} batches", _BATCHES)

    def __post_init__(self) -> None:
        if len(self.held_out) < SPLITS:
            batches = f"{len(self.held_out)} batches of {self.unit.split()[0]} data"
            raise CannotCutError(too_few(batches, by_batch=self.unit.endswith("batches")))

    def _matching_losses(self, reference: LiveLosses, batches: Sequence[Any]) -> list[Tensor] | None:
        """`losses_by_batch`, if the means are those of the Trainer's loss; None otherwise."""
        means = [sums / size for ((sums, size),) in (losses.tolist() for losses in reference.losses_by_batch(batches))]
        try:
            batch_losses = self.losses_by_batch(batches)
            sums = [losses.sum(0).tolist() for losses in batch_losses]
            pairs = [(total / number, mean) for (total, number), mean in zip(sums, means, strict=True) if number]
            counted = [(batch, mean) for batch, mean, (_, number) in zip(batches, means, sums, strict=True) if number]
            is_same = all(math.isclose(*pair, **_LOSS_TOLERANCE) for pair in pairs)
            return batch_losses if is_same and all(starmap(self._is_same_shifted, counted[:_CHECKED_BATCHES])) else None
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if should_reduce_batch_size(error):  # out of memory
                raise
            return None  # the Trainer's loss can be computed, and the model has none of its own on these batches

    @torch.no_grad()
    def _is_same_shifted(self, batch: Any, mean: float) -> bool:
        """Whether the Trainer's loss is also the model's for other logits; True if it is not computed from them.

        A new head answers nearly the same for all examples, whose weights would not be seen.
        """

        def shift_first_class(logits: Tensor) -> Tensor:
            shifts = torch.linspace(0, 4 + 2 * math.log(logits.shape[-1]), len(logits)).to(logits)
            shifted = logits.clone()
            shifted[..., 0] += shifts.view(-1, *[1] * (logits.dim() - 2))
            return shifted

        with _answering(self.model, shift_first_class) as seen:
            other_loss = self.loss(batch).item()
        if not seen or math.isclose(other_loss, mean, **_LOSS_TOLERANCE):  # as the model computes it
            # A sharded model would wait for the backward pass that a graph promises.
            return processes() > 1 or self._counts_alike(batch)
        sums, numbers = loss_terms(without_wrapper(self.model), seen[-1]["logits"].cpu(), batch["labels"].cpu())
        return math.isclose((sums.sum() / numbers.sum()).item(), other_loss, **_LOSS_TOLERANCE)

    @torch.enable_grad()
    def _counts_alike(self, batch: Any) -> bool:
        """Whether a loss that the model computes counts all examples alike, by its gradient; True without classes."""
        with _answering(self.model, lambda logits: logits) as seen:
            loss = self.loss(batch)
        if not seen or seen[-1]["logits"].dim() != 2:
            return True
        (gradient,) = torch.autograd.grad(loss, seen[-1]["logits"], allow_unused=True)
        logits = seen[-1]["logits"].detach().requires_grad_()
        sums, numbers = loss_terms(without_wrapper(self.model), logits, batch["labels"].to(logits.device))
        (expected,) = torch.autograd.grad(sums.sum() / numbers.sum(), logits)
        scale = expected.abs().max()
        return gradient is None or bool(((gradient - expected).abs() <= _GRADIENT_TOLERANCE * scale).all())

    def require_enough(self) -> None:
        """Raise ValueError if there are too few units to divide."""
        sizes = [len(losses) for losses in self.whole_losses or []]
        if self.unit.endswith("batches"):
            sizes = [1] * len(self.held_out)
        elif not sizes:
            sizes = [len(batch["labels"]) for batch in self.held_out]  # as `model_loss` needs
        require_units([sum(sizes[start::SPLITS]) for start in range(SPLITS)], self.unit)
        if self.whole_losses and not torch.cat([*self.whole_losses]).isfinite().all():
            raise CannotCutError(f"The loss on {sum(sizes)} {self.unit} is not finite. Check the data.")

    def losses_by_batch(self, batches: Sequence[Any]) -> list[Tensor]:
        """Losses of the units of each batch, (units, 2), the same on every process."""
        world, rank = processes(), process_index()
        # As many on each, since a sharded model needs all processes.
        local_losses = [
            self.units(batches[index % len(batches)]) for index in range(rank, -(-len(batches) // world) * world, world)
        ]
        if world == 1:
            return local_losses
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, local_losses)
        return [gathered[index % world][index // world] for index in range(len(batches))]

    def losses(self, batches: Sequence[Any]) -> Tensor:
        """Losses of the units of batches, (units, 2), the same on every process."""
        return torch.cat(self.losses_by_batch(batches))

    @cached_property
    def training_losses(self) -> Tensor:
        """Losses of the units of the training batches, (units, 2), with the adapter as it is at the first call."""
        return self.losses(self.training) if self.whole_training_losses is None else self.whole_training_losses

    def guess(self) -> Callable[[Sequence[Any]], Tensor | None]:
        """Function that returns the losses (units,) of the best constant answer, summed; None where there is none.

        The answer is that of the batches for the gradients, or of the held-out ones where there are none: the shares
        of their labels, or the mean. Without an adapter, the answers of a new head may be worse.
        """
        reference_batches = self.training or self.held_out
        if is_multi_label(self.model):  # has many shares to estimate
            reference_batches = [*self.training, *self.held_out]
        reference_labels = self._labels(reference_batches)
        if reference_labels is None:
            return lambda batches: None
        if (choices := choices_of(reference_batches[0])) is not None:
            return lambda batches: constant_losses_of_choices(batches, choices)
        if self.sample_labels is not None:
            classes = self._classes(reference_batches[0])

            def guess_labels(batches: Sequence[Any]) -> Tensor | None:
                labels = self._labels(batches)
                if labels is None:
                    return None
                return constant_losses(labels, reference_labels, classes, are_several=is_multi_label(self.model))

            return guess_labels
        has_targets = reference_labels.is_floating_point() and reference_labels.dim() > 1
        answer = None if has_targets else self._best_logits(reference_batches)
        if answer is None:  # the logits are numbers, one for each target, or none of the loss
            numbers = reference_labels.double()
            candidates = [numbers.mean(0), numbers.median(0).values]
            if bool(((numbers >= 0) & (numbers <= 1)).all()):
                candidates.append(numbers.mean(0).clamp(1e-6, 1 - 1e-6).logit())
            answer = min(
                candidates, key=lambda candidate: self._constant_losses(reference_batches, candidate).sum().item()
            )
        return partial(self._constant_losses, answer=answer)

    def _classes(self, batch: Any) -> int:
        """Number of logits of an example, or of a token."""
        with _answering(self.model, lambda logits: logits) as seen:
            self.units(batch)
        return seen[-1]["logits"].shape[-1] if seen else 1

    def _constant_losses(self, batches: Sequence[Any], answer: Tensor) -> Tensor:
        """Losses (units,) with these logits in place of the model's, summed."""
        with _answering(self.model, lambda logits: answer.to(logits).expand_as(logits).clone()):
            return self.losses(batches)[:, 0]

    def _labels(self, batches: Sequence[Any]) -> Tensor | None:
        """Labels of the examples: (examples,), or (examples, tokens) of token classification; None for others.

        Numbers may be of several targets or labels, (examples, targets).
        """
        labels = [batch.get("labels") if isinstance(batch, Mapping) else None for batch in batches]
        tensors = [tensor.cpu() for tensor in labels if isinstance(tensor, Tensor)]
        if not tensors or len(tensors) < len(labels):
            return None
        if getattr(without_wrapper(self.model), "loss_type", None) == "ForTokenClassification":
            width = max(tensor.shape[1] for tensor in tensors)
            padded = [nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=IGNORED) for tensor in tensors]
            return torch.cat(padded)
        if all(tensor.numel() == len(tensor) for tensor in tensors):
            return torch.cat([tensor.flatten() for tensor in tensors])
        shapes = {tensor.shape[1:] for tensor in tensors}
        are_targets = len(shapes) == 1 and all(tensor.is_floating_point() and tensor.dim() == 2 for tensor in tensors)
        return torch.cat(tensors) if are_targets else None

    def _best_logits(self, batches: Sequence[Any]) -> Tensor | None:
        """Constant logits (classes,) of the least loss; None without classes, or if the loss does not depend on them.

        One label is added to each class. The model runs once: its outputs are replayed with other logits.
        """
        outputs = []
        for batch in batches:
            with torch.no_grad(), _answering(self.model, lambda logits: logits) as seen:
                self.loss(batch)
            for output in seen:
                if output.get("past_key_values") is not None:
                    output["past_key_values"] = None  # larger than all else of the outputs
            outputs.append(seen)
        widths = {output["logits"].shape[-1] for seen in outputs for output in seen}
        if len(widths) != 1 or widths == {1}:
            return None
        logits = torch.zeros(widths.pop(), requires_grad=True)
        sizes = torch.tensor([len(batch["labels"]) for batch in batches])

        def loss() -> Tensor:
            with _answering(self.model, lambda each: logits.to(each).expand_as(each).clone()):
                terms = []
                for batch, seen in zip(batches, outputs, strict=True):
                    with _replaying(self.model, seen):
                        terms.append(self.loss(batch).cpu().float())
            return (torch.stack(terms) * sizes / sizes.sum()).sum()

        with torch.enable_grad():
            if not (start := loss()).requires_grad:
                return None
            optimizer = torch.optim.LBFGS([logits], max_iter=50, line_search_fn="strong_wolfe")

            def step() -> Tensor:
                optimizer.zero_grad()
                scaled = loss() / start.detach().abs().clamp(min=torch.finfo(start.dtype).tiny)
                scaled.backward()
                return scaled

            optimizer.step(step)
        counts = sizes.sum() * logits.detach().double().nan_to_num().softmax(0) + 1
        return (counts / counts.sum()).log()


def _require_terms(model: nn.Module, loss: Loss, batch: Any) -> None:
    """Raise ValueError unless a loss returns terms by example, and the same ones each time."""
    with at_rest(model, None), torch.no_grad(), torch.random.fork_rng():
        try:
            first, second = (loss(model, batch) for _ in range(2))
        except (KeyError, TypeError) as error:
            if loss is not model_loss:
                raise
            raise ValueError(f"The model does not return the loss of a held-out batch ({error}). Pass loss.") from error
    if not (isinstance(first, tuple) and [getattr(tensor, "ndim", None) for tensor in first] == [1, 1]):
        kind = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            "loss must return two tensors of shape (examples,), the sum of the loss terms of each example and their "
            f"number, but returned {kind}."
        )
    if not torch.allclose(first[0], second[0], rtol=_REPEAT_TOLERANCE, equal_nan=True):
        raise ValueError(
            "loss must return the same each time, but two calls on a batch differ. Store random values, such as noise "
            "and timesteps, in the batches."
        )


@torch.no_grad()
def _units(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    return losses_of(model, [batch], loss)


@contextlib.contextmanager
def _answering(model: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[list[Any]]:
    """Replace the logits in a model's outputs by a function of them; yields the list of the new outputs."""
    seen: list[Any] = []

    def replace_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            return output
        output = copy.copy(output)
        output["logits"] = answer(logits)
        seen.append(output)
        return output

    handle = model.register_forward_hook(replace_logits)
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def _replaying(model: nn.Module, outputs: Sequence[Any]) -> Iterator[None]:
    """Return stored outputs in place of running a model."""
    own, stored = vars(model).get("forward"), iter(outputs)
    model.forward = lambda *arguments, **options: next(stored)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextlib.contextmanager
def _on_every_process(trainer: Trainer) -> Iterator[None]:
    """Data loaders that give every process all batches, on the CPU."""
    accelerator: Any = trainer.accelerator
    accelerator.prepare = lambda loader, **options: loader
    try:
        with _changed(trainer.args, dataloader_persistent_workers=False):
            yield
    finally:
        del accelerator.prepare


@contextlib.contextmanager
def _changed(arguments: Any, **values: Any) -> Iterator[None]:
    """Other values of those arguments that this version of transformers has."""
    original = {name: getattr(arguments, name) for name in values if hasattr(arguments, name)}
    vars(arguments).update({name: values[name] for name in original})
    try:
        yield
    finally:
        vars(arguments).update(original)


def is_trainer_of(library: str, value: Any) -> bool:
    """Whether a value is a Trainer of a library, or of another that builds on it; without importing the library."""
    return any(
        kind.__module__.split(".")[0] == library and kind.__name__.endswith("Trainer") for kind in type(value).__mro__
    )


def _is_by_batch(trainer: Trainer) -> bool:
    """Whether the loss is surely not the model's own on single examples, whatever the model."""
    # The batches of sentence-transformers are not the model's.
    return is_trainer_of("sentence_transformers", trainer) or getattr(trainer, "label_smoother", None) is not None


def _has_own_loss(trainer: Trainer) -> bool:
    """Whether the Trainer's loss may be another than the model's."""
    from transformers import Trainer

    return type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None


def _items(trainer: Trainer, inputs: Mapping[str, Any]) -> Tensor | None:
    """Number of labels of a batch that count, as the Trainer passes it to `compute_loss_func`."""
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor):
        return None
    if "shift_labels" not in inputs and getattr(trainer, "_loss_shifts_labels", False):
        labels = labels[..., 1:]
    return labels.ne(IGNORED).sum()


def _number_of_examples(data: Any) -> int:
    return sum(map(len, data.values())) if isinstance(data, Mapping) else len(data)


def sample(data: Any, size: int) -> Any:
    """At most `size` examples of a data set, or of several by their sizes, in a random order that is always the same.

    A data set without a length stays as it is.
    """
    if isinstance(data, Mapping):
        share = min(1.0, size / _number_of_examples(data))
        return type(data)({name: sample(dataset, math.ceil(share * len(dataset))) for name, dataset in data.items()})  # type: ignore[call-arg]
    if not hasattr(data, "__len__"):
        return data
    size = min(size, len(data))
    if hasattr(data, "shuffle"):
        return data.shuffle(seed=0).select(range(size))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.Subset(data, order[:size].tolist())


def _training_batches(trainer: Trainer) -> list[Any]:
    minimum, maximum = _GRADIENT_BATCHES
    number = trainer.state.global_step * trainer.args.gradient_accumulation_steps // 10
    number = min(maximum, max(minimum, number - number % minimum))
    data: Any = trainer.train_dataset
    if not hasattr(data, "__len__"):
        return list(islice(trainer.get_train_dataloader(), number))
    return list(islice(trainer.get_eval_dataloader(sample(data, number * trainer.args.eval_batch_size)), number))


def held_out_examples(trainer: Trainer, step: int | None = None) -> int:
    """Number of held-out examples after a step, by default after those done.

    Their losses cost at most a tenth of the training, or they are as few as suffice.
    """
    step = trainer.state.global_step if step is None else step
    examples_per_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * processes()
    minimum, maximum = _EXAMPLES
    return min(maximum, max(minimum, int(_COST_SHARE * step * examples_per_step)))


def forward_passes(trainer: Any, step: int) -> int:
    """Number of forward passes of a batch that a search for the smallest size takes after a step, about."""
    data, is_by_batch = trainer.eval_dataset, _is_by_batch(trainer)
    examples = _BATCHES * trainer.args.eval_batch_size if is_by_batch else held_out_examples(trainer, step)
    if hasattr(data, "__len__"):
        examples = min(examples, _number_of_examples(data))
    divided = min(_largest_batch(trainer.args), max(1, examples // _FEWEST_BATCHES))
    batch_size = trainer.args.per_device_eval_batch_size if is_by_batch else divided
    return (PASSES + 2) * math.ceil(examples / (batch_size * processes()))


def _largest_batch(arguments: TrainingArguments) -> int:
    """Examples of the largest held-out batch of a process.

    Not of one example: there, weights of examples would cancel, and the loss look like the model's own.
    """
    return max(arguments.per_device_eval_batch_size, arguments.per_device_train_batch_size)


def _held_out(
    trainer: Trainer, data: Any, size: int, *, is_divided: bool, batch_size: int | None = None
) -> tuple[list[Any], int]:
    """Batches of a sample of this size, and their size: small enough to be divided into splits, or the Trainer's."""
    arguments = trainer.args
    available = min(size, _number_of_examples(data)) if hasattr(data, "__len__") else size
    used_size = arguments.per_device_eval_batch_size
    if is_divided:
        used_size = batch_size or min(_largest_batch(arguments), max(1, available // _FEWEST_BATCHES))
    # By length, each split would have other lengths. transformers 5.0 and 5.1 have `group_by_length` instead.
    random_order = {"train_sampling_strategy": "random", "group_by_length": False}
    with _changed(arguments, per_device_eval_batch_size=used_size, **random_order), _on_every_process(trainer):
        loader = trainer.get_eval_dataloader(sample(data, size))
        return list(islice(loader, -(-size // used_size))), used_size


def require_measurable(trainer: Trainer) -> None:
    """Raise ValueError for a Trainer whose loss does not tell what its adapter gains; the check before training."""
    require_data(trainer)
    with at_rest(cast(nn.Module, trainer.model), trainer):
        LiveLosses.of_trainer(trainer, with_gradients=False, checked=_CHECKED_BATCHES).require_enough()


def learns_from_rewards(trainer: Trainer) -> bool:
    """Whether a Trainer's loss is that of answers which the model writes while it trains."""
    return any(hasattr(trainer, name) for name in ("reward_funcs", "reward_model", "value_model"))


def require_data(trainer: Trainer, on: str | None = None) -> None:
    """Raise ValueError for data of a Trainer that a gain cannot be measured on.

    `on` is that of `shrink`; None where there is no such choice, for a cut by the callback.
    """
    if learns_from_rewards(trainer):
        raise ValueError(
            f"The loss of {type(trainer).__name__} on stored data does not tell what the adapter gained. Save it, and "
            "cut it by data: lrlora export ADAPTER --keep 0.99 --data FILE --output SMALL"
        )
    if on not in (None, "eval", "train"):
        raise ValueError(f"on must be eval or train, got {on!r}.")
    if on == "train":
        return
    or_training = "" if on is None else ", or on='train' for the data that was trained on"
    data: Any = trainer.eval_dataset
    if data is None:
        raise ValueError(
            f"The gain is measured on held-out data, but the Trainer has no eval_dataset. Pass one{or_training}."
        )
    if isinstance(data, dict) and not is_trainer_of("sentence_transformers", trainer):  # which mixes them
        raise ValueError(
            f"The gain is measured on one evaluation set, but the Trainer has a dict of them ({', '.join(data)}). "
            "Pass one of them, or datasets.concatenate_datasets of all."
        )
    training_data: Any = trainer.train_dataset
    fingerprint = getattr(data, "_fingerprint", None)  # of `datasets`, also where a Trainer has tokenized both
    if data is training_data or (
        fingerprint is not None and fingerprint == getattr(training_data, "_fingerprint", None)
    ):
        raise ValueError(
            "The gain is measured on held-out data, but eval_dataset is the train_dataset. Pass other "
            f"examples{or_training}."
        )
    if not hasattr(data, "__len__"):
        return
    units, unit = _number_of_examples(data), "examples"
    if by_batch := _is_by_batch(trainer):
        units, unit = -(-units // trainer.args.eval_batch_size), "batches"
    if units < SPLITS * FEWEST_UNITS:
        raise ValueError(
            too_few(f"{units} held-out {unit} (of the Trainer's eval_dataset, as it prepared it)", by_batch=by_batch)
        )


_COUNTED = ("_metrics", "_stored_metrics", "accum_loss_components")  # by TRL and sentence-transformers, for their logs


@contextlib.contextmanager
def at_rest(model: nn.Module, trainer: Any) -> Iterator[None]:
    """Evaluation mode of all that is trained; modes, random states and what a Trainer counts for its log are restored.

    So are buffers that a forward pass replaces, such as the frequencies of a dynamic rotary embedding, with the numbers
    beside them. The random states inside are always the same, for batches and losses that draw.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (
            module,
            dict(module._buffers),
            {name: value for name, value in vars(module).items() if type(value) in (int, float)},
        )
        for module in model.modules()
        if module._buffers
    ]
    counted = {name: copy.deepcopy(getattr(trainer, name)) for name in _COUNTED if hasattr(trainer, name)}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for module, mode in modes:
            module.training = mode
        for module, known, numbers in buffers:
            module._buffers.update(known)
            vars(module).update(numbers)
        for name, value in counted.items():
            setattr(trainer, name, value)
