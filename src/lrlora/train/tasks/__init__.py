"""Kinds of tasks. To add one, add a file here, an entry in `KINDS`, and its name in the docstring of `TrainConfig`."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIPLE_CHOICE_MAPPING

from .base import Kind
from .causal_lm import CausalLm
from .images import ImageClassify
from .multiple_choice import ChoiceByLikelihood, MultipleChoice
from .texts import Classify, Regress

__all__ = ["KINDS", "ChoiceByLikelihood", "Kind", "kind_for"]

KINDS = {kind.name: kind for kind in (Classify(), Regress(), MultipleChoice(), CausalLm(), ImageClassify())}


def kind_for(task: str, model_config: Any) -> Kind:
    """Kind of a task for a model: decoders answer multiple choice by likelihood."""
    is_decoder = type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING and not model_config.is_encoder_decoder
    has_head = type(model_config) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
    return ChoiceByLikelihood() if task == "multiple-choice" and is_decoder and not has_head else KINDS[task]
