"""What tasks, methods, suites and sources are called, for checks of settings that do without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checks import require_known
from ..files import read_json, require_regular
from ..untrusted import require_quick_patterns

# Task → what a column of its data holds, and is called unless `columns` says otherwise.
ROLES = {
    "classify": ("text", "label"),
    "regress": ("text", "label"),
    "multiple-choice": ("question", "choices", "label"),
    "causal-lm": ("messages", "conversations", "prompt", "completion", "instruction", "output", "text"),
    "image-classify": ("image", "label"),
}
# Task → what columns of its data may hold besides.
OPTIONAL_ROLES = {
    "classify": ("text_pair", "group"),
    "regress": ("text_pair", "group"),
    "multiple-choice": ("group", "prompts"),
    "causal-lm": ("group", "tools", "chat_template_kwargs", "input", "history", "system"),
    "image-classify": ("group",),
}
ANSWER_ROLES = ("label", "completion", "output")  # which data to predict may lack
TASKS_WITHOUT_HEAD = ("causal-lm",)
METHOD_NAMES = ("lr-lora", "lora", "dora", "adalora", "hira", "randlora", "loha", "vera", "full")
SUITE_NAMES = (
    *("offline-nlu", "offline-commonsense", "offline-vision", "capacity", "glue", "commonsense", "vision", "smoke"),
)
ABLATION_NAMES = ("sharing", "frozen", "num-basis", "interval", "gain", "rank", "targets")
PRESET_NAMES = ("roberta-base", "llama-3-8b", "vit-base")
EMBEDDED = "embedded:"  # before the name of a model or data that come with packages
# The ending of a file of data → its builder in datasets.
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def require_suite(name: str) -> None:
    """Raise an error unless this is the name of a suite or preset, or a YAML file that may hold a suite."""
    if not name.endswith((".yaml", ".yml")):
        require_known("suite", name, (*SUITE_NAMES, *PRESET_NAMES))
    elif not Path(name).is_file():
        raise FileNotFoundError(f"There is no configuration file {name}.")


def require_model_folder(name: str) -> None:
    """Check the folder that a model's name is that of, or can only be that of.

    Raises:
        FileNotFoundError: there is none, or no model in it.
        ValueError: a file in it would hang who reads it.

    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"The folder {name} holds an adapter, and no model: give its base model.")
        raise FileNotFoundError(f"The folder {name} holds no model: there is no config.json in it.")
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise FileNotFoundError(f"There is no model folder {name}.")
    require_regular(path)
    if (adapter := path / "adapter_config.json").is_file():  # transformers puts it on the model
        config = read_json(adapter, dict[str, Any], "Remove it, to take the model alone.")
        require_quick_patterns(config, f"in {adapter}")


def require_data_path(name: str) -> None:
    """Raise a FileNotFoundError if the name of data can only be that of a file or folder, and there is none."""
    path = Path(name)
    if (path.suffix in BUILDERS or path.is_absolute() or name.startswith(".")) and not path.exists():
        raise FileNotFoundError(f"There is no file or folder {name} to read data from.")
