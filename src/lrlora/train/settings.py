"""Configuration of a training run, from Python, YAML or the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

from ..checks import DEFAULT_KEEP, require_known, require_type
from ..files import readable
from ..learned.cut import CUT_AT, KEEP_AT, WIDE_RANK, Cut
from ..run_folder import RUN_EXPECTED, RUN_FILE, RunRecord, read_record
from .methods import LEARNED, METHODS

FROM_TRAIN = "train"  # value of `validation`: split training data even if a validation split exists
# Run setting → field of TrainingArguments.
ARGUMENTS = {
    "learning_rate": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "seed": "seed",
}

# Other libraries' names for run settings.
_ALIASES = {name: setting for setting, name in ARGUMENTS.items()} | {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "use_dora": "method dora",
    "use_rslora": "adapter use_rslora=true",
}

AUTO = "auto"
TOPICS = _DATA, _ADAPTER, _SIZE, _TRAINING, _OUTPUT = "Model and data", "Adapter", "Size", "Training", "Output"


def _about(topic: str, text: str) -> dict[str, str]:
    return {"topic": topic, "help": text}


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run: `lrlora train --help` describes every setting.

    Each is also a command-line option and a YAML key of the same name. Its metadata are its `topic` and its `help`.

    Raises:
        ValueError: a value is not one of the known ones, or out of range.

    """

    model: str = field(
        metadata=_about(_DATA, "Model on the hub, local folder, or embedded:NAME (docs/train.md lists them)."),
    )
    data: str = field(
        metadata=_about(
            _DATA,
            "Data set on the hub (NAME or NAME:CONFIGURATION), a CSV, TSV, JSON, JSONL or Parquet file, a "
            "folder of such files or one written by `save_to_disk`, or embedded:NAME.",
        )
    )
    task: str = field(metadata=_about(_DATA, "Task: classify, regress, multiple-choice, causal-lm or image-classify."))
    method: str = field(
        default=AUTO,
        metadata=_about(
            _ADAPTER,
            "Method: fitted (LoRA whose ranks are fitted), lora, lr-lora (the paper's), expansion or "
            "dora; auto is learned, but lora if `start_from` is given without `size`.",
        ),
    )
    output: str = field(
        default="lrlora-run",
        metadata=_about(_OUTPUT, "Folder for adapter, tokenizer, model card, metrics and rank history."),
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata=_about(
            _DATA,
            "ROLE=NAME, the column that holds a role; default: the column of that name. Roles: text, "
            "text_pair and label for classify and regress; image and label for image-classify; question, "
            "choices (a list) and label (the index of the right choice) for multiple-choice, and prompts (a "
            "list) to replace the question; for causal-lm messages, or prompt and completion, or text, and for "
            "chats tools and chat_template_kwargs; group, for examples to keep on one side of the split into "
            "training and validation.",
        ),
    )
    delimiter: str | None = field(
        default=None, metadata=_about(_DATA, "Delimiter of a CSV file; default: a comma, in a TSV file a tab.")
    )
    encoding: str | None = field(
        default=None, metadata=_about(_DATA, "Encoding of a CSV file, such as latin-1; default: utf-8.")
    )
    skip_empty: bool = field(
        default=False,
        metadata=_about(_DATA, "Skip examples whose text or label is missing or empty, instead of stopping."),
    )
    validation: str | None = field(
        default=None,
        metadata=_about(
            _DATA,
            'Validation data, like `data`, or "train" for a part of the training data; default: the '
            "validation split of the data, or a part of the training data.",
        ),
    )
    validation_share: float = field(
        default=0.1, metadata=_about(_DATA, "Share of the training data held out for validation, between 0 and 1.")
    )
    train_examples: int | None = field(
        default=None,
        metadata=_about(_DATA, "Maximum number of training examples, a fixed random sample; default: all."),
    )
    validation_examples: int | None = field(
        default=None,
        metadata=_about(_DATA, "Maximum number of validation examples, a fixed random sample; default: all."),
    )
    chat_template: str | None = field(
        default=None,
        metadata=_about(
            _DATA,
            "Template for prompts and chats, for causal-lm: none for plain text, simple, a file FILE.jinja, "
            "or a name that TRL knows, such as qwen3; default: the model's own, or plain text.",
        ),
    )
    max_length: int | None = field(
        default=None,
        metadata=_about(
            _DATA, "Maximum number of tokens of an example; default: the 99th percentile, within the model's limit."
        ),
    )
    rank: int | None = field(
        default=None,
        metadata=_about(
            _ADAPTER,
            "Rank r of BA; default: 8. Where ranks are fitted, the rank before the cut; default: 16, and 4 "
            "times that of a size in ranks.",
        ),
    )
    alpha: float | None = field(
        default=None,
        metadata=_about(
            _ADAPTER,
            "Scaling parameter α: the update is scaled by α/r; default: r, and 4·r for expansion. With a size "
            "in ranks and no rank, it is that of the size; before the cut, α/r is the same.",
        ),
    )
    targets: str | None = field(
        default=None,
        metadata=_about(
            _ADAPTER,
            "Modules to adapt: names with commas between, a regular expression, or all-linear; default: all-linear.",
        ),
    )
    adapter: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about(
            _ADAPTER,
            "NAME=VALUE, field of the method's PEFT configuration; default: PEFT's own, but all linear layers "
            "and α = r.",
        ),
    )
    start_from: str | None = field(
        default=None,
        metadata=_about(
            _ADAPTER,
            "Finished run to continue from, as a new run with its own schedule; on the command line, settings "
            "that are not given are those of that run; default: a new adapter.",
        ),
    )
    size: str | None = field(
        default=None,
        metadata=_about(
            _SIZE,
            "Size of the LoRA (250000, 250k, 8MiB, or r4 for that of LoRA of rank 4): with the method lora, "
            "its ranks are fitted in training; with others, lora/ is filled by importance to the loss; "
            "default: no limit.",
        ),
    )
    keep: float | None = field(
        default=None,
        metadata=_about(
            _SIZE,
            "Share of the gain on validation data that the adapter keeps when it is cut while training; with "
            "another method, lora/ is written after training as the smallest LoRA that keeps it; default: "
            "0.99 for fitted ranks without a size; else report the size for 0.99, and write nothing.",
        ),
    )
    cut_at: float | None = field(
        default=None,
        metadata=_about(
            _SIZE,
            "Share of the steps after which ranks are fitted, in (0, 1): to the size, or to the share `keep` "
            "of the gain so far, measured on validation data; default: 0.3 for a size, 0.6 for a share.",
        ),
    )
    cut_rate: float | None = field(
        default=None,
        metadata=_about(
            _SIZE, "Factor of the adapter's learning rate after this cut; default: (parameters before / after it)^½."
        ),
    )
    learning_rate: float | None = field(
        default=None,
        metadata=_about(
            _TRAINING,
            "Peak learning rate; default: 1e-3 for a model with a head, 5e-4 for a language model; for full "
            "fine-tuning 5e-5 and 2e-5.",
        ),
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata=_about(
            _TRAINING,
            "Peak learning rate of the head; default: 16 times that of the adapter for a new head beside one, 8 times "
            "if it has several layers, else the same.",
        ),
    )
    find_rate: bool = field(
        default=False,
        metadata=_about(
            _TRAINING, "Find the learning rate before training, by four or five short trainings of 25 steps."
        ),
    )
    epochs: float | None = field(
        default=None, metadata=_about(_TRAINING, "Number of passes over the data; default: 3.")
    )
    steps: int | None = field(
        default=None, metadata=_about(_TRAINING, "Number of optimizer steps, instead of epochs; default: by epochs.")
    )
    batch_size: int | None = field(
        default=None, metadata=_about(_TRAINING, "Examples per step and device; default: 16, and 8 for causal-lm.")
    )
    early_stopping: int | None = field(
        default=None,
        metadata=_about(
            _TRAINING,
            "Stop after this many evaluations without a better metric, or an equal one at a lower loss; where "
            "ranks are fitted, evaluations count from the cut; default: never.",
        ),
    )
    seed: int = field(default=0, metadata=_about(_TRAINING, "Random seed of head, factors, data order and dropout."))
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about(
            _TRAINING,
            "NAME=VALUE, field of transformers' TrainingArguments, or TRL's SFTConfig for causal-lm; default: "
            "theirs, but 6 % warm-up, at most 10 evaluations, and the best checkpoint kept.",
        ),
    )
    rank_every: int = field(default=50, metadata=_about(_OUTPUT, "Steps between records of the ranks."))

    def __post_init__(self) -> None:
        from .tasks import TASKS  # lazy, so that `lrlora train --help` does not import torch

        for name, hint in get_type_hints(TrainConfig).items():
            require_type(getattr(self, name), hint, name)
        require_known("task", self.task, TASKS)
        task = TASKS[self.task]
        # A frozen dataclass resolves a default only by `object.__setattr__`.
        if self.method in (AUTO, LEARNED):
            if self.size is None and (self.method == LEARNED or self.start_from is None):
                object.__setattr__(self, "cut_at", KEEP_AT if self.cut_at is None else self.cut_at)
            object.__setattr__(self, "method", "lora")
        require_known("method", self.method, (LEARNED, *METHODS))
        for role in self.columns:
            require_known("key of columns", role, (*task.roles, *task.optional_roles))
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share!r}.")
        for name in ("learning_rate", "head_learning_rate", "epochs", "alpha", "cut_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number > 0, got {value!r}.")
        rates = {"learning_rate": self.arguments.get("learning_rate"), "head_learning_rate": self.head_learning_rate}
        for name, value in rates.items():
            if self.find_rate and value is not None:
                raise ValueError(f"{name}={value!r} is given, and find_rate would find it. Remove one of them.")
        if self.keep is not None and self.size is not None:
            raise ValueError("Pass --keep or --size, not both.")
        if self.cut_at is not None and not 0 < self.cut_at < 1:
            raise ValueError(
                f"cut_at must be between 0 and 1, got {self.cut_at!r}. For a cut after training, remove it."
            )
        if not self.learns_ranks and (self.cut_at, self.cut_rate) != (None, None):
            raise ValueError("cut_at and cut_rate are of fitted ranks: pass size or keep, with the method learned.")
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ValueError(f"delimiter must be a single character, got {self.delimiter!r}.")
        for name, applies, subject in (
            ("head_learning_rate", task.has_head, "a new head"),
            ("max_length", task.reads_text, "text"),
            ("chat_template", task.generates, "causal-lm"),
        ):
            if (value := getattr(self, name)) is not None and not applies:
                raise ValueError(f"{name}={value!r} applies to {subject}, but the task is {self.task}. Remove it.")
        if self.early_stopping is not None and self.arguments.get("eval_strategy") == "no":
            raise ValueError("early_stopping needs evaluations, which eval_strategy=no turns off. Remove one of them.")
        counts = ("max_length", "train_examples", "validation_examples", "rank", "steps", "batch_size")
        for name, minimum in (*((name, 1) for name in (*counts, "early_stopping", "rank_every")), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be an integer ≥ {minimum}, got {value!r}.")
        for name, field_name in ARGUMENTS.items():
            if (value := getattr(self, name)) is not None:
                _require_one(name, value, field_name, self.training, "training")
        for name, adapter_field in _adapter_names(self.method).items():
            if (value := getattr(self, name)) is not None:
                if adapter_field is None:
                    raise ValueError(f"{name}={value!r} is not supported by the method {self.method}. Remove it.")
                _require_one(name, value, adapter_field, self.adapter, "adapter")

    @property
    def cut(self) -> Cut | None:
        """Cut of the adapter while it trains, or of lora/ after the training; None without one."""
        learns = self.method == "lora" and (self.size is not None or self.cut_at is not None)
        if not learns and self.size is None and self.keep is None:
            return None
        keep = None if self.size is not None else DEFAULT_KEEP if self.keep is None else self.keep
        if not learns:
            return Cut.parse(self.size, keep, at=1.0)
        return Cut.parse(self.size, keep, at=CUT_AT if self.cut_at is None else self.cut_at, rate=self.cut_rate)

    @property
    def learns_ranks(self) -> bool:
        """Whether the adapter is cut while it trains."""
        return self.cut is not None and not self.cut.is_at_end

    @property
    def is_default_cut(self) -> bool:
        """Whether the adapter is cut while it trains, to a share that was not asked for."""
        return self.learns_ranks and self.size is None and self.keep is None

    @property
    def filled_by(self) -> str | None:
        """Option that fills lora/ by loss after training; None without one."""
        if self.cut is None or self.learns_ranks:
            return None
        return "--keep" if self.size is None else "--size"

    @property
    def arguments(self) -> dict[str, Any]:
        """Fields of TrainingArguments that were set, directly or under `training`."""
        values = {field_name: getattr(self, name) for name, field_name in ARGUMENTS.items()}
        return self.training | {name: value for name, value in values.items() if value is not None}

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """Fields of the PEFT configuration that were set, directly or under `adapter`."""
        names = _adapter_names(self.method).items()
        values = {field_name: getattr(self, name) for name, field_name in names if field_name}
        return self.adapter | {name: value for name, value in values.items() if value is not None}

    @property
    def wide_fields(self) -> dict[str, Any]:
        """`adapter_fields` with the rank before the cut, and the same scaling, where ranks are fitted."""
        adapter = self.adapter_fields
        if not self.learns_ranks or "r" in adapter:
            return adapter
        assert self.cut is not None
        if (size := self.cut.size) is None:
            return _at_rank(adapter, WIDE_RANK, WIDE_RANK)
        return _at_rank(adapter, size.wide_rank, size.number if size.unit == "ranks" else size.wide_rank)

    def fields_at(self, rank: int) -> dict[str, Any]:
        """`adapter_fields` but the rank, with the same scaling at this rank."""
        adapter = self.adapter_fields
        return {name: value for name, value in _at_rank(adapter, rank, adapter.get("r", rank)).items() if name != "r"}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainConfig:
        """Create from plain values, as in a file.

        Raises:
            ValueError: a key is unknown or missing, or a value is invalid; the message names the nearest known key.

        """
        names = [f.name for f in fields(cls)]
        if not set(content) <= set(names):
            require_settings(content, "run", str(content.get("task")), str(content.get("method", cls.method)))
        missing = [name for name in ("model", "data", "task") if not content.get(name)]
        if missing:
            raise ValueError(
                f"Missing required settings: {', '.join(missing)}. Pass {', '.join(f'--{name}' for name in missing)}, "
                "or add them to the YAML file."
            )
        size = content.get("size")
        return cls(**{**content, "size": str(size)} if type(size) is int else content)


def _at_rank(adapter: Mapping[str, Any], rank: int, old_rank: float) -> dict[str, Any]:
    """Fields of a LoRA at another rank than before, with the same scaling."""
    fields = {**adapter, "r": rank}
    if "lora_alpha" in adapter:
        ratio = rank / old_rank
        fields["lora_alpha"] = adapter["lora_alpha"] * (math.sqrt(ratio) if adapter.get("use_rslora") else ratio)
    return fields


def _require_one(name: str, value: Any, field_name: str, values: Mapping[str, Any], place: str) -> None:
    if field_name in values:
        raise ValueError(
            f"{name}={value!r} and {field_name}={values[field_name]!r} under {place} are the same setting. "
            "Remove one of them."
        )


def _adapter_names(method: str | None) -> dict[str, str | None]:
    """Run setting → field of the PEFT configuration; None if the method has none."""
    peft_method = METHODS.get(str(method), METHODS["lora"])
    return {"rank": peft_method.rank, "alpha": peft_method.alpha, "targets": "target_modules"}


def with_short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename settings from a file or the command line to the run's names.

    Later settings then override earlier ones under either name.
    """
    short = dict(settings)
    places = {name: ("training", field_name) for name, field_name in ARGUMENTS.items()}
    places |= {
        name: ("adapter", field_name)
        for name, field_name in _adapter_names(settings.get("method")).items()
        if field_name
    }
    for name, (place, field_name) in places.items():
        is_set = isinstance(short.get(place), Mapping) and field_name in short[place]
        if name == "targets" and is_set and not isinstance(short[place][field_name], str):
            continue  # a list, as in PEFT
        if short.get(name) is None and is_set:
            short[name] = short[place][field_name]
            short[place] = {key: value for key, value in short[place].items() if key != field_name}
    return short


def read_run(folder: Path) -> tuple[TrainConfig, RunRecord]:
    """Configuration of the run in a folder, with that folder as `output`, and its record.

    Raises:
        FileNotFoundError: the folder has no run.
        ValueError: the record is damaged.

    """
    record = read_record(folder)
    with readable(folder / RUN_FILE, RUN_EXPECTED):
        return TrainConfig.from_dict(record.config | {"output": str(folder)}), record


def require_settings(names: Iterable[str], place: str, task: str, method: str) -> None:
    """Raise ValueError for an unknown setting, with its correct place or the nearest known name.

    Args:
        names: names of settings.
        place: "run", "training" or "adapter", where they were given.
        task: task, which determines the class of the Trainer's arguments.
        method: method, which determines the class of the adapter configuration.

    """
    from .adapter_config import fields_of
    from .tasks import TASKS, Task

    arguments = TASKS.get(task, Task()).arguments_class()
    adapter_class = METHODS[method if method in METHODS else "lora"].config
    choices = {
        "run": [setting.name for setting in fields(TrainConfig)],
        "training": list(arguments.__dataclass_fields__),
        "adapter": fields_of(adapter_class),
    }
    for name in names:
        if place == "adapter" and name not in choices[place]:
            for other_method, peft_method in METHODS.items():
                if other_method != method and name in fields_of(peft_method.config):
                    raise ValueError(f"{name!r} is a field of the adapter of --method {other_method}.")
        if name not in choices[place]:
            raise _unknown_setting(name, place, choices)


_PLACES = {"run": "setting of a run", "training": "field of TrainingArguments", "adapter": "field of the adapter"}
_OPTIONS = {"run": "--{option}", "training": "--training {name}=VALUE", "adapter": "--adapter {name}=VALUE"}


def _unknown_setting(name: str, place: str, choices: dict[str, list[str]]) -> ValueError:
    alias = _ALIASES.get(name, "")
    matches = difflib.get_close_matches(str(name), dict.fromkeys(chain(*choices.values())), 1, 0.5)
    if (place == "run" and alias) or (place == "adapter" and alias.startswith("method")):
        hint = f"Use {alias}: --{alias}, or the key {alias.split()[0]}."
    elif matches:
        owner = next(candidate for candidate in (place, *choices) if matches[0] in choices[candidate])
        option = _OPTIONS[owner].format(name=matches[0], option=matches[0].replace("_", "-"))
        key = matches[0] if owner == "run" else owner
        hint = f"Did you mean {matches[0]}, a {_PLACES[owner]}? Set it with {option} or the key {key} of the YAML file."
    else:
        hint = f"Known: {', '.join(choices[place])}."
    return ValueError(f"Unknown {_PLACES[place]} {name!r}. {hint}")
