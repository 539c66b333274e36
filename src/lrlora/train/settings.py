"""Configuration of a training run, from Python, YAML or the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..checks import check_truncation, require_known, require_type
from ..files import readable
from ..run_folder import RUN_EXPECTED, RUN_FILE, RunRecord, read_record
from ..sizes import parse_size

FROM_TRAIN = "train"  # value of `validation`: split training data even if a validation split exists
# Run setting → field of TrainingArguments.
ARGUMENTS = {
    "learning_rate": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
}

AUTO = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run. Values of None are derived from task, method and data, and printed.

    Every field is also a command-line option and a YAML key of the same name.

    Args:
        model: model on the hub, local folder, or embedded:NAME (see `lrlora inputs`).
        data: data set on the hub (NAME or NAME:CONFIGURATION), a CSV, TSV, JSON, JSONL or Parquet file, a folder of
            such files or one written by `save_to_disk`, or embedded:NAME.
        task: one of classify, regress, multiple-choice, causal-lm and image-classify.
        method: one of lr-lora, expansion, lora, dora, adalora, hira, randlora, loha, vera and full; auto is lora where
            a size is given, else lr-lora.
        output: folder for adapter, tokenizer, model card, metrics and rank history.
        columns: ROLE=NAME, the column that holds a role; default: the column of that name. Roles: text, text_pair and
            label for classify and regress; image and label for image-classify; question, choices (a list) and label
            (the index of the right choice) for multiple-choice, and prompts (a list) to replace the question; for
            causal-lm messages, or conversations (ShareGPT), or prompt and completion, or instruction, input and output
            (Alpaca), or text; group, for examples to keep on one side of the split into training and validation.
        delimiter: delimiter of a CSV file; default: a comma, in a TSV file a tab.
        encoding: encoding of a CSV file, such as latin-1; default: utf-8.
        skip_empty: skip examples whose text or label is missing or empty, instead of stopping.
        validation: validation data, like `data`, or "train" for a part of the training data; default: the validation
            split of the data, or a part of the training data.
        validation_share: share of the training data held out for validation, between 0 and 1.
        train_examples: maximum number of training examples, a fixed random sample; default: all.
        validation_examples: maximum number of validation examples, a fixed random sample; default: all.
        chat_template: template for prompts and chats, for causal-lm: none for plain text, simple, a file FILE.jinja,
            or a name that TRL knows, such as qwen3; default: the model's own, or plain text.
        max_length: maximum number of tokens of an example; default: the 99th percentile, within the model's limit.
        rank: rank r of BA; default: 8.
        alpha: scaling parameter α: the update is scaled by α/r; default: r, and 4·r for expansion.
        targets: modules to adapt: names with commas between, a regular expression, or all-linear; default: all-linear.
        learning_rate: peak learning rate; default: 1e-3 for a model with a head, 5e-4 for a language model; for full
            fine-tuning 5e-5 and 2e-5.
        head_learning_rate: peak learning rate of a new head, which wants a higher one than an adapter; default: the
            same.
        epochs: number of passes over the data; default: 3.
        steps: number of optimizer steps, instead of epochs; default: by epochs.
        batch_size: examples per step and device; default: 16, and 8 for causal-lm.
        early_stopping: stop after this many evaluations without a better metric; default: never.
        start_from: finished run to continue from, as a new run with its own schedule; on the command line, settings
            that are not given are those of that run; default: a new adapter.
        loss: write lora/ as the smallest LoRA whose validation loss rises by at most this share; default: only print
            its size for 0.01.
        size: size of the LoRA (250000, 250k, 8MiB, or r4 for that of LoRA of rank 4): with the method lora, its ranks
            are learned in training; with others, lora/ is filled by importance to the loss; default: no limit.
        rank_every: steps between records of the learned ranks.
        seed: random seed of head, factors, data order and dropout.
        adapter: NAME=VALUE, field of the method's PEFT configuration; default: PEFT's own, but all linear layers and
            α = r.
        training: NAME=VALUE, field of transformers' TrainingArguments, or TRL's SFTConfig for causal-lm; default:
            theirs, but 6 % warm-up, at most 10 evaluations, and the best checkpoint kept.

    Raises:
        ValueError: a value is not one of the known ones, or out of range.

    """

    model: str
    data: str
    task: str
    method: str = AUTO
    output: str = "lrlora-run"
    columns: dict[str, str] = field(default_factory=dict)
    delimiter: str | None = None
    encoding: str | None = None
    skip_empty: bool = False
    validation: str | None = None
    validation_share: float = 0.1
    train_examples: int | None = None
    validation_examples: int | None = None
    chat_template: str | None = None
    max_length: int | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: str | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    early_stopping: int | None = None
    start_from: str | None = None
    loss: float | None = None
    size: str | None = None
    rank_every: int = 50
    seed: int = 0
    adapter: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from .methods import METHODS  # lazy, so that `lrlora train --help` does not import torch
        from .tasks import KINDS

        for name in ("adapter", "training", "columns"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must map names to values, got {getattr(self, name)!r}.")
        for name in ("model", "data", "output"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name or a path, got {getattr(self, name)!r}.")
        require_known("task", self.task, KINDS)
        kind = KINDS[self.task]
        if self.method == AUTO:
            object.__setattr__(self, "method", "lr-lora" if self.size is None else "lora")
        require_known("method", self.method, METHODS)
        for role in self.columns:
            require_known("key of columns", role, (*kind.roles, *kind.optional_roles))
        if not isinstance(self.validation_share, (int, float)) or not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share!r}.")
        for name in ("learning_rate", "head_learning_rate", "epochs", "alpha"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < float("inf")):
                raise ValueError(f"{name} must be a number > 0, got {value!r}.")
        if self.loss is not None or self.size is not None:
            if self.loss is not None and self.size is not None:
                raise ValueError("Pass --loss or --size, not both.")
            check_truncation(loss=self.loss, budget=None if self.size is None else 1)
            parse_size(self.size or "r1", "size")
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ValueError(f"delimiter must be a single character, got {self.delimiter!r}.")
        if self.head_learning_rate is not None and not kind.has_head:
            raise ValueError(
                f"head_learning_rate={self.head_learning_rate!r} applies to a new head, which {self.task} does not "
                "have. Remove it."
            )
        if self.max_length is not None and self.task == "image-classify":
            raise ValueError(f"max_length={self.max_length!r} applies to text, but the task is {self.task}. Remove it.")
        if self.chat_template is not None and self.task != "causal-lm":
            raise ValueError(
                f"chat_template={self.chat_template!r} applies to causal-lm, but the task is {self.task}. Remove it."
            )
        counts = ("max_length", "train_examples", "validation_examples", "rank", "steps", "batch_size")
        for name, least in (*((name, 1) for name in (*counts, "early_stopping", "rank_every")), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}.")
        for name, field_name in ARGUMENTS.items():
            if (value := getattr(self, name)) is not None:
                _require_one(name, value, field_name, self.training, "training")
        for name, other in _of_adapter(self.method).items():
            if (value := getattr(self, name)) is not None:
                if other is None:
                    raise ValueError(f"{name}={value!r} is not supported by the method {self.method}. Remove it.")
                _require_one(name, value, other, self.adapter, "adapter")

    @property
    def learns_ranks(self) -> bool:
        """Whether the adapter is cut while it trains."""
        return self.method == "lora" and self.size is not None

    @property
    def arguments(self) -> dict[str, Any]:
        """Given fields of TrainingArguments, under either name."""
        given = {field_name: getattr(self, name) for name, field_name in ARGUMENTS.items()}
        return self.training | {name: value for name, value in given.items() if value is not None}

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """Given fields of the PEFT configuration, under either name."""
        names = _of_adapter(self.method).items()
        given = {field_name: getattr(self, name) for name, field_name in names if field_name}
        return self.adapter | {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainConfig:
        """Create from plain values, as in a file.

        Raises:
            ValueError: a key is unknown or missing, or a value is invalid; the message names the nearest known key.

        """
        known = [f.name for f in fields(cls)]
        if not set(content) <= set(known):
            from .unknown_settings import require_settings

            require_settings(content, "run", known, str(content.get("task")), str(content.get("method", cls.method)))
        missing = [name for name in ("model", "data", "task") if not content.get(name)]
        if missing:
            raise ValueError(
                f"Missing required settings: {', '.join(missing)}. Pass {', '.join(f'--{name}' for name in missing)}, "
                "or add them to the YAML file."
            )
        size = content.get("size")
        config = cls(**{**content, "size": str(size)} if type(size) is int else content)
        require_type(config, cls, "configuration")
        return config

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _require_one(name: str, value: Any, other: str, fields: Mapping[str, Any], place: str) -> None:
    if other in fields:
        raise ValueError(
            f"{name}={value!r} and {other}={fields[other]!r} under {place} are the same setting. Remove one of them."
        )


def _of_adapter(method: str | None) -> dict[str, str | None]:
    """Run setting → field of the PEFT configuration; None if the method has none."""
    from .methods import METHODS

    known = METHODS.get(str(method))
    alpha = "lora_alpha" if known is None or method == "adalora" else known.alpha
    return {"rank": "target_r" if method == "adalora" else "r", "alpha": alpha, "targets": "target_modules"}


def with_short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename settings from a file or the command line to the run's names.

    A setting then overrides another under either name.
    """
    short = dict(settings)
    places = {name: ("training", other) for name, other in ARGUMENTS.items()}
    places |= {name: ("adapter", other) for name, other in _of_adapter(settings.get("method")).items() if other}
    for name, (place, other) in places.items():
        is_there = isinstance(short.get(place), Mapping) and other in short[place]
        if name == "targets" and is_there and not isinstance(short[place][other], str):
            continue  # a list, as in PEFT
        if short.get(name) is None and is_there:
            short[name] = short[place][other]
            short[place] = {key: value for key, value in short[place].items() if key != other}
    return short


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not YAML, or not a mapping.

    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain keys and values, such as `task: classify`.")
    return content


def parse_assignments(assignments: Iterable[str], option: str) -> dict[str, Any]:
    """`name=value` → {name: value}, the value parsed as YAML: numbers, true, lists.

    Raises:
        ValueError: there is no `=`.

    """
    return {name: _parse(value, option) for name, value in parse_pairs(assignments, option).items()}


def parse_pairs(assignments: Iterable[str], option: str) -> dict[str, str]:
    """`name=value` → {name: value}, as text.

    Raises:
        ValueError: there is no `=`.

    """
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} must be name=value, got {assignment!r}.")
        values[name] = value
    return values


# Type, pattern and first characters, as in YAML 1.2.
_YAML_VALUES = (
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$", "-+0123456789"),
    (
        "float",
        r"[-+]?(\d[\d_]*\.\d*|\.\d+)$|[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
        "-+.0123456789",
    ),
)


def _parse(text: str, where: str) -> Any:
    """Parse YAML, with 1e-4 as a number and `no` as a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, *arguments: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # nested aliases expand to gigabytes
                raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not supported")
            return super().compose_node(*arguments)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise yaml.YAMLError(f"the key {twice[0]} occurs twice")
            return super().construct_mapping(node, deep)

    # YAML 1.1 reads no, off, yes and on as booleans, 1:30 as 90, 010 as 8, and dates.
    Loader.yaml_implicit_resolvers = {}
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items():
        for tag, pattern in known:
            if tag.rpartition(":")[2] in ("null", "merge"):
                Loader.yaml_implicit_resolvers.setdefault(first, []).append((tag, pattern))
    for tag, pattern, first in _YAML_VALUES:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply.") from None


def read_run(folder: Path) -> tuple[TrainConfig, RunRecord]:
    """Configuration of the run in a folder, with that folder as `output`, and its record.

    Raises:
        FileNotFoundError: the folder has no run.
        ValueError: the record is damaged.

    """
    record = read_record(folder)
    with readable(folder / RUN_FILE, RUN_EXPECTED):
        return TrainConfig.from_dict(record.config | {"output": str(folder)}), record
