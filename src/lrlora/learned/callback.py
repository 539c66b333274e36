"""`LearnedRanks` for a Trainer."""

from __future__ import annotations

import base64
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..checks import check_truncation
from ..shrunk import Shrunk
from .learned_ranks import CUT_AT, LearnedRanks, budget_of, cut_step
from .live_lora import pad_state, peft_model, require_plain_lora
from .shrinking import require_measurable, shrink
from .size import Size

if TYPE_CHECKING:
    from transformers import Trainer


class LearnedRanksCallback(TrainerCallback, ExportableState):
    """`LearnedRanks`, or `shrink`, for a transformers or TRL Trainer with a plain `peft.LoraConfig`.

        trainer = SFTTrainer(..., peft_config=LoraConfig(r=16, target_modules="all-linear"),
                             callbacks=[LearnedRanksCallback("r4")])      # cut to a size while it trains
        trainer.add_callback(LearnedRanksCallback(keep=0.99, trainer=trainer))  # or to a share of the gain, at its end

    With `keep`, training is as without the callback, and the best checkpoint is shrunk; checkpoints stay whole.

    With `size`, it works with DDP, FSDP2, DeepSpeed and `torch_compile`. Pass it to the Trainer when it is created, so
    that checkpoints from after the cut can be resumed. The best checkpoint (`load_best_model_at_end`) is one from after
    the cut, and the patience of `EarlyStoppingCallback` begins there.

    Args:
        size: of the adapter after the cut: r4 (that of LoRA r = 4 on the same modules), 200k parameters, or 4MiB.
        keep: share of the gain to keep, instead of a size; see `shrink`.
        trainer: Trainer, for `keep`.
        at: share of the steps after which the adapter is cut, in (0, 1).
        max_rank: largest rank of any module; default: that of the adapter.

    Attributes:
        learned: `LearnedRanks` with the ranks; None before training, and with `keep`.
        shrunk: result of `shrink`; None before the end of training.

    Raises:
        ValueError: `size` is no size, or `keep` no share, or not one of them is given; when training begins: see
            `LearnedRanks` and `shrink`.

    """

    def __init__(
        self,
        size: str | None = None,
        *,
        keep: float | None = None,
        trainer: Trainer | None = None,
        at: float = CUT_AT,
        max_rank: int | None = None,
    ) -> None:
        if (size is None) == (keep is None) or (keep is None) != (trainer is None):
            raise ValueError(
                "Pass a size, or keep and trainer: trainer.add_callback(LearnedRanksCallback(keep=0.99, "
                "trainer=trainer))."
            )
        if size is not None:
            Size.parse(size)
        if keep is not None:
            check_truncation(keep=keep)
        self._keep, self._trainer = keep, trainer
        self.shrunk: Shrunk | None = None
        self._options: dict[str, Any] = {"size": size, "at": at, "max_rank": max_rank}
        self.learned: LearnedRanks | None = None
        self._is_learning = self._is_cut = False
        self._padding: Any = None

    def state(self) -> dict[str, Any]:
        """State in a checkpoint's `trainer_state.json`, so that a run continues from the checkpoint that it loads."""
        return {"args": self._options, "attributes": {"_stored": self.learned and _as_json(self.learned.state_dict())}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _require_supported(args)
        model = peft_model(kwargs["model"])
        self._padding = model.register_load_state_dict_pre_hook(partial(pad_state, require_plain_lora(model)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _require_supported(args)
        if self._trainer is not None:
            require_plain_lora(peft_model(kwargs["model"]))
            require_measurable(self._trainer, "eval")
            return
        model, learned = peft_model(kwargs["model"]), self.learned
        if self._padding is not None:  # a resumed run has a new callback
            self._padding.remove()  # `LearnedRanks` has its own
        self._is_learning = state.global_step > 0 or learned is None or not learned.learned_by(model)
        if not self._is_learning:
            return  # a further `train()`, with the ranks learned before
        self.learned = LearnedRanks(model, kwargs["optimizer"], steps=state.max_steps, **self._options)
        self.learned.leave_end_to_caller()
        if state.global_step:
            states: Any = state.stateful_callbacks or {}
            stored = states.get(type(self).__name__, {}).get("attributes", {}).get("_stored")
            if stored is None:
                raise ValueError(
                    f"The checkpoint of step {state.global_step} has no learned ranks: it was written without "
                    "LearnedRanksCallback. Resume from another."
                )
            self.learned.load_state_dict(_from_json(stored))
        self._is_cut = self.learned.ranks is not None

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
        # A better one from before the cut would be larger than asked for. Without a best one, patience does not begin.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._is_cut = learned.ranks is not None
        if self._is_cut and state.is_world_process_zero:
            tqdm.write(learned.summary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is not None and self._keep is not None:
            try:
                self.shrunk = shrink(self._trainer, keep=self._keep, max_rank=self._options["max_rank"])
            except ValueError as error:  # the training is done
                warnings.warn(f"The adapter stays whole. {error}", stacklevel=2)
            else:
                tqdm.write(str(self.shrunk))
        if self.learned is None:
            return
        self.learned.finish()
        if self.learned.ranks is None:
            warnings.warn(
                f"Training ended at step {state.global_step}, before the cut at step {self.learned.cut_step}: the "
                f"adapter is wide, not of size {self._options['size']}.",
                stacklevel=2,
            )


def _as_json(state: dict[str, Any]) -> dict[str, Any]:
    """A state with its moments as text."""
    tensors = {f"{path}:{index}": part for path, of in state["moments"].items() for index, part in enumerate(of)}
    return {**state, "moments": base64.b64encode(save(tensors)).decode() if tensors else ""}


def _from_json(stored: dict[str, Any]) -> dict[str, Any]:
    moments: dict[str, list[Tensor]] = {}
    tensors = load(base64.b64decode(stored["moments"])) if stored["moments"] else {}
    for key in sorted(tensors):
        moments.setdefault(key.rpartition(":")[0], []).append(tensors[key])
    return {**stored, "moments": moments}


def planned_cut(size: str, model: Any, args: TrainingArguments) -> tuple[int, int]:
    """Number of parameters after the cut, and its step, for `LearnedRanksCallback` with its defaults.

    Raises:
        ValueError: see `LearnedRanks`; or the Trainer is set up in a way that the cut does not support.

    """
    _require_supported(args)
    return budget_of(size, model, require_plain_lora(model)), cut_step(CUT_AT, args.max_steps)


def _require_supported(args: TrainingArguments) -> None:
    """Raise ValueError for ways to train that replace the parameters by others."""
    if args.n_gpu > 1:
        raise ValueError("Learned ranks do not support DataParallel on several GPUs. Use torchrun, for DDP.")
