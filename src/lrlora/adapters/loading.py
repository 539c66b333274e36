"""Loading of a saved adapter onto its base model, through PEFT."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..files import ADAPTER_EXPECTED, readable, require_present
from .card import class_names
from .peft_folder import AdapterSource, SavedAdapter, require_all_weights, require_reproducible_start
from .update import PLAIN, Updates


def load_adapted(adapter: AdapterSource, **options: Any) -> Any:
    """Load the base model of a saved adapter, with the adapter on it.

    Args:
        adapter: folder, hub name, or `SavedAdapter`.
        **options: passed to transformers' `from_pretrained`, such as `dtype`.

    Raises:
        FileNotFoundError: the base model is missing.
        ValueError: the adapter does not fit the base model, or its change to the base weights cannot be reproduced.

    """
    saved = SavedAdapter.read(adapter)
    require_reproducible_start(saved)
    name, config = saved.name, saved.config
    base = saved.base_model
    if not base:
        raise FileNotFoundError(f"The adapter {name} does not name its base model. Pass it: --base MODEL, or base=.")
    with readable(name, ADAPTER_EXPECTED):
        if labels := class_names(saved):
            options["id2label"] = dict(enumerate(labels))
            options["label2id"] = {label: index for index, label in enumerate(labels)}
        elif config.task_type in ("SEQ_CLS", "TOKEN_CLS") and (num_labels := _num_labels(saved)) is not None:
            options["num_labels"] = num_labels
        if config.modules_to_save and {"id2label", "num_labels"} & options.keys():
            options["ignore_mismatched_sizes"] = True  # its head replaces the base model's
        model: Any
        loader = f"Auto{MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel).__name__}"
        try:
            with warnings.catch_warnings():
                # PEFT looks for a tokenizer with the adapter, and warns if it cannot tell whether there is one.
                warnings.filterwarnings("ignore", message="Unable to fetch remote file")
                require_present(base)
                with saved.as_peft_reads_it() as folder:
                    model = getattr(peft, loader).from_pretrained(folder, **options)
        except OSError as error:
            raise FileNotFoundError(
                f"The base model of {name}, {base}, could not be loaded: "
                f"{str(error).splitlines()[0]} Pass another path: --base MODEL, or base=."
            ) from None
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The adapter {name} does not fit its base model {base}: {' '.join(str(error).split())[:500]}"
            ) from None
        require_all_weights(model, saved)
    if config.task_type == "SEQ_CLS" and model.config.pad_token_id is None:
        # A decoder classifies at the last token before the padding, and is trained with the tokenizer's pad token.
        model.config.pad_token_id = _pad_token(name, base)
    return model


def check_base(updates: Updates) -> Updates:
    """Check that the modules of a saved adapter are linear layers of its base model, where its file does not say so.

    Reads only the configuration of the base model. Updates of other sources pass.

    Returns:
        The updates, now known to be of linear layers.

    Raises:
        FileNotFoundError: the base model is missing.
        ValueError: an adapted module is not linear or has another shape.

    """
    saved = updates.origin
    if not isinstance(saved, SavedAdapter) or all(update.layout.is_known for update in updates):
        return updates
    name = saved.base_model
    if not name:
        raise FileNotFoundError(
            f"The adapter {saved.name} does not name its base model. Pass it (--base MODEL), or skip the check against "
            "it (--no-check)."
        )
    with readable(name, "Correct it, or skip the check against it (--no-check)."):
        try:
            require_present(name)
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"The base model {name} could not be found: {str(error).splitlines()[0]} Pass another path (--base "
                "MODEL), or skip the check against it (--no-check)."
            ) from None
    with torch.device("meta"):
        base = AutoModel.from_config(config)
    modules = dict(base.named_modules())
    for update in updates:
        path = update.module
        module: Any = modules.get(path.removeprefix(f"{base.base_model_prefix}."))
        if module is None:
            continue  # a task head
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(
                f"Only linear layers can be exported as LoRA, but {path} is a {type(module).__name__}. Merge the "
                "adapter into its base model instead."
            )
        shape = tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)
        if shape != update.shape:
            raise ValueError(
                f"The base model {name} does not fit the adapter: {path} has shape {shape} in the base model, but "
                f"{update.shape} in the adapter."
            )
    return _of_linear_layers(updates)


def check_names(updates: Updates) -> Updates:
    """`check_base` by name only, without a base model.

    Raises:
        ValueError: a module is probably not a linear layer.

    """
    for update in updates if isinstance(updates.origin, SavedAdapter) else ():
        if not update.layout.is_known and _UNLIKELY.search(update.module):
            raise ValueError(
                f"{update.module} does not look like a linear layer, the only type that can be exported as LoRA. "
                "Export without --no-check, or merge the adapter into the base model."
            )
    return _of_linear_layers(updates)


def _of_linear_layers(updates: Updates) -> Updates:
    if not isinstance(updates.origin, SavedAdapter):
        return updates
    known = [each if each.layout.is_known else replace(each, layout=PLAIN) for each in updates]
    return replace(updates, updates=known)


_UNLIKELY = re.compile(r"(embed\w*|wte|wpe|shared|conv\w*)$", re.IGNORECASE)
# Names in transformers of the layer, and in some models its submodule, that outputs the classes.
_HEADS = re.compile(r"\.(classifier|score|classification_head|logits_proj)(\.out_proj)?\.weight$")


def _num_labels(saved: SavedAdapter) -> int | None:
    """Number of classes of the head saved with an adapter; None without a saved head."""
    heads = [tensor for key, tensor in saved.weights.items() if _HEADS.search(key)]
    return len(heads[-1]) if heads else None


def _pad_token(name: str, base: str) -> int | None:
    for source in (name, base):
        if (tokenizer := _preprocessing(AutoTokenizer, source)) is not None:
            return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return None


def save_preprocessing(folder: Path, source: str) -> bool:
    """Save a model's or adapter's tokenizer or processor in a folder; False if it has none."""
    for loader in (AutoProcessor, AutoTokenizer):
        if (loaded := _preprocessing(loader, source)) is not None:
            loaded.save_pretrained(folder)
            return True
    return False


def _preprocessing(loader: Any, source: str) -> Any:
    """Tokenizer or processor of a model or adapter, or None."""
    try:
        loaded = loader.from_pretrained(source)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError):  # none, or none for this model
        return None
    # From a configuration alone, transformers creates a tokenizer with an empty vocabulary.
    has_words = not hasattr(loaded, "vocab_size") or loaded.vocab_size > len(loaded.all_special_tokens)
    return loaded if has_words else None


def sample_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Random inputs for a model: 4 sequences of 32 tokens, or 2 images; deterministic.

    Raises:
        ValueError: the model takes other inputs.

    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    size = getattr(config, "image_size", None)
    if model.main_input_name == "pixel_values" and isinstance(size, int):
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)}
    if model.main_input_name != "input_ids":
        raise ValueError(f"there are no sample inputs for {type(model).__name__}, which takes {model.main_input_name}")
    text = config.get_text_config()
    tokens = torch.randint(text.vocab_size, (4, 32), generator=generator)
    special = [text.pad_token_id, text.eos_token_id]
    for token in special:
        if isinstance(token, int):
            tokens[tokens == token] = (token + 1) % text.vocab_size
    if isinstance(text.eos_token_id, int):
        tokens[:, -1] = text.eos_token_id  # used by some heads
    if type(model).__name__.endswith("ForMultipleChoice"):
        tokens = tokens.unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    return inputs | {"decoder_input_ids": tokens} if config.is_encoder_decoder and not is_classifier else inputs
