"""Trained tiny adapters on base models that are saved beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from lrlora import LrLoraConfig

from ..conftest import TinyModel

Trained = tuple[Path, Any]  # the adapter's folder, and the model


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trained]:
    """A saved base model, and an adapter with a curved φ trained on it for a few steps."""

    def train(family: str, **options: Any) -> Trained:
        tiny = TinyModel(family)
        tiny.build().save_pretrained(tmp_path / "base")
        base = type(tiny.build()).from_pretrained(tmp_path / "base")
        task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}.get(family)
        torch.manual_seed(0)
        model = get_peft_model(base, LrLoraConfig(r=2, task_type=task, **{**tiny.targets, **options}))
        tiny.train(model, steps=8)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return train
