"""`FittedRanks` for a Trainer."""

from __future__ import annotations

import base64
import warnings
import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..checks import CannotCutError
from ..lora.host import host_of
from ..lora.live import pad_state, require_plain_lora
from ..sharding import process_index
from ..shrunk import Shrunk
from .cut import Cut, cut_step
from .fitted_ranks import FittedRanks, budget_of, learning
from .held_out import forward_passes, require_measurable

if TYPE_CHECKING:
    from transformers import Trainer

_FULL_RATE = 5e-5  # the default of TrainingArguments; a higher default is meant for adapters


class FittedRanksCallback(TrainerCallback, ExportableState):
    """`FittedRanks`, or `shrink`, for a transformers or TRL Trainer with a plain `peft.LoraConfig`.

        trainer = SFTTrainer(..., peft_config=LoraConfig(r=16, target_modules="all-linear"),
                             callbacks=[FittedRanksCallback("r4")])      # cut to a size while it trains
        trainer.add_callback(FittedRanksCallback(keep=0.99, at=0.6, trainer=trainer))  # to a share of the gain so far
        trainer.add_callback(FittedRanksCallback(keep=0.99, trainer=trainer))          # at the end of training

    At the end, the best checkpoint is shrunk; training is as without the callback, and checkpoints stay whole.

    While it trains, the adapter is cut with DDP, FSDP2, DeepSpeed and `torch_compile`. Create the callback before a
    checkpoint from after the cut is resumed: with the Trainer, or with `trainer`.

    With `load_best_model_at_end`, a cut to a share leaves the choice of the best checkpoint as it is: one from before
    the cut is shrunk at the end. With a cut to a size, the best checkpoint is one from after the cut, and the patience
    of `EarlyStoppingCallback` begins there.

    Args:
        size: of the adapter after the cut: r4 (that of LoRA r = 4 on the same modules), 200k parameters, or 4MiB.
        keep: share of the gain to keep, instead of a size; see `shrink`.
        trainer: Trainer, for `keep`, and for a cut at the end.
        at: share of the steps after which the adapter is cut, in (0, 1], 1 for the end; default: 0.3 for a size, 1 for
            a share.
        rate: factor of the learning rate after the cut; see `FittedRanks`.
        max_rank: largest rank of any module; default: that of the adapter.

    Attributes:
        cut: the cut that is asked for.
        learned: `FittedRanks` with the ranks; None before training, and with a cut at the end.
        shrunk: record of the smallest size; None before it is found, and with `size` while training.

    Raises:
        ValueError: `size` is no size, or `keep` no share, or not one of them is given; when training begins: see
            `FittedRanks` and `shrink`.

    """

    _bound: Any = None  # weak reference to the Trainer

    def __init__(
        self,
        size: str | None = None,
        *,
        keep: float | None = None,
        trainer: Trainer | None = None,
        at: float | None = None,
        rate: float | None = None,
        max_rank: int | None = None,
    ) -> None:
        trainer = trainer if trainer is not None else self._bound and self._bound()
        if trainer is None and (size is None or at == 1):
            raise ValueError(
                "Pass a size, or keep and trainer: trainer.add_callback(FittedRanksCallback(keep=0.99, "
                "trainer=trainer)). A cut at the end (at=1) also needs trainer."
            )
        self.cut = Cut.parse(size, keep, at=at, rate=rate, max_rank=max_rank)
        self._trainer = trainer
        self.shrunk: Shrunk | None = None
        self.learned: FittedRanks | None = None
        self._is_learning = self._is_cut = False
        self._padding: Any = None
        self._run: TrainerState | None = None  # state of the training in which it began
        if trainer is not None:
            # transformers replaces a callback by one of its type, from JSON, where it restores the callbacks' states.
            bound = {"_bound": weakref.ref(trainer), "__module__": __name__, "__doc__": type(self).__doc__}
            if self._bound is None:
                self.__class__ = type(type(self).__name__, (FittedRanksCallback,), bound)
            self._pad(trainer.model)

    def _pad(self, model: Any) -> None:
        """Let a checkpoint from after the cut be loaded."""
        inner = host_of(model)
        self._padding = inner.register_load_state_dict_pre_hook(partial(pad_state, require_plain_lora(inner)))

    def state(self) -> dict[str, Any]:
        """State in a checkpoint's `trainer_state.json`, so that a run continues from the checkpoint that it loads."""
        return {
            "args": self.cut.options,
            "attributes": {"_stored": self.learned and _as_json(self.learned.state_dict())},
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _require_supported(args)
        self._pad(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _require_supported(args)
        model, learned = host_of(kwargs["model"]), self.learned
        if self._trainer is not None and self._trainer.state is not state:
            raise ValueError(
                "This FittedRanksCallback belongs to another Trainer, whose adapter it would cut. Create one for each "
                "Trainer: trainer.add_callback(FittedRanksCallback(..., trainer=trainer))."
            )
        if self._run is state:
            raise ValueError("This FittedRanksCallback was added to the Trainer twice. Remove one.")
        self._run = state
        if state.is_world_process_zero and not state.global_step:
            _tell_default_rate(args, kwargs["optimizer"])
        if self.cut.is_at_end:
            adapter = require_plain_lora(model)
            if self.cut.size is not None:
                budget_of(self.cut.size, model, adapter)
            require_measurable(cast("Trainer", self._trainer))
            return
        if self._padding is not None:  # a resumed run has a new callback
            self._padding.remove()  # `FittedRanks` has its own
        self._is_learning = state.global_step > 0 or learned is None or not learned.learned_by(model)
        if not self._is_learning:
            return  # a further `train()`, with the ranks learned before
        active = learning(model)
        if active is not None and active is not learned and active.optimizes(kwargs["optimizer"]):
            raise ValueError("The Trainer has two callbacks that learn its ranks (FittedRanksCallback). Remove one.")
        held_out = () if self._trainer is None else self._trainer
        options = {"steps": state.max_steps, "held_out": held_out, **self.cut.options}
        self.learned = FittedRanks(model, kwargs["optimizer"], **options)
        self.learned.defer_finish()
        if state.global_step:
            all_states: Any = state.stateful_callbacks or {}
            entry = all_states.get(type(self).__name__, [])
            entries = entry if isinstance(entry, list) else [entry]
            stored = next((value for item in entries if (value := item["attributes"].get("_stored"))), None)
            if stored is None:
                self.learned.begin_at(state.global_step)
            else:
                self.learned.load_state_dict(_from_json(stored))
        self._is_cut, self.shrunk = self.learned.ranks is not None, self.learned.shrunk
        if self.cut.keep is not None and not self._is_cut and state.is_world_process_zero:
            step, steps = self.learned.cut_step, state.max_steps * args.gradient_accumulation_steps
            tqdm.write(
                f"The cut after step {step} takes about {forward_passes(self._trainer, step):,} forward passes of a "
                f"batch; the training takes {steps:,} forward and backward passes."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.learned is not None and self._is_learning and hasattr(kwargs["lr_scheduler"], "_last_lr"):
            kwargs["lr_scheduler"]._last_lr = self.learned.rates  # the Trainer logs them

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        learned = self.learned
        if hasattr(kwargs["lr_scheduler"], "_last_lr"):
            # The optimizer's again: a checkpoint stores it, and some schedules set it in the optimizer when loaded.
            kwargs["lr_scheduler"]._last_lr = [group["lr"] for group in kwargs["optimizer"].param_groups]
        if learned is None or self._is_cut:
            return
        if self.cut.size is not None:
            # A better one from before the cut would be larger. Without a best one, patience does not begin.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._is_cut = learned.ranks is not None
        if self._is_cut and state.is_world_process_zero:
            tqdm.write(learned.summary)
        self.shrunk = learned.shrunk

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        learned = self.learned
        if self.cut.is_at_end:
            self._shrink()
        if learned is None:
            return
        if self._is_whole(args, state):
            if state.is_world_process_zero:
                tqdm.write(
                    f"The best checkpoint is that of step {state.best_global_step}, before the cut at step "
                    f"{learned.cut_step}: it is cut now."
                )
            learned.withdraw()
            self._shrink()
            if self.shrunk is not None:
                learned.ranks, learned.shrunk = self.shrunk.ranks, self.shrunk
        else:
            learned.end()
            if self._is_learning and self.shrunk is not None and self.shrunk.parameters < self.shrunk.whole:
                loss = learned.held_out_loss()
                self.shrunk = learned.shrunk = replace(self.shrunk, end_loss=loss)
                if state.is_world_process_zero:
                    tqdm.write(self.shrunk.end)
        self._is_learning = False
        if not self._is_cut:
            remedy = "" if self.cut.keep is None else f" lrlora.shrink(trainer, keep={self.cut.keep:g}) cuts it."
            warnings.warn(
                f"Training ended at step {state.global_step}, before the cut at step {learned.cut_step}: the "
                f"adapter is wide, not cut.{remedy}",
                stacklevel=2,
            )

    def _is_whole(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the Trainer has loaded its best checkpoint, and that is one from before the cut."""
        is_loaded = self._is_learning and self._is_cut and args.load_best_model_at_end
        best_step = state.best_global_step
        return is_loaded and best_step is not None and self.learned is not None and best_step < self.learned.cut_step

    def _shrink(self) -> None:
        """Shrink the adapter after training; it stays whole where its gain does not allow a cut."""
        from .shrinking import shrink  # which a cut while training does not need

        options = {name: self.cut.options[name] for name in ("size", "keep", "max_rank")}
        self.shrunk = None
        try:
            self.shrunk = shrink(self._trainer, **options)
        except CannotCutError as error:  # on all processes; the training is done
            warnings.warn(f"The adapter stays whole. {error}", stacklevel=2)
            return
        if process_index() == 0:
            tqdm.write(str(self.shrunk))


def _tell_default_rate(args: TrainingArguments, optimizer: Any) -> None:
    """Tell if the learning rate is a default for full fine-tuning, as TRL's is also with a `peft_config`."""
    default: Any = type(args).__dataclass_fields__["learning_rate"].default
    rates = {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
    if rates == {default} and default <= _FULL_RATE:
        tqdm.write(
            f"Learning rate {default:g} is {type(args).__name__}'s default for full fine-tuning. A LoRA usually needs "
            "ten times as much, or more. lrlora.find_learning_rate(trainer) finds it."
        )


def _as_json(state: dict[str, Any]) -> dict[str, Any]:
    """A state with its moments as text."""
    tensors = {
        f"{path}:{index}": tensor for path, moments in state["moments"].items() for index, tensor in enumerate(moments)
    }
    return {**state, "moments": base64.b64encode(save(tensors)).decode() if tensors else ""}


def _from_json(stored: dict[str, Any]) -> dict[str, Any]:
    moments: dict[str, list[Tensor]] = {}
    tensors = load(base64.b64decode(stored["moments"])) if stored["moments"] else {}
    for key in sorted(tensors):
        moments.setdefault(key.rpartition(":")[0], []).append(tensors[key])
    return {**stored, "moments": moments}


def planned_cut(model: Any, args: TrainingArguments, cut: Cut) -> tuple[int | None, int]:
    """Number of parameters after the cut, None without a size, and its step, for `FittedRanksCallback`.

    Raises:
        ValueError: see `FittedRanks`; or the Trainer is set up in a way that the cut does not support.

    """
    _require_supported(args)
    adapter = require_plain_lora(model)
    budget = None if cut.size is None else budget_of(cut.size, model, adapter)
    return budget, cut_step(cut.at, args.max_steps)


def _require_supported(args: TrainingArguments) -> None:
    """Raise ValueError for ways to train that replace the parameters by others."""
    if args.n_gpu > 1:
        raise ValueError("Fitted ranks do not support DataParallel on several GPUs. Use torchrun, for DDP.")
