"""Find the learning rate of a Trainer by short trainings at several rates.

A probe is a training of its own, in fewer steps: the Trainer's first batches, its optimizer, and its schedule at the
probe's length. Short probes are best at about twice the rate of the whole training, since what a high rate breaks has
not broken yet: the rate is half of theirs (lab/studies/finder.md).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .learned.held_out import at_rest, learns_from_rewards
from .progress_bar import progress_bar
from .sharding import process_index, processes

if TYPE_CHECKING:
    from transformers import Trainer  # imports `datasets`, which an adapter does without

_FACTOR = 2.0  # between rates, and of the best rate of probes over that of the training
_STEPS = 25  # of a probe, at most
_SHARE = 1 / 4  # of the training
_FEWEST_STEPS = 5  # of a probe
_MOST_PROBES = 16


@dataclass(frozen=True)
class LearningRate:
    """Rate that short trainings recommend.

    Attributes:
        rate: recommended peak rate, half of the best rate of the probes.
        current: the Trainer's.
        losses: rate of a probe → mean training loss of the last half of its steps, in the order of the rates; infinite
            if it diverged.
        untrained: loss on these batches without training.
        steps: of a probe.

    """

    rate: float
    current: float
    losses: dict[float, float]
    untrained: float
    steps: int = field(default=_STEPS)

    @property
    def best(self) -> float:
        """Rate with the lowest loss of the probes."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    def __str__(self) -> str:
        lines = [
            f"Learning rate: {self.rate:.3g}, half of the best rate of {self.steps} steps; the Trainer's is "
            f"{self.current:.3g}.",
            f"{'rate':>10}  loss after {self.steps} steps",
        ]
        for rate, loss in self.losses.items():
            mark = "  lowest" if rate == self.best else ""
            lines.append(f"{rate:>10.3g}  {f'{loss:.4f}' if math.isfinite(loss) else 'diverged'}{mark}")
        return "\n".join([*lines, f"{'untrained':>10}  {self.untrained:.4f}"])


def find_learning_rate(
    trainer: Trainer, *, rates: Sequence[float] = (1e-3, 2e-3, 4e-3), steps: int = _STEPS
) -> LearningRate:
    """Find a Trainer's learning rate by short trainings, before `train()`.

        found = lrlora.find_learning_rate(trainer)
        print(found)
        trainer.args.learning_rate = found.rate
        trainer.train()

    Trains for 25 steps, at most a quarter of the training, at rates by factor two, until the best has a worse one on
    either side; four or five trainings as a rule. All use the Trainer's first batches, its optimizer with all its
    parameter groups, whose rates keep their ratios, and its schedule at this length. The rate is half of the best one.

    The Trainer and its model are left as they were, to the bit: weights, buffers, random states and data order; no
    callback, logger or checkpoint is involved.

    Call it on every process.

    Args:
        trainer: Trainer of transformers, TRL or sentence-transformers, before its training; with DDP, any PEFT method,
            any optimizer, and schedules of transformers or `LambdaLR`.
        rates: rates that are tried first, by factor two, in ascending order.
        steps: maximum number of steps at a rate, ≥ 5.

    Returns:
        The rate, and the losses that decided.

    Raises:
        ValueError: the Trainer has trained, learns from rewards, streams its data, or takes fewer than 20 steps; its
            parameters are sharded (FSDP, DeepSpeed) or copied (DataParallel); its schedule is not known in advance; or
            no rate lowers the loss.

    """
    _require_supported(trainer, rates, steps)
    with _left_as_it_was(trainer) as values:
        probes = _Probes(trainer, values, steps)
        losses: dict[float, float] = {}
        if process_index() == 0:
            tqdm.write(
                f"Finding the learning rate takes four or five trainings of {probes.steps} steps; the training takes "
                f"{probes.total:,}."
            )
        untrained = probes.untrained()
        shown: dict[str, Any] = {
            "desc": "Learning rate",
            "unit": "step",
            "leave": False,
            "disable": process_index() > 0,
        }
        with progress_bar(total=4 * probes.steps, **shown) as bar:
            pending = [float(rate) for rate in rates]
            while pending:
                for rate in pending:
                    losses[rate] = probes.loss(rate, bar)
                losses = dict(sorted(losses.items()))
                pending = _beside_best(losses)
                if len(losses) + len(pending) > _MOST_PROBES:
                    break
    best = min(losses, key=lambda rate: losses[rate])
    if not losses[best] < untrained:
        raise ValueError(
            f"No rate from {min(losses):.2g} to {max(losses):.2g} lowers the training loss ({untrained:.4g}) in "
            f"{probes.steps} steps. Check the data and the labels, or pass more steps."
        )
    if pending:
        raise ValueError(
            f"The loss is lowest at the last of {len(losses)} rates, from {min(losses):.2g} to {max(losses):.2g}. Pass "
            "rates nearer to the best one."
        )
    return LearningRate(best / _FACTOR, probes.current, losses, untrained, probes.steps)


def _beside_best(losses: dict[float, float]) -> list[float]:
    """Rate beside the best one if that is the first or the last."""
    tried, best = list(losses), min(losses, key=lambda rate: losses[rate])
    if best == tried[0]:  # also where all diverged
        return [best / _FACTOR]
    return [best * _FACTOR] if best == tried[-1] else []


class _Probes:
    """Short trainings of a Trainer.

    Attributes:
        steps: of a probe.
        total: steps of the training.
        current: the Trainer's learning rate.

    """

    def __init__(self, trainer: Trainer, values: _Values, steps: int) -> None:
        self._trainer: Any = trainer
        self._values = values
        arguments = trainer.args
        loader: Any = trainer.get_train_dataloader()
        accumulation = arguments.gradient_accumulation_steps
        self.total = arguments.max_steps
        if self.total <= 0:
            self.total = math.ceil(arguments.num_train_epochs * math.ceil(len(loader) / accumulation))
        self.steps = min(steps, int(_SHARE * self.total))
        if self.steps < _FEWEST_STEPS:
            raise ValueError(
                f"A training of {self.total} steps is too short to find its rate by shorter ones: it takes at least "
                f"{int(_FEWEST_STEPS / _SHARE)}. Try rates on the whole training."
            )
        batches = iter(loader)
        drawn = (self._trainer.get_batch_samples(batches, accumulation, arguments.device) for _ in range(self.steps))
        # Fewer in a shorter epoch: a batch seen twice would favor rates that learn it by heart.
        self._batches = [(samples, number) for samples, number in drawn if samples]
        if hasattr(loader, "end"):
            loader.end()  # of accelerate, which counts the loaders that are being read
        self.steps = len(self._batches)
        self._scored = self.steps // 2  # first step whose loss counts
        model: Any = trainer.model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._scaler = self._trainer.accelerator.scaler
        self._own_optimizer: Any = trainer.optimizer
        self._own_state = None if trainer.optimizer is None else copy.deepcopy(trainer.optimizer.state_dict())
        self._factors = self._schedule()
        self.current = float(arguments.learning_rate if trainer.optimizer is None else self._peaks()[0])
        if not self.current > 0:
            raise ValueError(f"learning_rate must be positive, got {self.current!r}.")

    def loss(self, rate: float, bar: Any) -> float:
        """Mean training loss of the last half of the steps of a training at a rate; infinite if it diverges."""
        trainer, largest_norm = self._trainer, self._trainer.args.max_grad_norm
        optimizer = self._new_optimizer()
        peaks = [peak * rate / self.current for peak in self._peaks()]
        scaler = trainer.accelerator.scaler = copy.deepcopy(self._scaler)
        losses = []
        with at_rest(trainer.model, trainer):  # the same random states at each rate
            for step, batches in enumerate(self._batches):
                position = (2 * step + 1) * self.total // (2 * self.steps)  # in the schedule of the training
                for group, peak, factor in zip(optimizer.param_groups, peaks, self._factors, strict=False):
                    group["lr"] = peak * factor(position)
                losses.append(self._backward(batches))
                if not math.isfinite(losses[-1]):
                    break
                _average_gradients(self._parameters)
                if scaler is not None:
                    scaler.unscale_(optimizer)
                if largest_norm:
                    nn.utils.clip_grad_norm_(self._parameters, largest_norm)
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()
                bar.update()
        self._reset()
        bar.total = max(bar.total, bar.n + self.steps)
        return sum(losses[self._scored :]) / (self.steps - self._scored) if math.isfinite(losses[-1]) else math.inf

    def untrained(self) -> float:
        """Loss on the batches of the last half, without training."""
        accelerator = self._trainer.accelerator
        accelerator.backward = lambda loss, **options: None
        try:
            with at_rest(self._trainer.model, self._trainer), torch.no_grad():
                losses = [self._backward(batches) for batches in self._batches[self._scored :]]
        finally:
            del accelerator.backward
        self._reset()
        return sum(losses) / len(losses)

    def _backward(self, batches: tuple[list[Any], Any]) -> float:
        """Loss of a step, of all processes, with gradients of this one."""
        samples, number = batches
        self._trainer.current_gradient_accumulation_steps = len(samples)
        total = torch.zeros((), device=self._trainer.args.device)
        for sample in samples:
            # A copy, since losses take columns out of it.
            total += self._trainer.training_step(self._trainer.model, copy.copy(sample), number).to(total)
        if processes() > 1:
            dist.all_reduce(total)
            total /= processes()
        return total.item()

    def _peaks(self) -> list[float]:
        """Peak rate of each parameter group of the optimizer."""
        return [group.get("initial_lr", group["lr"]) for group in self._trainer.optimizer.param_groups]

    def _new_optimizer(self) -> Any:
        """An optimizer without a past."""
        if self._own_optimizer is None:
            self._trainer.optimizer = None
            self._trainer.create_optimizer()
        return self._trainer.optimizer

    def _schedule(self) -> Iterable[Any]:
        """Schedule of each parameter group: step → factor of the peak rate."""
        trainer = self._trainer
        if trainer.lr_scheduler is not None:
            return trainer.lr_scheduler.lr_lambdas
        schedule = trainer.create_scheduler(self.total, torch.optim.SGD([torch.zeros(1)], lr=1.0))
        _require_known_schedule(schedule)
        return repeat(schedule.lr_lambdas[0])

    def _reset(self) -> None:
        """Values and state of before."""
        self._values.restore()
        for parameter in self._parameters:
            parameter.grad = None
        if self._own_optimizer is not None:
            self._own_optimizer.load_state_dict(copy.deepcopy(self._own_state))


class _Values:
    """Copies of what a training changes in a model: trained parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._tensors = [tensor for tensor in (*trained, *model.buffers()) if not tensor.is_meta]
        self._copies = [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(value)


@contextlib.contextmanager
def _left_as_it_was(trainer: Any) -> Iterator[_Values]:
    """Restore a Trainer, its accelerator and its model; inside, autocast and checkpointing are those of a training."""
    accelerator, model, attributes = trainer.accelerator, trainer.model, dict(vars(trainer))
    state, scaler, loaders = copy.deepcopy(vars(trainer.state)), accelerator.scaler, list(accelerator._dataloaders)
    values = _Values(model)
    optimizer_state = None if trainer.optimizer is None else copy.deepcopy(trainer.optimizer.state_dict())
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # `train` prepares the model, which lower precision and checkpointing come with.
    trainer.compute_loss_context_manager = accelerator.autocast
    with at_rest(model, trainer), _checkpointing(model, trainer.args):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield values
        finally:
            values.restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            accelerator.scaler, accelerator._dataloaders[:] = scaler, loaders
            vars(trainer).clear()
            vars(trainer).update(attributes)
            vars(trainer.state).update(state)
            if optimizer_state is not None:
                trainer.optimizer.load_state_dict(optimizer_state)


@contextlib.contextmanager
def _checkpointing(model: Any, arguments: Any) -> Iterator[None]:
    """Activation checkpointing, if the training has it and the model does not have it yet."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.20
    name = f"{kind}_checkpointing"
    if not getattr(arguments, name) or getattr(model, f"is_{name}", True):
        yield
        return
    getattr(model, f"{name}_enable")()
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def _average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean gradients of all processes, as DDP's."""
    if processes() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= processes()


def _require_supported(trainer: Any, rates: Sequence[float], steps: int) -> None:
    """Raise ValueError for settings and Trainers whose rate cannot be found."""
    if not rates or any(not 0 < rate < math.inf for rate in rates) or list(rates) != sorted(set(rates)):
        raise ValueError(f"rates must be positive, in ascending order, got {rates!r}.")
    if steps < _FEWEST_STEPS:
        raise ValueError(f"steps must be an integer ≥ {_FEWEST_STEPS}, got {steps!r}.")
    if trainer.state.global_step:
        raise ValueError(
            f"The Trainer has trained for {trainer.state.global_step} steps. Find the rate before, with a new Trainer."
        )
    if learns_from_rewards(trainer):
        raise ValueError(
            f"{type(trainer).__name__} learns from rewards: the loss of a few steps does not tell which rate is best."
        )
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError(
            "find_learning_rate reads the first batches several times, and needs a train_dataset with a length, got "
            f"{type(trainer.train_dataset).__name__}. Pass a part of a stream: Dataset.from_list(list(stream.take(n)))."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.n_gpu > 1:
        raise ValueError(
            "find_learning_rate does not support DeepSpeed, FSDP and DataParallel. Run it in one process, or with DDP, "
            "on a smaller batch if need be."
        )
    if trainer.lr_scheduler is not None:
        _require_known_schedule(trainer.lr_scheduler)


def _require_known_schedule(schedule: Any) -> None:
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"The schedule {type(schedule).__name__} is not a function of the step. Find the rate with a schedule of "
            "transformers (lr_scheduler_type), or LambdaLR."
        )
