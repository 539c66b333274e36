"""Model cards and metadata that accompany adapter weights: base model, class names, loading code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache
from transformers.utils import IMAGE_PROCESSOR_NAME
from yaml import YAMLError

from ..checks import in_markdown
from ..files import is_hub_name, parse_json, readable
from ..run_folder import CHAT
from .peft_folder import SavedAdapter

MODEL_CONFIG = "config.json"  # saved with an adapter: the configuration of its model, with the class names
LORA_FOLDER = "lora"  # subfolder of a run: its update as a plain LoRA
MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# Task → the hub's name.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "image-classify": "image-classification",
    "multiple-choice": "multiple-choice",
}
# Task types of a run that PEFT does not have.
_MODELS_OF_TASKS = {
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classify": "AutoModelForImageClassification",
}
ASKING = """## Usage

The model was trained on chats. Format prompts with the chat template of the tokenizer in this folder.

```python
chat = [{"role": "user", "content": "…"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def base_on_hub(saved: SavedAdapter) -> str | None:
    """Hub name of the base model; None if only a local folder is known."""
    record = saved.record
    if record is not None and record.base_model is not None:
        return record.base_model
    name = saved.base_model
    return name if name and not Path(name).is_absolute() and not Path(name).exists() else None


def class_names(saved: SavedAdapter) -> list[str]:
    """Class names of a classifier, in output order; empty if unnamed."""
    record = saved.record
    if record is not None:
        return record.labels
    path = Path(saved.name) / MODEL_CONFIG
    if not path.is_file():
        return []
    with readable(path, "Remove it to continue without the class names."):
        names = parse_json(path).get("id2label", {})
        return [str(names[key]) for key in sorted(names, key=int)]


def header(library: str, tags: list[str], saved: SavedAdapter | None = None, results: Sequence[EvalResult] = ()) -> str:
    """Front matter of a model card, as the hub reads it.

    Args:
        library: peft or transformers.
        tags: tags for search.
        saved: adapter, for the task and the base model, which is named only if it has a public name.
        results: metrics.

    """
    base = None if saved is None else base_on_hub(saved)
    of_base = [f"base_model:adapter:{base}"] if base and library == "peft" else []
    data = ModelCardData(
        license=None if saved is None else _license_of_base(saved),
        datasets=[saved.record.dataset] if saved and saved.record and saved.record.dataset else None,
        base_model=base,
        library_name=library,
        pipeline_tag=None if saved is None else _pipeline(saved),
        tags=[*tags, *of_base] or None,
        model_name=Path(saved.name).resolve().name if saved and results else None,
        eval_results=list(results) or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _license_of_base(saved: SavedAdapter) -> str | None:
    """License in the base model's card, if the card is on this machine."""
    name = saved.base_model or ""
    card = Path(name) / "README.md"
    if not card.is_file() and is_hub_name(name):
        cached = try_to_load_from_cache(name, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    try:
        found = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (ValueError, YAMLError):  # not the hub's format
        return None
    return found if isinstance(found, str) else None


def _pipeline(saved: SavedAdapter) -> str | None:
    """The hub's name of the adapter's task."""
    record = saved.record
    task = None if record is None else _PIPELINES.get(record.config["task"])
    return task or _PIPELINES.get(str(saved.config.task_type))


def loading(saved: SavedAdapter, *, needs_lrlora: bool) -> str:
    """Loading instructions, with PEFT alone or lrlora, and the class names if any."""
    classes, record, kind = class_names(saved), saved.record, saved.config.task_type
    model = MODELS.get(kind, "AutoModel")
    if kind is None and record is not None:
        model = _MODELS_OF_TASKS.get(record.config["task"], model)
    is_image = (Path(saved.name) / IMAGE_PROCESSOR_NAME).is_file()
    name, processor = ("processor", "AutoImageProcessor") if is_image else ("tokenizer", "AutoTokenizer")
    # The head of the base model may be for other classes.
    of_classes = ", config=AutoConfig.from_pretrained(folder), ignore_mismatched_sizes=True" if classes else ""
    lines = [
        *(["import lrlora  # registers the method; without it, PEFT raises KeyError: 'LRLORA'"] * needs_lrlora),
        "from peft import PeftModel",
        f"from transformers import {'AutoConfig, ' if classes else ''}{model}, {processor}",
        "",
        'folder = "this folder or hub name"',
        f"base = {model}.from_pretrained({json.dumps(base_on_hub(saved) or 'the base model')}{of_classes})",
        "model = PeftModel.from_pretrained(base, folder)",
        f"{name} = {processor}.from_pretrained({_processor_source(saved)})",
    ]
    install = []
    if needs_lrlora:
        install.append("The method is not part of PEFT: install lrlora (`pip install .` in a clone of it).")
        if (Path(saved.name) / LORA_FOLDER).is_dir():
            install.append(
                f"The folder `{LORA_FOLDER}` contains the update as a plain LoRA, which PEFT and servers load without "
                "lrlora; its card states how much of the energy it keeps."
            )
    parts = ["## Loading", *install, "\n".join(["```python", *lines, "```"])]
    return "\n\n".join(parts) + f"\n{_of_classes(classes)}"


def _processor_source(saved: SavedAdapter) -> str:
    """Where a tokenizer or processor is loaded from: the adapter's folder, or the base model."""
    files = ("tokenizer_config.json", "processor_config.json", IMAGE_PROCESSOR_NAME)
    has_own = any((Path(saved.name) / file).is_file() for file in files) or not Path(saved.name).is_dir()
    return "folder" if has_own else "base.name_or_path"


def _of_classes(classes: list[str]) -> str:
    names = ", ".join(map(in_markdown, classes))
    return f"\nClasses, in output order: {names}.\n" if classes else ""


def is_asked_in_chats(saved: SavedAdapter) -> bool:
    """Whether the adapter was trained on chats."""
    record = saved.record
    return record is not None and record.rendering == CHAT


def merged_card(saved: SavedAdapter) -> str:
    """Model card of a merged model."""
    base, classes = base_on_hub(saved), class_names(saved)
    parts = [
        f"{header('transformers', [], saved)}# {in_markdown(base or 'A model')}, fine-tuned",
        "A full model: its base model with the update of an adapter merged into the weights by lrlora "
        "([LR-LoRA](https://arxiv.org/abs/2606.04325)). It loads with transformers, without lrlora.",
        *([_of_classes(classes).strip()] if classes else []),
        *([ASKING] if is_asked_in_chats(saved) else []),
    ]
    return "\n\n".join(parts) + "\n"
