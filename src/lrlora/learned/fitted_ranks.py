"""LoRA that fits its ranks: it starts wide, is cut once to a size, and trains on.

At the cut, the loss decides how much rank each module keeps, by the quadratic model of `directions`. Its moments come
from the ordinary steps before the cut, so that no extra pass over data is needed. The kept directions are rotated to
the front and the others set to zero, where they stay (`lora.live`): no parameter changes its shape, so that every way
to train goes on. What is written is a plain LoRA with a `rank_pattern`, which PEFT loads without lrlora.

The learning rate is that of the wide LoRA, and higher after the cut, as a smaller LoRA needs and bears. The optimizer's
moments are carried over to the new factors, or else they warm up. Other parameters, such as heads, keep their rate.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import CannotCutError
from ..lora.factors import Factors, changes
from ..lora.host import host_of, without_wrapper
from ..lora.live import (
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
from ..sharding import full_value, is_sharded, local_part, of_first, processes, write
from ..shrunk import Shrunk
from .cut import CUT_AT, Cut, Schedule, Size
from .directions import Criterion, LossCurve, directions
from .gain import mean_of
from .held_out import LiveLosses, at_rest, is_trainer_of, require_measurable
from .live_cut import LiveCut
from .moments import Loss, Moments, model_loss
from .optimizers import StepHook, carry_over, is_deepspeed, loss_scale_of, require_suitable, unwrapped
from .window import Window

_CHECKED_STEPS = (1, 10, 100)  # steps after the cut at which the zeros are checked; some optimizers act every few steps
# Model → what fits its ranks now.
_LEARNING: weakref.WeakKeyDictionary[Any, weakref.ref[FittedRanks]] = weakref.WeakKeyDictionary()


def learning(model: Any) -> FittedRanks | None:
    """Fitted ranks that a model learns now."""
    return _LEARNING.get(model, lambda: None)()


class FittedRanks:
    """Cuts a LoRA while it trains, and thereby fits its ranks.

    It needs no call in the training loop: it acts after `optimizer.step()`. Create it after the optimizer, on every
    process:

        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ranks = FittedRanks(model, optimizer, size="r4", steps=1000)
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
        loss: of these batches, `loss(model, batch)`: returns the sum of the loss terms of each example, and their
            number, two tensors (examples,); the same each time. Default: of the labels, as transformers' models.
        at: share of the steps after which the adapter is cut, in (0, 1).
        rate: factor of the factors' learning rate after the cut; default: (parameters before / after the cut)^½.
        max_rank: largest rank of any module; default: that of the adapter.
        criterion: of the ranks at a size, see `lrlora.learned.directions.Criterion`; default: the predicted rise of the
            loss is least.
        scaler: `torch.amp.GradScaler` of a loop of your own in float16; that of accelerate or DeepSpeed is found.

    Attributes:
        ranks: module → rank after the cut; None before it.
        shrunk: with `keep`, the record of the cut.

    Raises:
        ValueError: the adapter is no plain LoRA, or not larger than the size; there are too few steps; or the optimizer
            lacks its parameters, or does not keep zeros at zero; or `loss` returns other than it should.

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
        self._model = host_of(model)
        self._adapter = require_plain_lora(self._model)
        self._goal = goal = Cut.parse(size, keep, at=at, rate=rate, max_rank=max_rank)
        trainer = held_out if is_trainer_of("transformers", held_out) else None
        self._whole_model = without_wrapper(model if trainer is None else trainer.model)
        if trainer is not None and loss is not model_loss:
            raise ValueError("A Trainer has a loss of its own. Remove loss, or pass held_out as batches.")
        held_out = trainer or list(held_out)
        if keep is not None and not held_out:
            raise ValueError("keep is measured on held-out batches, but there are none. Pass held_out, or a size.")
        if keep is not None and criterion is not LossCurve.within:
            raise ValueError(f"criterion chooses the ranks at a size, but keep={keep} is given. Pass a size instead.")
        self._held_out, self._trainer, self._loss = held_out, trainer, loss
        self._steps, self._done = steps, 0
        self._criterion = criterion
        # ‖ΔW‖, and the loss on the held-out data, after half of the steps before the cut
        self._norm_before: float | None = None
        self._loss_before: float | None = None
        self.shrunk: Shrunk | None = None
        self.ranks: dict[str, int] | None = None
        self._layers = lora_layers(self._model, self._adapter)
        self._costs = costs_of(self._model, self._adapter)
        wide = sum(cost * self._layers[path].r[self._adapter] for path, cost in self._costs.items())
        self._schedule = Schedule.plan(at, steps, wide, rate)
        self._budget = wide if goal.size is None else budget_of(goal.size, self._model, self._adapter)
        optimizers = unwrapped(optimizer)
        # `_optimizer` steps the model once, and calls `_inner`.
        self._inner = optimizers[-1]
        if hasattr(self._inner, "eval"):
            # A factor of the step of what is trained would not be one of the averages of schedule-free optimizers.
            if rate not in (None, 1.0):
                raise ValueError(
                    f"rate={rate} is not supported for {type(self._inner).__name__}, which averages weights."
                )
            self._schedule.rate = 1.0
        self._optimizer = next(filter(is_deepspeed, reversed(optimizers)), self._inner)
        require_suitable(self._optimizer, self._inner, self._factors)
        if keep is not None:
            self._require_measurable()
        self._weights_before: list[tuple[Tensor, Tensor]] = []  # values of the factors before a step
        self._finishes = True  # with the last step
        self._is_over = False  # the model is finished, or fits its ranks with another
        self.summary = ""
        if (previous := learning(self._model)) is not None:
            previous._stop()
        _LEARNING[self._model] = weakref.ref(self)
        self._save = SmallSave(self._model, self._adapter, self.cut_step)
        self._model.save_pretrained = self._save
        self._window = Window(self._model, self._adapter, self.cut_step, loss_scale_of(optimizers, scaler))
        self._padding = self._model.register_load_state_dict_pre_hook(partial(pad_state, self._adapter))
        self._hooks: list[Any] = [
            self._padding,
            self._inner.register_step_pre_hook(self._before_update),
            self._inner.register_step_post_hook(self._after_update),
        ]
        if self._optimizer is self._inner:
            self._hooks.append(self._inner.register_step_post_hook(self._after_step))
        else:
            self._hooks.append(StepHook(self._optimizer, self._after_step))

    def _require_measurable(self) -> None:
        """Raise ValueError if the share could not be measured at the cut."""
        if self._trainer is not None:
            require_measurable(self._trainer)
            return
        with at_rest(self._whole_model, None):
            LiveLosses.of_batches(self._whole_model, self._held_out, self._loss).require_enough()

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings that a resumed run must have, too."""
        return {name: self._goal.options[name] for name in ("size", "keep", "max_rank")}

    @property
    def _factors(self) -> list[nn.Parameter]:
        """A and B of every module; some ways to train replace the parameters of the model."""
        return weights_of(self._layers, self._adapter)

    @property
    def parameters(self) -> int:
        """Number of parameters of the adapter after the cut; their limit before it."""
        return self._budget if self.ranks is None else sum(self._costs[path] * r for path, r in self.ranks.items())

    @property
    def cut_step(self) -> int:
        """Optimizer step after which the adapter is cut."""
        return self._schedule.cut_step

    @property
    def _rate_factor(self) -> float:
        """Factor of the learning rate at which the factors learn in the next step."""
        return self._schedule.factor(self._done, None if self.ranks is None else self.parameters)

    @property
    def rate(self) -> float:
        """Factor of the learning rate after the cut; before it, for the size asked for."""
        return self._schedule.rate_after(self.parameters)

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
            **{**self._settings, "done": self._done},
            **asdict(self._schedule),
            "ranks": self.ranks,
            "shrunk": self.shrunk and asdict(self.shrunk),
            "norm_before": self._norm_before,
            "loss_before": self._loss_before,
            "moments": {path: [*moments.to("cpu", copy=True)] for path, moments in self._window.moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, after model and optimizer were loaded.

        Raises:
            ValueError: it is that of another size, or of an adapter with other ranks.

        """
        settings = self._settings
        if state["ranks"] is None:
            settings["rate"] = self._schedule.rate
        for name, value in settings.items():
            if state.get(name) != value:
                raise ValueError(f"The run has {name}={state.get(name)!r}, got {value!r}. Pass the same.")
        wide_ranks = {path: layer.r[self._adapter] for path, layer in self._layers.items()}
        ranks, moments = state["ranks"], {path: Moments(*tensors) for path, tensors in state["moments"].items()}
        is_too_narrow = any(wide_ranks.get(path, 0) < rank for path, rank in (ranks or {}).items())
        has_other_moments = any(
            wide_ranks.get(path) != len(module_moments.h_metric) for path, module_moments in moments.items()
        )
        if is_too_narrow or has_other_moments or (ranks is None and self._is_over):
            raise ValueError("The adapter has other ranks than the state. Load the adapter saved with it first.")
        self._done, schedule = state["done"], self._schedule
        schedule.rate, schedule.wide = state["rate"], state["wide"]
        self.shrunk = Shrunk(**state["shrunk"]) if state["shrunk"] else None
        self._norm_before, self._loss_before = state["norm_before"], state["loss_before"]
        if ranks is None:  # perhaps with other steps than before, or back from after the cut
            self.ranks = self._save.ranks = None
            self._window.load(moments)
            schedule.cut_step = max(self.cut_step, self._done + (1 if moments else self._window.length))
            self._save.cut_step = self.cut_step
            self._open_window()
            return
        for path, layer in self._layers.items():
            for dim, weight in enumerate(lora_weights(layer, self._adapter)):
                if not ranks.get(path, 0):  # what was saved has no such module
                    write(weight, torch.zeros_like(full_value(weight)))
                fit_state(self._inner, weight, dim)
        self._require_ranks(ranks)
        schedule.cut_step, schedule.warm_up = state["cut_step"], state["warm_up"]
        self._end_learning({path: ranks.get(path, 0) for path in wide_ranks})

    def begin_at(self, step: int) -> None:
        """Begin to learn in a run that has trained a plain LoRA until this step.

        Raises:
            ValueError: too few steps are left before the cut.

        """
        self._done = step
        if self.cut_step < step + self._window.length:
            raise ValueError(
                f"The run has trained {step} steps without fitted ranks, and the cut after step {self.cut_step} needs "
                f"{self._window.length} steps before it. Raise at, or cut the adapter at the end: at=1."
            )
        self._open_window()

    def defer_finish(self) -> None:
        """Do not `finish` after the last step, nor warn of an adapter saved before the cut, such as a checkpoint."""
        self._save.warns = self._finishes = False

    def learned_by(self, model: Any) -> bool:
        """Whether these are ranks that this model has learned."""
        return self.ranks is not None and self._model is model

    def optimizes(self, optimizer: Any) -> bool:
        """Whether these ranks are fitted by this optimizer's steps."""
        return unwrapped(optimizer)[-1] is self._inner

    def _stop(self) -> None:
        """Do nothing any more."""
        self._is_over = True
        self._window.close()
        for hook in self._hooks:
            hook.remove()

    def end(self) -> None:
        """End the learning, in one process with a small model after the cut; the optimizer has its own rate again."""
        self.finish()
        if self.ranks is None and not self._is_over:
            del self._model.save_pretrained  # the adapter is whole
            self._is_over = True
        for hook in self._hooks:
            if hook is not self._padding:  # checkpoints, such as the best one, may still be loaded
                hook.remove()
        self._window.close()
        if learning(self._model) is self:
            del _LEARNING[self._model]

    def withdraw(self) -> None:
        """End the learning for a model that has the factors of a step before the cut again."""
        self.ranks = self.shrunk = None
        self.end()

    def _open_window(self) -> None:
        if self.ranks is None and self._done >= self.cut_step - self._window.length:
            self._window.open()

    def _before_update(self, optimizer: Any, *args: Any) -> None:
        self._window.end_first_step(is_deepspeed=self._is_deepspeed)
        self._weights_before = []  # of a step that failed
        if self._rate_factor == 1:
            return
        all_parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for parameter in all_parameters if self._is_deepspeed else self._factors:
            weight = local_part(parameter.detach())
            self._weights_before.append((weight, weight.clone()))

    @property
    def _is_deepspeed(self) -> bool:
        """Whether the optimizer steps ZeRO's partitions, which hold all parameters."""
        return self._optimizer is not self._inner

    def _after_update(self, *args: Any) -> None:
        for weight, old_weight in self._weights_before:
            weight.lerp_(old_weight, 1 - self._rate_factor)
        self._weights_before = []

    def _after_step(self, *args: Any) -> None:
        overflow = getattr(self._optimizer, "found_inf", None)  # of a fused optimizer, which then skips the step itself
        if (overflow is not None and overflow.item()) or getattr(self._optimizer, "overflow", False):
            self._window.drop_step()
            return
        self._done += 1
        if self.ranks is None:
            self._window.end_step()
            self._open_window()
            if self._done == self.cut_step // 2 and self._goal.keep is not None:
                self._norm_before = _norm_of(lora_factors(self._model, self._adapter))
                self._loss_before = self.held_out_loss()
            if self._done >= self.cut_step:
                self._cut()
        elif self._done - self.cut_step in _CHECKED_STEPS:
            self._require_ranks(self.ranks)
        if self._finishes and self._done >= self._steps and processes() == 1:
            self.finish()

    def _require_ranks(self, ranks: Mapping[str, int]) -> None:
        """Raise ValueError unless everything beyond the ranks is zero."""
        for path, layer in self._layers.items():
            for dim, weight in enumerate(lora_weights(layer, self._adapter)):
                require_zero(full_value(weight), dim, ranks.get(path, 0), path)

    @torch.no_grad()
    def _cut(self) -> None:
        wide = lora_factors(self._model, self._adapter)
        if not all(pair.A.isfinite().all() and pair.B.isfinite().all() for pair in wide):
            raise ValueError(f"The LoRA weights at step {self._done} are not finite. Lower the learning rate.")
        reached = {path for path, module_moments in self._window.moments.items() if module_moments.calls}
        idle = [pair.module for pair in wide if pair.energy and pair.module not in reached]
        if idle:
            raise ValueError(
                f"No gradient passed through lora_A of {idle[0]} ({len(idle)} of {len(wide)} modules) in the last "
                f"{self._window.length} steps before the cut: it was not used. Leave it out of target_modules."
            )
        if not any(module_moments.weight for module_moments in self._window.moments.values()):
            raise ValueError(
                f"No gradient reached the adapter before its cut at step {self._done}, so its ranks cannot be learned. "
                "Was the learning rate 0 until then? Shorten its warm-up, or raise at."
            )
        moments = {path: module_moments.to("cpu") for path, module_moments in self._window.moments.items()}
        curve = LossCurve([directions(pair, moments.get(pair.module), 1) for pair in wide])
        self._schedule.cut_step = self._done
        factors = self._choose(curve)
        if factors is None:
            self._schedule.rate, self._schedule.warm_up = 1.0, 1
            self._end_learning({pair.module: pair.rank for pair in wide})
            return
        factors = of_first(factors)  # others may round otherwise
        put(self._model, self._adapter, factors)
        if self._carry_over(wide):
            self._schedule.warm_up = 1
        self._end_learning({pair.module: pair.rank for pair in factors})
        rate = f"From here, the adapter learns at {self.rate:.3g} times the schedule's rate."
        if self.shrunk is None:
            cut = f"{_summary(self._done, wide, factors)} {rate}"
            self.summary = " ".join(filter(None, (self.summary, cut)))
        else:
            self.summary = f"{self.shrunk} {rate}"

    def _apply_criterion(self, curve: LossCurve) -> list[Factors]:
        factors = self._criterion(curve, self._budget, self._goal.max_rank) or []
        if [pair.module for pair in factors] != [module.whole.module for module in curve.modules]:
            raise ValueError("criterion must return the factors of all modules, in the order of curve.modules.")
        parameters, rank = sum(pair.parameters for pair in factors), max(pair.rank for pair in factors)
        if not 0 < parameters <= self._budget or rank > (self._goal.max_rank or rank):
            raise ValueError(
                f"criterion must keep to 1 to {self._budget:,} parameters and max_rank={self._goal.max_rank}, got "
                f"{parameters:,} parameters and a largest rank of {rank}."
            )
        return factors

    def _choose(self, curve: LossCurve) -> list[Factors] | None:
        """Factors after the cut; None if nothing is to be cut."""
        wide = [module.whole for module in curve.modules]
        if self._goal.keep is None:
            return self._apply_criterion(curve)
        curve = of_first(curve)
        with at_rest(self._whole_model, self._trainer):
            try:
                live_cut = LiveCut(self._model, self._adapter, self._held_out_losses(), curve)
                factors, record = live_cut.smallest(self._goal.keep, self._goal.max_rank)
            except CannotCutError as error:  # on all processes; the training goes on
                outcome = (
                    "Nothing was cut" if self._goal.max_rank is None else f"Cut to max_rank={self._goal.max_rank} alone"
                )
                self._tell(f"{outcome} at step {self._done}: {error}")
                return None if self._goal.max_rank is None else curve.within(curve.parameters, self._goal.max_rank)
        growth = _norm_of(wide) / self._norm_before if self._norm_before else None
        self.shrunk = replace(record, step=self._done, growth=growth, loss_before=self._loss_before)
        if record.parameters == record.whole:
            self._tell(f"Nothing was cut at step {self._done}: {record.sentence}")
            return None
        return factors

    def _held_out_losses(self) -> LiveLosses:
        if self._trainer is None:
            return LiveLosses.of_batches(self._whole_model, self._held_out, self._loss)
        return LiveLosses.of_trainer(self._trainer, with_gradients=False, step=self.cut_step)

    def held_out_loss(self) -> float:
        """Mean loss on the held-out data of the cut to a share; call it on every process."""
        with at_rest(self._whole_model, self._trainer):
            losses = self._held_out_losses()
            return mean_of(torch.cat([*(losses.whole_losses or losses.losses_by_batch(losses.held_out))]))

    def _tell(self, summary: str) -> None:
        self.summary = summary
        if self._finishes:
            warnings.warn(summary, stacklevel=2)

    def _carry_over(self, wide: Sequence[Factors]) -> bool:
        """Whether the optimizer goes on with all factors that were put in place of the wide ones."""
        cut, is_carried = lora_factors(self._model, self._adapter), True
        all_changes = of_first([changes(old, new) for old, new in zip(wide, cut, strict=True)])
        for layer, layer_changes in zip(self._layers.values(), all_changes, strict=True):
            for dim, weight in enumerate(lora_weights(layer, self._adapter)):
                is_carried &= carry_over(self._inner, weight, dim, layer_changes[dim])
        return is_carried

    def _end_learning(self, ranks: dict[str, int]) -> None:
        self.ranks = self._save.ranks = ranks
        self._window.close()

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
        self._is_over = True


def _norm_of(factors: list[Factors]) -> float:
    """‖ΔW‖ of all modules."""
    return math.sqrt(sum(pair.energy for pair in factors))


def _summary(step: int, wide: list[Factors], cut: list[Factors]) -> str:
    before, after = (sum(pair.parameters for pair in factors) for factors in (wide, cut))
    left_out, largest = sum(not pair.rank for pair in cut), max(cut, key=lambda pair: pair.rank)
    return (
        f"Ranks fitted at step {step}: {before:,} to {after:,} parameters; {left_out} of {len(cut)} modules left out; "
        f"largest rank {largest.rank} ({largest.module})."
    )


def budget_of(size: Size, model: Any, adapter: str) -> int:
    """Number of parameters of a size, for a live adapter.

    Raises:
        ValueError: see `Size`.

    """
    layers, costs = lora_layers(model, adapter), costs_of(model, adapter)
    whole = sum(cost * layers[path].r[adapter] for path, cost in costs.items())
    (first, *_) = layers.values()
    return size.below(whole, costs.values(), lora_weights(first, adapter)[0].element_size())
