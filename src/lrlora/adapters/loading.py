"""A saved adapter on its base model: loaded through PEFT, checked against it, and compared with its export."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import peft
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..files import readable
from ..lora.config import require_reproducible_start
from ..lora.factors import PLAIN
from ..sources import ADAPTER_EXPECTED, require_present
from .peft_folder import AdapterSource, SavedAdapter, require_all_weights
from .update import Update, Updates

_UNLIKELY = re.compile(r"(embed\w*|wte|wpe|shared|conv\w*)$", re.IGNORECASE)
# Names in transformers of the layer, and in some models its submodule, that outputs the classes.
_HEADS = re.compile(r"\.(classifier|score|classification_head|logits_proj)(\.out_proj)?\.weight$")


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
    name, config, base = saved.name, saved.config, saved.base_model
    require_reproducible_start(config, name)
    if not base:
        raise FileNotFoundError(f"The adapter {name} does not name its base model. Pass it: --base MODEL, or base=.")
    loader = f"Auto{MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel).__name__}"
    with readable(name, ADAPTER_EXPECTED):
        options |= _classes(saved)
        try:
            with warnings.catch_warnings(), saved.as_peft_reads_it() as folder:
                # PEFT looks for a tokenizer with the adapter, and warns if it cannot tell whether there is one.
                warnings.filterwarnings("ignore", message="Unable to fetch remote file")
                if getattr(config, "target_parameters", None):  # PEFT compares patterns with modules only
                    warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
                require_present(base)
                model: Any = getattr(peft, loader).from_pretrained(folder, **options)
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
        tokenizer = load_processor(name, base)
        if tokenizer is not None:
            model.config.pad_token_id = (
                tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            )
    return model


def _classes(saved: SavedAdapter) -> dict[str, Any]:
    """Options that give the base model the classes of the adapter: their names, or their number in a saved head."""
    options: dict[str, Any] = {}
    if labels := saved.class_names:
        options = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    elif saved.config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [tensor for key, tensor in saved.weights.items() if _HEADS.search(key)]
        options = {"num_labels": len(heads[-1])} if heads else {}
    # A saved head replaces the base model's.
    return options | ({"ignore_mismatched_sizes": True} if options and saved.config.modules_to_save else {})


def load_processor(*sources: str) -> Any:
    """Processor or tokenizer of the first model or adapter that has one; None if none has."""
    for source in sources:
        for loader in (AutoProcessor, AutoTokenizer):
            try:
                loaded: Any = loader.from_pretrained(source)
            except (
                OSError,
                ValueError,
                ImportError,
                AttributeError,
                KeyError,
                TypeError,
            ):  # none, or none for this model
                continue
            # From a configuration alone, transformers creates a tokenizer of special tokens; T5's has "▁" too.
            if not hasattr(loaded, "vocab_size") or loaded.vocab_size > len(loaded.all_special_tokens) + 1:
                return loaded
    return None


def check_layers(updates: Updates, *, by_name: bool = False) -> Updates:
    """Check that the modules of a saved adapter are linear layers of its base model, where its file does not say so.

    Reads only the configuration of the base model. Updates of other sources pass.

    Args:
        updates: updates of any source.
        by_name: check the names of the modules only, without a base model.

    Returns:
        The updates, now known to be of linear layers.

    Raises:
        FileNotFoundError: the base model is missing.
        ValueError: an adapted module is not linear or has another shape; or by its name, is probably not linear.

    """
    unknown = [update for update in updates if not update.layout.is_known]
    saved = updates.origin
    if not isinstance(saved, SavedAdapter) or not unknown:
        return updates
    layers = {} if by_name else _layers_of_base(saved)
    for update in unknown:
        if by_name and _UNLIKELY.search(update.module):
            raise ValueError(
                f"{update.module} does not look like a linear layer, the only type that can be exported as LoRA. "
                "Export without --no-check, or merge the adapter into the base model."
            )
        if (layer := layers.get(update.module)) is not None:  # not a task head
            _require_linear(update, layer, str(saved.base_model))
    linear_updates = [update if update.layout.is_known else replace(update, layout=PLAIN) for update in updates]
    return replace(updates, updates=linear_updates)


def _layers_of_base(saved: SavedAdapter) -> dict[str, nn.Module]:
    """Modules of the base model, without weights, by their paths with and without its head."""
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
    layers = dict(base.named_modules())
    return layers | {f"{base.base_model_prefix}.{path}": layer for path, layer in layers.items()}


def _require_linear(update: Update, layer: nn.Module, base: str) -> None:
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ValueError(
            f"Only linear layers can be exported as LoRA, but {update.module} is a {type(layer).__name__}. Merge the "
            "adapter into its base model instead."
        )
    weight: Any = layer.weight
    shape = tuple(weight.T.shape if isinstance(layer, Conv1D) else weight.shape)
    if shape != update.shape:
        raise ValueError(
            f"The base model {base} does not fit the adapter: {update.module} has shape {shape} in the base model, but "
            f"{update.shape} in the adapter."
        )


@torch.no_grad()
def output_difference(adapter: AdapterSource, exported: AdapterSource) -> float:
    """Share of an adapter's effect that its export loses, on random inputs in float32.

    ‖h − h′‖ / ‖h − h₀‖, with the last hidden states h of the original, h′ of the export and h₀ of the base model.

    Raises:
        FileNotFoundError: the base model is missing.
        ValueError: an adapter does not fit it, or no sample inputs exist for it.

    """
    original = load_adapted(adapter, dtype=torch.float32).eval()
    inputs = _sample_inputs(original.get_base_model())
    with original.disable_adapter():
        base = _last_hidden(original, inputs)
    hidden = _last_hidden(original, inputs)
    del original
    export = SavedAdapter.read(exported).on_base(SavedAdapter.read(adapter).base)
    difference = hidden - _last_hidden(load_adapted(export, dtype=torch.float32).eval(), inputs)
    effect = (hidden - base).norm().item()
    return difference.norm().item() / effect if effect > 0 else 0.0


def _last_hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Output of the model below its head, which may want other inputs."""
    return model.get_base_model().base_model(**inputs)[0]


def _sample_inputs(model: Any) -> dict[str, Tensor]:
    """Random inputs for a model: 4 sequences of 32 tokens, or 2 images; deterministic.

    Raises:
        ValueError: the model takes other inputs.

    """
    generator = torch.Generator().manual_seed(0)
    config, size = model.config, getattr(model.config, "image_size", None)
    if model.main_input_name == "pixel_values" and isinstance(size, int):
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)}
    if model.main_input_name != "input_ids":
        raise ValueError(f"there are no sample inputs for {type(model).__name__}, which takes {model.main_input_name}")
    tokens = torch.randint(config.get_text_config().vocab_size, (4, 32), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs | {"decoder_input_ids": tokens} if config.is_encoder_decoder else inputs
