"""AdaLoRA: the call in each step that PEFT leaves to its users, and its ranks as saved."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrlora.train.methods import PeftMethod


class AdaLoraCallback(TrainerCallback):
    """Makes AdaLoRA's call in the training loop, which PEFT leaves to its users.

    The rank pattern stays out of the configuration until the end: with it, PEFT would save each checkpoint in the
    shapes of its step, and could not load the best one into the final shapes. Masked singular values are exactly 0, so
    checkpoints in full shapes are equivalent.
    """

    def __init__(self) -> None:
        self._pattern: Any = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Called before the gradients, which it reads, are zeroed; steps count from 0, as in PEFT's example.
        tuner = kwargs["model"].base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        config.rank_pattern = self._pattern
        tuner.update_and_allocate(state.global_step)
        self._pattern, config.rank_pattern = config.rank_pattern, None


class AdaLora(PeftMethod):
    """AdaLoRA, which needs a call in each step, and whose rank allocation PEFT does not save."""

    can_resume, has_penalty = False, True

    def defaults(self, rank: int, total_steps: int) -> dict[str, Any]:
        # As in the paper: from 1.5 times the rank down to it, between a warm-up and a final phase.
        schedule = {"total_step": total_steps, "tinit": total_steps // 10, "tfinal": total_steps // 2}
        return super().defaults(rank, total_steps) | schedule | {"init_r": round(1.5 * rank)}

    def callbacks(self) -> list[TrainerCallback]:
        return [AdaLoraCallback()]

    def finish(self, model: Any) -> None:
        """Set the rank pattern to the nonzero singular values, so that only they are saved."""
        tuner = model.base_model
        tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = {
            name: (values != 0).flatten().tolist()
            for name, values in tuner.model.named_parameters()
            if ".lora_E." in name
        }
