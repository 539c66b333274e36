"""LoRA that learns its ranks: it starts wide, is cut once to a size, and trains on.

At the cut, the loss decides how much rank each module keeps, by the quadratic model of `directions`. Its moments come
from the ordinary steps before the cut, so that no extra pass over data is needed. The kept directions are rotated to
the front and the others set to zero, where they stay (`live_lora`): no parameter changes its shape, so that every way
to train goes on. What is written is a plain LoRA with a `rank_pattern`, which PEFT loads without lrlora.

The learning rate is that of the wide LoRA. After the cut, the factors warm up, since the optimizer begins anew with
them, to a higher rate, which a smaller LoRA needs and bears. Other parameters, such as heads, keep their rate.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapters import Factors
from ..checks import check_truncation
from ..shrunk import Shrunk
from ..tuner.sharding import is_sharded, local_part
from .directions import Criterion, LossCurve, directions
from .held_out import LiveLosses, at_rest, find_in_place
from .host import WITHOUT_KERNELS, host_of, without_wrapper
from .live_lora import (
    SmallSave,
    costs_of,
    fit_state,
    lora_factors,
    lora_layers,
    lora_weights,
    make_small,
    pad_state,
    put,
    require_plain_lora,
    require_zero,
    weights_of,
)
from .moments import Loss, Moments, channel_dim, model_loss, watch
from .sharded import full_value, is_deepspeed, of_first, processes, restart, unwrapped, write
from .size import CUT_AT, Size

_WINDOW = 32  # most steps that give moments
_POWER = 0.5  # of the ratio of sizes, which gives that of the learning rates
_WARM_UP = 20  # steps after the cut, at most a twentieth of all
FEWEST_STEPS = 10
_FIRST_CUT = 3  # B is 0 in the first step, and with a warm-up also in the second
_CHECKED = (1, 10, 100)  # steps after the cut at which the zeros are checked; some optimizers act every few steps
_PROBE = 64  # rows and columns of matrices on which an optimizer is tested: 8-bit ones keep small states in 32 bits
_OPEN = (dict, list, set)  # attributes that a step may change in place
# Model → what learns its ranks now.
_LEARNING: weakref.WeakKeyDictionary[Any, weakref.ref[LearnedRanks]] = weakref.WeakKeyDictionary()


class LearnedRanks:
    """Cuts a LoRA while it trains, and thereby learns its ranks.

    It needs no call in the training loop: it acts after `optimizer.step()`. Create it after the optimizer, on every
    process:

        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ranks = LearnedRanks(model, optimizer, size="r4", steps=1000)
        ...                          # an ordinary training loop of 1000 steps
        model.save_pretrained("out")  # a plain LoRA, with the parameters of r = 4

    The model may be wrapped by DDP, `torch.compile` or DeepSpeed, or sharded by FSDP2. Its parameters keep their shapes
    until the last step; then, in one process, the live model becomes small too.

    To resume, load model and optimizer, and then `load_state_dict`; `accelerator.register_for_checkpointing` does it.

    Args:
        model: PEFT model with a plain LoRA on linear layers and convolutions.
        optimizer: optimizer of its parameters.
        steps: total number of optimizer steps.
        size: of the adapter after the cut: r4 (that of LoRA r = 4 on the same modules), 200k parameters, or 4MiB.
        keep: share of the gain so far, in (0, 1), that the adapter keeps at the cut, instead of a size; measured on
            `held_out` as by `shrink`. Without a measurable gain, nothing is cut.
        held_out: batches that are not trained on, for `keep`, the same on every process; or a Trainer with an
            `eval_dataset`.
        loss: of these batches: returns the sum of the loss terms of each example, and their number.
        at: share of the steps after which the adapter is cut, in (0, 1).
        rate: factor of the factors' learning rate after the cut; default: (parameters before / after the cut)^½.
        max_rank: largest rank of any module; default: that of the adapter.
        criterion: of the ranks at a size, see `lrlora.learned.directions.Criterion`; default: the predicted rise of the
            loss is least.
        scaler: `torch.amp.GradScaler` of a loop of your own in float16; that of accelerate or DeepSpeed is found.

    Attributes:
        ranks: module → rank after the cut; None before it.
        cut_step: optimizer step after which the adapter is cut.
        shrunk: with `keep`, the record of the cut.

    Raises:
        ValueError: the adapter is no plain LoRA, or not larger than the size; there are too few steps; or the optimizer
            lacks its parameters, or does not keep zeros at zero.

    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        steps: int,
        size: str | None = None,
        keep: float | None = None,
        held_out: Any = (),
        loss: Loss = model_loss,
        at: float = CUT_AT,
        rate: float | None = None,
        max_rank: int | None = None,
        criterion: Criterion = LossCurve.within,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._whole_model = without_wrapper(model)
        self._model = host_of(model)
        self._adapter = require_plain_lora(self._model)
        check_truncation(keep=keep, size=None if size is None else 1)
        held_out = held_out if hasattr(held_out, "compute_loss") else list(held_out)
        if keep is not None and isinstance(held_out, list) and not held_out:
            raise ValueError("keep is measured on held-out batches, but there are none. Pass held_out, or a size.")
        if keep is not None and criterion is not LossCurve.within:
            raise ValueError(f"criterion chooses the ranks at a size, but keep={keep} is given. Pass a size instead.")
        self._size, self._keep, self._held_out, self._loss = size, keep, held_out, loss
        self._steps, self._max_rank, self._done = steps, max_rank, 0
        self._criterion = criterion
        self.shrunk: Shrunk | None = None
        self.ranks: dict[str, int] | None = None
        self.cut_step = cut_step(at, steps)
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"rate must be a positive factor of the learning rate, got {rate!r}.")
        self._wide_rate, self._rate = 1.0, rate
        self._warm_up = max(1, min(_WARM_UP, steps // 20))
        # The metric of the moments is that of the window's begin: not of the first steps, when B is nearly 0.
        self._window = min(_WINDOW, (self.cut_step + 1) // 2)
        self._layers = lora_layers(self._model, self._adapter)
        self._costs = costs_of(self._model, self._adapter)
        self._wide = sum(cost * self._layers[path].r[self._adapter] for path, cost in self._costs.items())
        self._budget = self._wide if size is None else budget_of(size, self._model, self._adapter)
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank must be an integer ≥ 1, got {max_rank!r}.")
        optimizers = unwrapped(optimizer)
        # `_optimizer` steps the model once, and calls `_inner`.
        self._inner = optimizers[-1]
        if hasattr(self._inner, "eval"):
            # A factor of the step of what is trained would not be one of the averages of schedule-free optimizers.
            if rate not in (None, 1.0):
                raise ValueError(
                    f"rate={rate} is not supported for {type(self._inner).__name__}, which averages weights."
                )
            self._rate = 1.0
        self._optimizer = next(filter(is_deepspeed, reversed(optimizers)), self._inner)
        self._loss_scale = _loss_scale_of(optimizers, scaler)
        _require_suitable(self._optimizer, self._inner, self._factors)
        self._before: list[tuple[Tensor, Tensor]] = []  # values of the factors before a step
        self._reached: set[str] | None = set()  # modules whose lora_A ran in the first step
        self._moments: dict[str, Moments] = {}  # of all processes
        self._own: dict[str, Moments] = {}  # of this process, since its last step
        self._scale = 1.0  # of the loss in these
        self._ends = True  # with the last step
        self.summary = ""
        if (other := _LEARNING.get(self._model, lambda: None)()) is not None:
            other._stop()
        _LEARNING[self._model] = weakref.ref(self)
        self._save = SmallSave(self._model, self._adapter, self.cut_step)
        setattr(self._model, "save_pretrained", self._save)  # noqa: B010 (of this model alone)
        self._watchers: list[Any] = []
        self._watch(_reach)
        self._padding = self._model.register_load_state_dict_pre_hook(partial(pad_state, self._adapter))
        self._hooks: list[Any] = [
            self._padding,
            self._inner.register_step_pre_hook(self._before_update),
            self._inner.register_step_post_hook(self._after_update),
        ]
        if self._optimizer is self._inner:
            self._hooks.append(self._inner.register_step_post_hook(self._after_step))
        else:
            self._hooks.append(_StepHook(self._optimizer, self._after_step))

    def _watch(self, hook: Callable[..., None] | None) -> None:
        """Remove the forward hooks on lora_A; install `hook` unless None."""
        for watcher in self._watchers:
            watcher.remove()
        self._watchers = []
        if hook is not None:
            for path, layer in self._layers.items():
                self._watchers.append(layer.lora_A[self._adapter].register_forward_hook(partial(hook, self, path)))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not notice hooks that come and go

    @property
    def _factors(self) -> list[nn.Parameter]:
        """A and B of every module; some ways to train replace the parameters of the model."""
        return weights_of(self._layers, self._adapter)

    @property
    def parameters(self) -> int:
        """Number of parameters of the adapter after the cut; their limit before it."""
        return self._budget if self.ranks is None else sum(self._costs[path] * r for path, r in self.ranks.items())

    @property
    def _rate_factor(self) -> float:
        """Factor of the learning rate at which the factors learn in the next step."""
        if self.ranks is None:
            return self._wide_rate
        return self.rate * min(1.0, (self._done - self.cut_step + 1) / self._warm_up)

    @property
    def rate(self) -> float:
        """Factor of the learning rate after the cut; before it, for the size asked for."""
        return (self._wide / self.parameters) ** _POWER if self._rate is None else self._rate

    @property
    def rates(self) -> list[float]:
        """Learning rates of the optimizer's groups, as the factors in them are trained."""
        factor, factors = self._rate_factor, {id(weight) for weight in self._factors}
        groups = self._inner.param_groups
        return [g["lr"] * (factor if any(id(p) in factors for p in g["params"]) else 1.0) for g in groups]

    def __reduce__(self) -> Any:
        """Copies and pickles of a model do not learn its ranks."""
        return type(None), ()

    def state_dict(self) -> dict[str, Any]:
        """Steps, ranks and moments, the same on every process."""
        return {
            **{"size": self._size, "keep": self._keep, "max_rank": self._max_rank, "done": self._done},
            **{"cut_step": self.cut_step, "warm_up": self._warm_up, "ranks": self.ranks},
            **{"wide_rate": self._wide_rate, "rate": self._rate, "wide": self._wide},
            "shrunk": self.shrunk and asdict(self.shrunk),
            "moments": {path: [*of.to("cpu", copy=True)] for path, of in self._moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, after model and optimizer were loaded.

        Raises:
            ValueError: it is that of another size, or of an adapter with other ranks.

        """
        asked = {"size": self._size, "keep": self._keep, "max_rank": self._max_rank}
        if "rate" in state and state["ranks"] is None:
            asked["rate"] = self._rate
        for name, value in asked.items():
            if state.get(name) != value:
                raise ValueError(f"The run has {name}={state.get(name)!r}, got {value!r}. Pass the same.")
        wide = {path: layer.r[self._adapter] for path, layer in self._layers.items()}
        ranks, moments = state["ranks"], {path: Moments(*of) for path, of in state["moments"].items()}
        has_less = any(wide.get(path, 0) < rank for path, rank in (ranks or {}).items())
        has_other = any(wide.get(path) != len(of.h_metric) for path, of in moments.items())
        if has_less or has_other or (ranks is None and self._is_over):
            raise ValueError("The adapter has other ranks than the state. Load the adapter saved with it first.")
        self._done, self._reached = state["done"], None
        self._wide_rate = state.get("wide_rate", 0.5)  # states of before had half the rate, and then the whole
        self._rate, self._wide = state.get("rate", 1.0), state.get("wide", self._wide)
        self.shrunk = Shrunk(**state["shrunk"]) if state.get("shrunk") else None
        self._watch(None)
        if ranks is None:  # perhaps with other steps than before, or back from after the cut
            self.ranks = self._save.ranks = None
            self._moments = {path: of.to(self._device(path)) for path, of in moments.items()}
            self._own = {}
            self.cut_step = max(self.cut_step, self._done + (1 if self._moments else self._window))
            self._save.cut_step = self.cut_step
            self._open_window()
            return
        for path, layer in self._layers.items():
            for dim, weight in enumerate(lora_weights(layer, self._adapter)):
                if not ranks.get(path, 0):  # what was saved has no such module
                    write(weight, torch.zeros_like(full_value(weight)))
                fit_state(self._inner, weight, dim)
        self._require_ranks(ranks)
        self.cut_step, self._warm_up = state["cut_step"], state["warm_up"]
        self._end_learning({path: ranks.get(path, 0) for path in wide})

    def _device(self, path: str) -> torch.device:
        return lora_weights(self._layers[path], self._adapter)[0].device

    def leave_end_to_caller(self) -> None:
        """Do not `finish` after the last step, nor warn of an adapter saved before the cut, such as a checkpoint."""
        self._save.warns = self._ends = False

    def learned_by(self, model: Any) -> bool:
        """Whether these are ranks that this model has learned."""
        return self.ranks is not None and self._model is model

    def _stop(self) -> None:
        """Do nothing any more."""
        for hook in (*self._watchers, *self._hooks):
            hook.remove()

    def _open_window(self) -> None:
        """Begin or continue to collect moments of the modules whose update is not zero."""
        if self.ranks is not None or self._done < self.cut_step - self._window:
            return
        if not self._watchers:
            self._watch(_collect)
        if len(self._moments) < len(self._layers):
            for part in lora_factors(self._model, self._adapter):
                if part.energy and part.module not in self._moments:
                    self._moments[part.module] = Moments.zeros(part, self._device(part.module))
        for path, of in self._moments.items():
            if path not in self._own:
                self._own[path] = of._replace(sums=torch.zeros_like(of.sums))

    def _sum_moments(self) -> None:
        """Add the moments of the last step of all processes; each has the gradient of its own mean loss."""
        if not self._own:
            return
        own = torch.cat([of.sums for of in self._own.values()])
        if processes() > 1:
            dist.all_reduce(own)
        parts = own.div_((processes() * self._scale) ** 2).split([of.sums.numel() for of in self._own.values()])
        for path, part in zip(self._own, parts, strict=True):
            self._moments[path].sums.add_(part)
        self._drop_own()

    def _drop_own(self) -> None:
        for of in self._own.values():
            of.sums.zero_()

    def _scaled(self) -> None:
        """Before a module's moments: read the scale of the loss, which changes after a step that was skipped."""
        if self._loss_scale is not None and (scale := self._loss_scale()) != self._scale:
            self._drop_own()
            self._scale = scale

    def _before_update(self, optimizer: Any, *args: Any) -> None:
        if self._reached is not None:
            self._require_reached(self._reached)
            self._reached = None
            self._watch(None)
        self._before = []  # of a step that failed
        if self._rate_factor == 1:
            return
        of_all = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for parameter in of_all if self._is_deepspeed else self._factors:
            part = local_part(parameter.detach())
            self._before.append((part, part.clone()))

    @property
    def _is_deepspeed(self) -> bool:
        """Whether the optimizer steps ZeRO's partitions, which hold all parameters."""
        return self._optimizer is not self._inner

    def _after_update(self, *args: Any) -> None:
        for part, before in self._before:
            part.lerp_(before, 1 - self._rate_factor)
        self._before = []

    def _require_reached(self, reached: set[str]) -> None:
        """Raise ValueError if a kernel trains a module without calling its lora_A, whose values would not be seen."""
        for path, layer in self._layers.items():
            gradient = lora_weights(layer, self._adapter)[1].grad  # ZeRO keeps it elsewhere
            has_gradient = gradient is not None and bool(local_part(gradient).any())
            if path not in reached and (not reached if self._is_deepspeed else has_gradient):
                raise ValueError(
                    f"{path} trains without a call of its lora_A: a fused kernel bypasses PEFT's forward. "
                    f"{WITHOUT_KERNELS}"
                )

    def _after_step(self, *args: Any) -> None:
        overflow = getattr(self._optimizer, "found_inf", None)  # of a fused optimizer, which then skips the step itself
        if (overflow is not None and overflow.item()) or getattr(self._optimizer, "overflow", False):
            self._drop_own()
            return
        self._done += 1
        if self.ranks is None:
            self._sum_moments()
            self._open_window()
            if self._done >= self.cut_step:
                self._cut()
        elif self._done - self.cut_step in _CHECKED:
            self._require_ranks(self.ranks)
        if self._ends and self._done >= self._steps and processes() == 1:
            self.finish()

    def _require_ranks(self, ranks: Mapping[str, int]) -> None:
        """Raise ValueError unless everything beyond the ranks is zero."""
        for path, layer in self._layers.items():
            for dim, weight in enumerate(lora_weights(layer, self._adapter)):
                require_zero(full_value(weight), dim, ranks.get(path, 0), path)

    @torch.no_grad()
    def _cut(self) -> None:
        wide = lora_factors(self._model, self._adapter)
        if not all(part.A.isfinite().all() and part.B.isfinite().all() for part in wide):
            raise ValueError(f"The LoRA weights at step {self._done} are not finite. Lower the learning rate.")
        reached = {path for path, of in self._moments.items() if of.calls}
        idle = [part.module for part in wide if part.energy and part.module not in reached]
        if idle:
            raise ValueError(
                f"No gradient passed through lora_A of {idle[0]} ({len(idle)} of {len(wide)} modules) in the last "
                f"{self._window} steps before the cut: it was not used. Leave it out of target_modules."
            )
        if not any(of.weight for of in self._moments.values()):
            raise ValueError(
                f"No gradient reached the adapter before its cut at step {self._done}, so its ranks cannot be learned. "
                "Was the learning rate 0 until then? Shorten its warm-up, or raise at."
            )
        moments = {path: of.to("cpu") for path, of in self._moments.items()}
        curve = LossCurve([directions(part, moments.get(part.module), 1) for part in wide])
        self.cut_step = self._done
        factors = self._chosen(curve)
        if factors is None:
            self._rate, self._warm_up = 1.0, 1
            self._end_learning({part.module: part.rank for part in wide})
            return
        factors = of_first(factors)  # others may round otherwise
        put(self._model, self._adapter, factors)
        self._restart()
        self._end_learning({part.module: part.rank for part in factors})
        self.summary = f"{_summary(self._done, wide, factors)} Learning rate of the adapter: {self.rate:.3g} times."

    def _chosen(self, curve: LossCurve) -> list[Factors] | None:
        """Factors after the cut; None if nothing is to be cut."""
        if self._keep is None:
            return self._criterion(curve, self._budget, self._max_rank)
        model, held_out = self._model, self._held_out
        trainer = held_out if hasattr(held_out, "compute_loss") else None
        with at_rest(self._whole_model, trainer):
            try:
                losses = (
                    LiveLosses.of_batches(self._whole_model, held_out, self._loss)
                    if trainer is None
                    else LiveLosses.of_trainer(trainer, model, with_gradients=False)
                )
                factors, found = find_in_place(
                    *(model, self._adapter, losses, of_first(curve)), keep=self._keep, max_rank=self._max_rank
                )
                self.shrunk = replace(found, step=self._done)
            except Exception as error:  # the training goes on
                self.summary = f"Nothing was cut at step {self._done}: {error}"
                if self._ends:
                    warnings.warn(self.summary, stacklevel=2)
                return None
        return factors

    def _restart(self) -> None:
        factors = self._factors
        trained = sum(parameter.requires_grad for parameter in self._model.parameters())
        restart(self._inner, factors, are_all=trained == len(factors))

    def _end_learning(self, ranks: dict[str, int]) -> None:
        self.ranks = self._save.ranks = ranks
        self._moments, self._own = {}, {}
        self._watch(None)

    @property
    def _is_over(self) -> bool:
        """Whether the model is finished, or learns its ranks with another."""
        return vars(self._model).get("save_pretrained") is not self._save

    def finish(self) -> None:
        """Make the live model as small as what is saved, after training; only after the cut, without sharding.

        In one process, called after the last step.
        """
        is_whole = not self._is_deepspeed and not is_sharded(self._model)
        if self.ranks is None or not is_whole or self._is_over:
            return
        self._require_ranks(self.ranks)
        make_small(self._model, self._adapter, self.ranks, self._inner)
        self._layers = lora_layers(self._model, self._adapter)
        del self._model.save_pretrained
        self._padding.remove()


def _reach(learned: LearnedRanks | None, path: str, *args: Any) -> None:
    """Forward hook in the first step; without `learned` in a copy of the model."""
    if learned is None or learned._reached is None:
        return
    if args[-1].dtype is torch.float16 and learned._loss_scale is None:
        raise ValueError(
            "Learned ranks in float16 need the scaler of the loss, whose scale changes. Pass it: "
            "LearnedRanks(..., scaler=scaler); without one, scaler=torch.amp.GradScaler(enabled=False)."
        )
    learned._reached.add(path)


@torch.compiler.disable  # hooks on gradients cannot be traced
def _collect(learned: LearnedRanks | None, path: str, down: nn.Module, inputs: Any, z: Tensor) -> None:
    """Forward hook in the steps that give moments."""
    if learned is not None and z.requires_grad and path in learned._own:
        learned._scaled()
        watch(z, learned._own[path], channel_dim(down))


class _StepHook:
    """Calls a function after every step of an optimizer without hooks of its own, such as ZeRO's."""

    def __init__(self, optimizer: Any, function: Callable[[], None]) -> None:
        self._is_removed, step = False, optimizer.step

        def step_and_call(*args: Any, **options: Any) -> Any:
            result = step(*args, **options)
            if not self._is_removed:
                function()
            return result

        optimizer.step = step_and_call

    def remove(self) -> None:
        """Call it no more. The method stays, since others, such as schedulers, may have wrapped it."""
        self._is_removed = True


def _summary(step: int, wide: list[Factors], cut: list[Factors]) -> str:
    before, after = (sum(part.parameters for part in parts) for parts in (wide, cut))
    left_out, largest = sum(not part.rank for part in cut), max(cut, key=lambda part: part.rank)
    return (
        f"Ranks learned at step {step}: {before:,} to {after:,} parameters; {left_out} of {len(cut)} modules left out; "
        f"largest rank {largest.rank} ({largest.module})."
    )


def budget_of(size: str, model: Any, adapter: str) -> int:
    """Number of parameters of a size, for a live adapter.

    Raises:
        ValueError: see `Size`.

    """
    layers, costs = lora_layers(model, adapter), costs_of(model, adapter)
    whole = sum(cost * layers[path].r[adapter] for path, cost in costs.items())
    (first, *_) = layers.values()
    return Size.parse(size).below(whole, costs.values(), lora_weights(first, adapter)[0].element_size())


def cut_step(at: float, steps: int) -> int:
    """Step of the cut.

    Raises:
        ValueError: it is not within the steps.

    """
    if not isinstance(at, float) or not 0 < at < 1:
        raise ValueError(f"at must be a share of the steps between 0 and 1, got {at!r}.")
    if not isinstance(steps, int) or steps < FEWEST_STEPS:
        raise ValueError(
            f"steps must be at least {FEWEST_STEPS} for ranks to be learned, got {steps!r}. Train longer, or "
            "train a plain LoRA."
        )
    step = max(_FIRST_CUT, round(at * steps))
    if step >= steps:
        raise ValueError(f"at={at} leaves no step of {steps} after the cut. Lower it.")
    return step


def _require_suitable(optimizer: Any, inner: Any, factors: list[nn.Parameter]) -> None:
    """Raise ValueError for an optimizer whose steps the cut cannot take part in."""
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(f"Learned ranks need a torch.optim.Optimizer, which {type(inner).__name__} is not. Use AdamW.")
    stepped = {id(p) for group in inner.param_groups for p in group["params"]}
    if optimizer is inner and not stepped >= {id(weight) for weight in factors}:
        raise ValueError("The optimizer must have all LoRA parameters of the model. Create it from this model.")
    name = type(inner).__name__
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError("Learned ranks do not support LBFGS, whose state spans all parameters. Use AdamW.")
    if any(group.get("lr") is None for group in inner.param_groups):
        raise ValueError(f"Learned ranks need a learning rate, but {name} has lr=None. Set it.")
    try:
        keeps_zeros = _keeps_zeros(inner, factors[0])
    except Exception as error:  # of any type: the optimizer is not ours
        raise ValueError(
            f"Learned ranks need an optimizer that leaves zeros without a gradient at zero. {name} could not be tested "
            f"({type(error).__name__}: {error}). Use AdamW."
        ) from None
    if not keeps_zeros:
        raise ValueError(
            f"Learned ranks need an optimizer that leaves zeros without a gradient at zero, but {name} with these "
            "settings does not. Use AdamW, without gradient centralization or noise, and with eps > 0."
        )


def _keeps_zeros(optimizer: torch.optim.Optimizer, like: Tensor) -> bool:
    """Step a copy of the optimizer on matrices with zero rows or columns; raises as its step does."""
    like = next((parameter for group in optimizer.param_groups for parameter in group["params"]), like)
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype  # there, eps may be 0
    rows = torch.zeros(_PROBE, _PROBE, dtype=dtype, device=like.device)
    rows[: _PROBE // 2] = 1
    for mask in (rows, rows.T.contiguous()):
        parameter = nn.Parameter(mask.clone())
        twin = _twin(optimizer, parameter)
        for _ in range(2):
            parameter.grad = mask.clone()
            step = type(twin).step
            step(twin, *[lambda: torch.zeros(())] * ("closure" in inspect.signature(step).parameters))
        if bool((parameter.detach()[mask == 0] != 0).any()):
            return False
    return True


def _twin(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Any:
    """Optimizer with copies of attributes and options, of another parameter; in training mode, where it has modes."""

    def copied(values: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
        kept = {name: value for name, value in values.items() if name not in without}
        return {
            name: value.clone() if isinstance(value, Tensor) else copy.copy(value) if type(value) in _OPEN else value
            for name, value in kept.items()
        }

    # `copy.copy` leaves out what subclasses add; and DeepSpeed's destroy what they share with the original.
    cls = type(type(optimizer).__name__, (type(optimizer),), {"__del__": lambda self: None})
    twin: Any = object.__new__(cls)
    hooks = [name for name in vars(optimizer) if name.endswith("_hooks")]
    vars(twin).update(copied(vars(optimizer), (*hooks, "state", "param_groups")))
    vars(twin).update({name: OrderedDict() for name in hooks})
    options = copied(optimizer.param_groups[0], ("params",))
    options["lr"] = torch.full_like(options["lr"], 1e-3) if isinstance(options["lr"], Tensor) else 1e-3
    twin.state, twin.param_groups = defaultdict(dict), [options | {"params": [parameter]}]
    if hasattr(twin, "train"):
        twin.train()
    return twin


def _loss_scale_of(optimizers: list[Any], scaler: torch.amp.GradScaler | None) -> Callable[[], float] | None:
    """Function that returns the factor of the loss in the next backward; None without a loss scaler."""
    for optimizer in optimizers:
        if is_deepspeed(optimizer):
            return partial(getattr, optimizer, "loss_scale", 1.0)
        scaler = scaler or getattr(optimizer, "scaler", None)  # accelerate's wrapper has one
    return None if scaler is None else scaler.get_scale
