"""Tasks. To add one, add a file here, an entry in `TASKS`, and its name in the help of `TrainConfig`."""

from __future__ import annotations

from typing import Any

import transformers

from .base import Task
from .causal_lm import CausalLm
from .images import ImageClassify
from .multiple_choice import ChoiceByLikelihood, MultipleChoice
from .texts import Classify, Regress

__all__ = ["TASKS", "ChoiceByLikelihood", "Task", "task_for", "task_stored"]

TASKS: dict[str, Task] = {
    task.name: task for task in (Classify(), Regress(), MultipleChoice(), CausalLm(), ImageClassify())
}


def task_for(name: str, model_config: Any) -> Task:
    """The task of this name, as a model of this configuration does it."""
    return TASKS[name].for_model(model_config)


def task_stored(task_type: str | None, model_class: str | None) -> Task | None:
    """Task of an adapter that was not trained by `lrlora train`; None if it does not tell.

    Args:
        task_type: PEFT's, which the adapter stores for some tasks.
        model_class: transformers class that it was trained on, for the others.

    """
    stored_class = getattr(transformers, str(model_class), None)
    for task in TASKS.values():
        own_type = task.adapter_fields.get("task_type")
        if own_type == task_type and (own_type is not None or stored_class in task.architectures.values()):
            return task
    return None
