"""Model cards, of a run and of an export, as the hub reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache
from transformers.utils import IMAGE_PROCESSOR_NAME
from yaml import YAMLError

from ..checks import in_markdown
from ..run_folder import CHAT
from ..sources import is_hub_name
from .checkpoint import MODELS
from .peft_folder import SavedAdapter

LORA_FOLDER = "lora"  # subfolder of a run: its update as a plain LoRA
# PEFT's task type → the hub's name.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_PROCESSOR_FILES = ("tokenizer_config.json", "processor_config.json", IMAGE_PROCESSOR_NAME)
_ASKING = """## Usage

The model was trained on chats. Format prompts with the chat template of the tokenizer in this folder.

```python
chat = [{"role": "user", "content": "…"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def adapter_card(
    saved: SavedAdapter,
    tags: list[str],
    sections: Sequence[str],
    *,
    needs_lrlora: bool = False,
    results: Sequence[EvalResult] = (),
) -> str:
    """Model card of an adapter.

    Args:
        saved: the adapter, or the one that it was made from, for the base model, task, loading code and classes.
        tags: tags for search.
        sections: paragraphs of the card.
        needs_lrlora: whether loading needs lrlora.
        results: metrics.

    """
    loading = _loading(saved, needs_lrlora=needs_lrlora)
    return "\n\n".join([_header(tags, saved, results), *sections, *loading]) + "\n"


def base_on_hub(saved: SavedAdapter) -> str | None:
    """Hub name of the base model; None if only a local folder is known."""
    if saved.record is not None and saved.record.base_model is not None:
        return saved.record.base_model
    name = saved.base_model
    return name if name and not Path(name).is_absolute() and not Path(name).exists() else None


def _header(tags: list[str], saved: SavedAdapter, results: Sequence[EvalResult]) -> str:
    """Front matter; the base model is named only if it has a public name."""
    base = base_on_hub(saved)
    base_tags = [f"base_model:adapter:{base}"] if base else []
    data = ModelCardData(
        license=_license_of_base(saved),
        datasets=[saved.record.dataset] if saved.record and saved.record.dataset else None,
        base_model=base,
        library_name="peft",
        pipeline_tag=_pipeline(saved),
        tags=[*tags, *base_tags] or None,
        model_name=Path(saved.name).resolve().name if results else None,
        eval_results=list(results) or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _license_of_base(saved: SavedAdapter) -> str | None:
    """License in the base model's card, if the card is on this machine."""
    name = saved.base_model or ""
    card = Path(name) / "README.md"
    if not card.is_file() and is_hub_name(name):
        cached = try_to_load_from_cache(name, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    try:
        license_name = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (ValueError, YAMLError):  # not the hub's format
        return None
    return license_name if isinstance(license_name, str) else None


def _pipeline(saved: SavedAdapter) -> str | None:
    """The hub's name of the adapter's task."""
    stored = None if saved.record is None else saved.record.pipeline
    return stored or _PIPELINES.get(str(saved.config.task_type))


def _loading(saved: SavedAdapter, *, needs_lrlora: bool) -> list[str]:
    """Loading instructions, with PEFT alone or lrlora; class names, if any; and how to chat."""
    stored = None if saved.record is None else saved.record.model_class
    model = stored or MODELS.get(saved.config.task_type, "AutoModel")
    is_image = (Path(saved.name) / IMAGE_PROCESSOR_NAME).is_file()
    name, processor = ("processor", "AutoImageProcessor") if is_image else ("tokenizer", "AutoTokenizer")
    has_processor = (
        any((Path(saved.name) / file).is_file() for file in _PROCESSOR_FILES) or not Path(saved.name).is_dir()
    )
    # The head of the base model may be for other classes.
    class_options = (
        ", config=AutoConfig.from_pretrained(folder), ignore_mismatched_sizes=True" if saved.class_names else ""
    )
    lines = [
        *(["import lrlora  # registers the method; without it, PEFT raises KeyError: 'LRLORA'"] * needs_lrlora),
        "from peft import PeftModel",
        f"from transformers import {'AutoConfig, ' if class_options else ''}{model}, {processor}",
        "",
        'folder = "this folder or hub name"',
        f"base = {model}.from_pretrained({json.dumps(base_on_hub(saved) or 'the base model')}{class_options})",
        "model = PeftModel.from_pretrained(base, folder)",
        f"{name} = {processor}.from_pretrained({'folder' if has_processor else 'base.name_or_path'})",
    ]
    install = []
    if needs_lrlora:
        install.append("The method is not part of PEFT: install lrlora (`pip install .` in a clone of it).")
        if (Path(saved.name) / LORA_FOLDER).is_dir():
            install.append(
                f"The folder `{LORA_FOLDER}` contains the update as a plain LoRA, which PEFT and servers load without "
                "lrlora; its card states how much of the energy it keeps."
            )
    names = ", ".join(map(in_markdown, saved.class_names))
    usage = [f"Classes, in output order: {names}."] if names else []
    if saved.record is not None and saved.record.rendering == CHAT:
        usage.append(_ASKING)
    return ["## Loading", *install, "\n".join(["```python", *lines, "```"]), *usage]
