"""Find the learning rate of a Trainer by short trainings at several rates.

A probe is a training of its own, in fewer steps: with the Trainer's optimizer, and its schedule at the probe's length.
Short probes are best at about twice the rate of the whole training, since what a high rate breaks has not broken yet:
the rate is half of theirs (lab/studies/finder.md).
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
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

PROBES = 4  # as a rule
_STEPS = 25  # of a probe, at most
_SHARE = 1 / 4  # of the training
_FEWEST_STEPS = 5  # of a probe
_FIRST = 1e-3  # of an adapter's rates
_FACTOR = 2.0  # between rates, and of the best rate of probes over that of the training
_MOST_PROBES = 16
_SEVERAL_EPOCHS = 2
_LEAST_FALL = 1e-3  # of the loss, relative to that without training
_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, deque, set)
_VALUES = (int, float, Tensor, dict, list, tuple)  # of an optimizer's own attributes


@dataclass(frozen=True)
class LearningRate:
    """Rate that short trainings recommend.

    Attributes:
        rate: recommended peak rate, half of the best rate of the probes.
        current: the optimizer's: `TrainingArguments.learning_rate`, or that of its first parameter group.
        losses: rate of a probe → mean training loss of the last half of its steps, in the order of the rates; infinite
            if it diverged.
        untrained: loss on these batches without training.
        steps: of a probe.
        is_set: whether the Trainer trains at this rate now.

    """

    rate: float
    current: float
    losses: dict[float, float]
    untrained: float
    steps: int
    is_set: bool

    @property
    def best(self) -> float:
        """Rate with the lowest loss of the probes."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    def __str__(self) -> str:
        lines = [
            f"Learning rate: {self.rate:.3g}, half of the best of {self.steps} steps, since short trainings bear "
            f"higher rates. The Trainer's was {self.current:.3g}.",
            f"{'rate':>10}  loss after {self.steps} steps",
        ]
        for rate, loss in self.losses.items():
            mark = "  lowest" if rate == self.best else ""
            lines.append(f"{rate:>10.3g}  {f'{loss:.4f}' if math.isfinite(loss) else 'diverged'}{mark}")
        lines.append(f"{'untrained':>10}  {self.untrained:.4f}")
        factor = f"{self.rate / self.current:.3g} times the rate that it had"
        lines.append(
            f"It is set: each parameter group has {factor}."
            if self.is_set
            else f"It is not set: give each parameter group of the optimizer {factor}."
        )
        return "\n".join(lines)


def find_learning_rate(
    trainer: Trainer, *, rates: Sequence[float] = (), steps: int = _STEPS, update: bool = True
) -> LearningRate:
    """Find a Trainer's learning rate by short trainings, before `train()`, and set it.

        print(lrlora.find_learning_rate(trainer))
        trainer.train()

    Trains for 25 steps, at most a quarter of the training, at rates by factor two, until the best has a worse one on
    either side; four or five trainings as a rule. All begin anew, on the same batches of one epoch, with the Trainer's
    optimizer, whose parameter groups keep the ratios of their rates, and its schedule at this length. The rate is half
    of the best one.

    The rate is set in the arguments, and in the parameter groups and the schedule that the Trainer has already, whose
    ratios stay. All else of the Trainer and its model is left as it was, to the bit: weights, buffers, optimizer, the
    random states of torch, NumPy and Python, generators in the Trainer and its modules, and so the order of the data.
    No callback, logger or checkpoint is involved. What a data set, a collator or another object of one's own draws or
    counts is not rewound.

    Warns where the training has two epochs or more and does not keep the best checkpoint: the rate may overfit.

    Call it on every process.

    Args:
        trainer: Trainer of transformers, TRL or sentence-transformers, before its training; with DDP, any PEFT method,
            any optimizer, and schedules of transformers or `LambdaLR`.
        rates: rates that are tried first, by factor two, in ascending order; default: 1e-3, 2e-3 and 4e-3, and for full
            fine-tuning 1, 2 and 4 times the Trainer's.
        steps: maximum number of steps at a rate, ≥ 5.
        update: set the rate. An optimizer that the Trainer is still to create, with a rate other than that of its
            arguments, cannot be set.

    Returns:
        The rate, and the losses that decided.

    Raises:
        ValueError: the Trainer has trained, learns from rewards or by TRL's `dft`, streams its data, or takes fewer
            than 20 steps; an epoch has fewer than 5; its parameters are sharded (FSDP, DeepSpeed) or copied
            (DataParallel); its optimizer steps in the backward pass; its schedule is not known in advance; or no rate
            lowers the loss.

    """
    _require_supported(trainer, rates, steps)
    with _left_as_it_was(trainer) as values:
        probes = _Probes(trainer, values, steps)
        if process_index() == 0:
            tqdm.write(
                f"Finding the learning rate takes about four trainings of {probes.steps} steps; the training takes "
                f"{probes.total:,}."
            )
        untrained, losses = probes.untrained(), dict[float, float]()
        shown: dict[str, Any] = {"desc": "Learning rate", "unit": "step", "leave": False}
        with progress_bar(total=PROBES * probes.steps, disable=process_index() > 0, **shown) as bar:
            pending = [float(rate) for rate in rates or probes.first_rates()]
            while pending and len(losses) < _MOST_PROBES:
                for rate in pending:
                    losses[rate] = probes.loss(rate, bar)
                losses = dict(sorted(losses.items()))
                pending = _beside_best(losses)
    best = min(losses, key=lambda rate: losses[rate])
    if not losses[best] < (1 - _LEAST_FALL) * untrained:
        raise ValueError(
            f"No rate from {min(losses):.2g} to {max(losses):.2g} lowers the training loss ({untrained:.4g}) in "
            f"{probes.steps} steps. If it is noisy, as that of preferences, use larger batches or a higher `steps`. "
            f"Higher rates than {max(losses):.2g} were not tried: pass rates. Else check the data and the labels."
        )
    if pending:
        raise ValueError(
            f"The loss is lowest at the last of {len(losses)} rates, from {min(losses):.2g} to {max(losses):.2g}. Pass "
            "rates nearer to the best one, or train with a rate of your own."
        )
    if probes.epochs >= _SEVERAL_EPOCHS and not trainer.args.load_best_model_at_end and process_index() == 0:
        warnings.warn(
            f"The training sees each example {probes.epochs:.2g} times, and the short trainings saw none twice: at the "
            'rate that they found, it may overfit. Keep the best epoch (eval_strategy="epoch", save_strategy="epoch", '
            "load_best_model_at_end=True), or take a lower rate or fewer epochs.",
            stacklevel=2,
        )
    rate = best / _FACTOR
    is_set = update and (probes.is_of_arguments or trainer.optimizer is not None)
    if is_set:
        _set_rate(trainer, rate, rate / probes.current)
    return LearningRate(rate, probes.current, losses, untrained, probes.steps, is_set)


def _set_rate(trainer: Any, rate: float, factor: float) -> None:
    """Set a rate in the arguments, and by its factor in the groups and the schedule that a Trainer has already."""
    trainer.args.learning_rate = rate
    for group in () if trainer.optimizer is None else trainer.optimizer.param_groups:
        group.update({name: factor * group[name] for name in ("lr", "initial_lr") if name in group})
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.base_lrs = [factor * base for base in trainer.lr_scheduler.base_lrs]


def _beside_best(losses: dict[float, float]) -> list[float]:
    """Rate beside the best one if that is the first or the last."""
    tried, best = list(losses), min(losses, key=lambda rate: losses[rate])
    if best == tried[0]:  # also where all diverged
        return [best / _FACTOR]
    return [best * _FACTOR] if best == tried[-1] else []


class _Probes:
    """Short trainings of a Trainer, between `_left_as_it_was`.

    Attributes:
        steps: of a probe.
        total: steps of the training.
        epochs: of the training.
        current: peak rate of the groups that `TrainingArguments.learning_rate` sets, or of the first group.
        is_of_arguments: whether it sets any.

    """

    def __init__(self, trainer: Trainer, values: _Values, steps: int) -> None:
        self._trainer: Any = trainer
        self._values = values
        model: Any = trainer.model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._is_full = all(parameter.requires_grad for parameter in model.parameters())
        self._draw(steps)
        has_own_optimizer = trainer.optimizer is not None
        self._optimizer = trainer.create_optimizer()
        values.include(parameter for group in self._optimizer.param_groups for parameter in group["params"])
        self._restore_optimizer = _restorer(self._optimizer)
        self._scaler = self._trainer.accelerator.scaler
        self._own_schedule: Any = trainer.lr_scheduler
        self._peaks = [float(group.get("initial_lr", group["lr"])) for group in self._optimizer.param_groups]
        self.is_of_arguments = not has_own_optimizer and trainer.args.learning_rate in self._peaks
        self.current = trainer.args.learning_rate if self.is_of_arguments else self._peaks[0]
        if not self.current > 0:
            raise ValueError(f"learning_rate must be positive, got {self.current!r}.")
        self._schedule(self.current)  # refused before any step

    def _draw(self, steps: int) -> None:
        """Draw the batches of all steps."""
        trainer, arguments = self._trainer, self._trainer.args
        loader: Any = trainer.get_train_dataloader()
        accumulation = arguments.gradient_accumulation_steps
        steps_per_epoch = max(1, math.ceil(len(loader) / accumulation))
        self.total = arguments.max_steps
        if self.total <= 0:
            self.total = math.ceil(arguments.num_train_epochs * steps_per_epoch)
        self.epochs = self.total / steps_per_epoch
        length = probe_steps(self.total, steps)
        batches = iter(loader)
        try:
            # Fewer in a shorter epoch: a batch seen twice would favor rates that learn it by heart.
            drawn = [trainer.get_batch_samples(batches, accumulation, arguments.device) for _ in range(length)]
        finally:
            if hasattr(loader, "end"):
                loader.end()  # of accelerate, which counts the loaders that are being read
        self._batches = [(samples, number) for samples, number in drawn if samples]
        self.steps = len(self._batches)
        self._scored = self.steps // 2  # first step whose loss counts
        if self.steps < _FEWEST_STEPS:
            raise ValueError(
                f"An epoch of {self.steps} steps is too short to find the rate: at least {_FEWEST_STEPS} steps of "
                "different examples are needed. Use smaller batches or more data, or try rates on the whole training."
            )

    def first_rates(self) -> list[float]:
        """Rates that are tried first."""
        first = self.current if self._is_full else _FIRST
        return [first, _FACTOR * first, _FACTOR**2 * first]

    def loss(self, rate: float, bar: Any) -> float:
        """Mean training loss of the last half of the steps of a training at a rate; infinite if it diverges."""
        trainer, optimizer, largest_norm = self._trainer, self._optimizer, self._trainer.args.max_grad_norm
        factors = self._schedule(rate)
        scaler = trainer.accelerator.scaler = copy.deepcopy(self._scaler)
        losses = []
        with _state_kept(trainer), at_rest(trainer.model, trainer):  # the same random states at each rate
            for step, batches in enumerate(self._batches):
                position = (2 * step + 1) * self.total // (2 * self.steps)  # in the schedule of the training
                for group, peak, factor in zip(optimizer.param_groups, self._peaks, cycle(factors), strict=False):
                    group["lr"] = peak * rate / self.current * factor(position)
                trainer.state.global_step, trainer.state.max_steps = position, self.total  # for losses that anneal
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
        self._values.restore()
        optimizer.zero_grad()
        for parameter in self._parameters:
            parameter.grad = None
        self._restore_optimizer()
        bar.total = max(bar.total, bar.n + self.steps)
        return sum(losses[self._scored :]) / (self.steps - self._scored) if math.isfinite(losses[-1]) else math.inf

    def untrained(self) -> float:
        """Loss on the batches of the last half, without training."""
        with _state_kept(self._trainer), at_rest(self._trainer.model, self._trainer), torch.no_grad():
            self._trainer.accelerator.backward = lambda loss, **options: None
            # All batches, so that the last half has the dropout of the probes.
            losses = [self._backward(batches) for batches in self._batches][self._scored :]
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

    def _schedule(self, rate: float) -> Sequence[Any]:
        """Schedule of each parameter group, or one of all, at a peak rate: step → factor of the rate."""
        trainer = self._trainer
        trainer.lr_scheduler = self._own_schedule
        # Some have a lowest rate, relative to the optimizer's default.
        default = self._optimizer.defaults.get("lr", self.current) * rate / self.current
        schedule = trainer.create_scheduler(self.total, torch.optim.SGD([torch.zeros(1)], lr=default))
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                f"The schedule {type(schedule).__name__} is not a function of the step. Find the rate with a schedule "
                "of transformers (lr_scheduler_type), or LambdaLR."
            )
        return schedule.lr_lambdas


class _Values:
    """Copies of trained parameters."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        parameters = (parameter for module in modules for parameter in module.parameters(recurse=False))
        self.include(parameter for parameter in parameters if parameter.requires_grad)

    def include(self, parameters: Iterable[Tensor]) -> None:
        """Copy parameters that are not known yet."""
        for parameter in parameters:
            if parameter not in self._copies and not parameter.is_meta:
                self._copies[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in self._copies.items():
            parameter.copy_(value)


def _restorer(optimizer: Any) -> Callable[[], None]:
    """Function that restores an optimizer's state, and the values that it keeps in attributes of its own."""
    common = vars(torch.optim.SGD([torch.zeros(1)]))
    parameters = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}

    def own_values() -> dict[str, Any]:
        attributes = vars(optimizer).items()
        return {name: value for name, value in attributes if name not in common and isinstance(value, _VALUES)}

    def copied(value: Any) -> Any:
        return copy.deepcopy(value, dict(parameters))  # which stay themselves

    state, values = copied((optimizer.state_dict(), own_values()))

    def restore() -> None:
        optimizer.load_state_dict(copied(state))
        for name in own_values():  # also those that its first step made
            delattr(optimizer, name)
        vars(optimizer).update(copied(values))

    return restore


def _modules_of(trainer: Any) -> list[nn.Module]:
    """All modules of a Trainer: of its model, and of its loss and others, which may be in a dict."""
    values = list(vars(trainer).values())
    values += [each for value in values if isinstance(value, dict) for each in value.values()]
    found = (module for value in values if isinstance(value, nn.Module) for module in value.modules())
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def _state_kept(trainer: Any) -> Iterator[None]:
    """Restore all but parameters of a Trainer, its modules, its accelerator, and a loss function of one's own.

    That is what they count, anneal or log, buffers, hooks, and the groups of an optimizer that is still to be created.
    """
    function = getattr(trainer.compute_loss_func, "__self__", trainer.compute_loss_func)
    objects = [trainer, trainer.state, trainer.accelerator, function, *_modules_of(trainer)]
    data = [trainer.train_dataset, trainer.eval_dataset]
    kept = [
        (
            vars(each),
            dict(vars(each)),
            _contents(value for value in vars(each).values() if all(value is not d for d in data)),
        )
        for each in objects
        if hasattr(each, "__dict__")
    ]
    try:
        yield
    finally:
        for attributes, values, copies in kept:
            attributes.clear()
            attributes.update(values)
            for value, copied in copies:
                _fill(value, copied)


def _contents(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Containers, tensors, arrays and generators, also inside of one another, with copies."""
    pairs, pending, known = [], list(values), set[int]()
    while pending:
        value = pending.pop()
        kind = type(value)
        if id(value) in known:
            continue
        known.add(id(value))
        if kind in _CONTAINERS:
            pairs.append((value, copy.copy(value)))
        elif kind is np.ndarray:
            pairs.append((value, value.copy()))
        elif kind is Tensor and not value.is_meta:
            pairs.append((value, value.detach().clone()))
        elif kind is torch.Generator:
            pairs.append((value, value.get_state()))
        elif kind is np.random.Generator:
            pairs.append((value, value.bit_generator.state))
        if kind in _CONTAINERS or kind is tuple:
            pending += value.values() if isinstance(value, dict) else value
    return pairs


@torch.no_grad()
def _fill(value: Any, copied: Any) -> None:
    """Give a container, tensor, array or generator the content of its copy."""
    if isinstance(value, torch.Generator):
        value.set_state(copied)
        return
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = copied
        return
    if isinstance(value, Tensor | np.ndarray):
        value[...] = copied
        return
    value.clear()
    (value.extend if isinstance(value, list | deque) else value.update)(copied)


@contextlib.contextmanager
def _left_as_it_was(trainer: Any) -> Iterator[_Values]:
    """Restore a Trainer, its accelerator and its model; inside, autocast and checkpointing are those of a training."""
    accelerator, model, modules = trainer.accelerator, trainer.model, _modules_of(trainer)
    values = _Values(modules)
    restore_optimizer = None if trainer.optimizer is None else _restorer(trainer.optimizer)
    gradients = [(parameter, parameter.grad) for module in modules for parameter in module.parameters(recurse=False)]
    with at_rest(model, trainer), _state_kept(trainer):
        try:
            # `train` prepares the model, which lower precision and checkpointing come with.
            trainer.compute_loss_context_manager = accelerator.autocast
            _checkpoint(model, trainer.args)
            for parameter, _ in gradients:
                parameter.grad = None
            yield values
        finally:
            values.restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            if restore_optimizer is not None:
                restore_optimizer()


def _checkpoint(model: Any, arguments: Any) -> None:
    """Turn on activation checkpointing, if the training has it and the model does not have it yet."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # of an older transformers
    name = f"{kind}_checkpointing"
    if getattr(arguments, name) and not getattr(model, f"is_{name}", True):
        options = dict(getattr(arguments, f"{name}_kwargs") or {})
        others = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": options or None}, **others)


def probe_steps(total: int, steps: int = _STEPS) -> int:
    """Number of steps of a probe of a training.

    Raises:
        ValueError: the training is too short.

    """
    if int(_SHARE * total) < _FEWEST_STEPS:
        raise ValueError(
            f"A training of {total} steps is too short to find its rate by shorter ones: it takes at least "
            f"{int(_FEWEST_STEPS / _SHARE)}. Try rates on the whole training."
        )
    return min(steps, int(_SHARE * total))


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
    if any(not 0 < rate < math.inf for rate in rates) or list(rates) != sorted(set(rates)):
        raise ValueError(f"rates must be positive, in ascending order, got {rates!r}.")
    if not isinstance(steps, int) or steps < _FEWEST_STEPS:
        raise ValueError(f"steps must be an integer ≥ {_FEWEST_STEPS}, got {steps!r}.")
    if trainer.state.global_step:
        raise ValueError(
            f"The Trainer has trained for {trainer.state.global_step} steps. Find the rate before, with a new Trainer."
        )
    if learns_from_rewards(trainer):
        raise ValueError(
            f"{type(trainer).__name__} learns from rewards: the loss of a few steps does not tell which rate is best."
        )
    if getattr(trainer.args, "loss_type", None) == "dft":
        raise ValueError(
            'loss_type="dft" weighs each token by its probability, and may rise while the model learns. Find the rate '
            'with loss_type="nll".'
        )
    optim = getattr(trainer.args.optim, "value", trainer.args.optim)  # an enum, unless set after the arguments
    if optim in ("lomo", "adalomo") or optim.endswith("layerwise"):
        raise ValueError(
            f"find_learning_rate does not support optim={optim!r}, which takes its steps in the backward pass. Find "
            'the rate with another optimizer, such as optim="adamw_torch".'
        )
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError(
            "find_learning_rate reads its batches several times, and needs a train_dataset with a length, got "
            f"{type(trainer.train_dataset).__name__}. Pass a part of a stream: Dataset.from_list(list(stream.take(n)))."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.n_gpu > 1:
        raise ValueError(
            "find_learning_rate does not support DeepSpeed, FSDP and DataParallel. Run it in one process, or with DDP, "
            "on a smaller batch if need be."
        )
