"""A saved adapter on its base model, through PEFT's own loading."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..training.config import RUN_FILE, read_run
from ..tuner import LrLoraLayer

_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    None: "AutoPeftModel",
}


def load_adapted(adapter: str | os.PathLike[str], **options: Any) -> Any:
    """The base model that a saved adapter names, with the adapter on it.

    Args:
        adapter: folder or hub name.
        **options: of transformers' `from_pretrained`, such as `dtype`.

    Raises:
        FileNotFoundError: the base model is not there.
        ValueError: it is there, and the adapter does not fit it.

    """
    name = os.fspath(adapter)
    config = PeftConfig.from_pretrained(name)
    if (Path(name) / RUN_FILE).exists() and (labels := read_run(Path(name))["labels"]):
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    elif config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        options["num_labels"] = _num_labels(name, config)
    try:
        with warnings.catch_warnings():
            # PEFT looks for a tokenizer of the adapter's own, and is not sure that it found none.
            warnings.filterwarnings("ignore", message="Unable to fetch remote file")
            return getattr(peft, _CLASSES[config.task_type]).from_pretrained(name, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"The base model of {name}, {config.base_model_name_or_path}, could not be loaded: "
            f"{str(error).splitlines()[0]} Put it there, or correct base_model_name_or_path in adapter_config.json."
        ) from None
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The adapter {name} does not fit its base model {config.base_model_name_or_path}: "
            f"{' '.join(str(error).split())[:500]}"
        ) from None


def check_base(adapter: str | os.PathLike[str], model: PeftModel) -> None:
    """Compare an adapter, on its skeleton, with the base model that it names, of which only the configuration is read.

    Raises:
        FileNotFoundError: the base model is not there.
        ValueError: an adapted module is no linear layer there, or one of another shape.

    """
    name = str(PeftConfig.from_pretrained(os.fspath(adapter)).base_model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The base model {name} could not be found: {str(error).splitlines()[0]} Put it there, correct "
            "base_model_name_or_path in adapter_config.json, or leave out the check against it (--no-check)."
        ) from None
    with torch.device("meta"):
        base = AutoModel.from_config(config)
    modules = dict(base.named_modules())
    for path, layer in model.named_modules():
        if not isinstance(layer, LrLoraLayer):
            continue
        path = path.removeprefix("base_model.model.")
        module: Any = modules.get(path.removeprefix(f"{base.base_model_prefix}."))
        if module is None:
            continue  # a task head
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(
                f"Only linear layers can be exported as LoRA, and {path} is a {type(module).__name__}. Merge the "
                "adapter into its base model instead."
            )
        shape = tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)
        if shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"The base model {name} does not fit the adapter: {path} has shape {shape} there, and "
                f"{(layer.out_features, layer.in_features)} in the adapter."
            )


def _num_labels(name: str, config: PeftConfig) -> int:
    """How many classes the head that is saved with the adapter has; transformers' default where there is none."""
    heads = tuple(f"{module}.weight" for module in getattr(config, "modules_to_save", None) or ())
    sizes = [
        tensor.shape[0]
        for key, tensor in load_peft_weights(name, device="cpu").items()
        if tensor.dim() == 2 and heads and key.endswith((*heads, "out_proj.weight"))
    ]
    return sizes[-1] if sizes else 2


def save_preprocessing(folder: Path, source: str) -> bool:
    """Put the tokenizer or processor of a model or adapter into a folder; False if it has none."""
    for loader in (AutoProcessor, AutoTokenizer):
        # What is not there, or not for this model, raises in many ways.
        with contextlib.suppress(OSError, ValueError, ImportError, AttributeError, KeyError):
            loader.from_pretrained(source).save_pretrained(folder)
            return True
    return False


def sample_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Random inputs of the kind that a model takes: 4 sequences of 32 tokens, or 2 images; always the same.

    Raises:
        ValueError: the model takes something else.

    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = (config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(2, *size, generator=generator)}
    if model.main_input_name != "input_ids":
        raise ValueError(f"There are no sample inputs for {type(model).__name__}, which takes {model.main_input_name}.")
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (4, 32), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs | {"decoder_input_ids": tokens} if config.is_encoder_decoder else inputs
