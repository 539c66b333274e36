"""A finished run, or an adapter from elsewhere, loaded on its base model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, BatchEncoding, GenerationConfig, Trainer

from ..adapters.loading import load_adapted
from ..adapters.peft_folder import SavedAdapter, require_all_weights
from ..checks import require_known
from ..files import readable
from ..learned.moments import is_multi_label
from ..progress_bar import progress_bar
from ..run_folder import ANSWERS, CHAT, METRICS_FILE, RUN_FILE, TEXT, RunRecord, read_reading, resume_hint
from ..tuner import cached_weights
from .chat import (
    as_trl_reads,
    format_of,
    holds_chats,
    prompt_of,
    render_chat,
    rendering_of,
)
from .data import load_examples
from .methods import METHODS
from .models import (
    load_model,
    make_trainer,
    max_positions,
    max_tokens,
    model_source,
    require_model_folder,
    training_arguments,
)
from .progress import Announce
from .settings import TrainConfig, read_run
from .tasks import TASKS, Task, task_for, task_stored

# Trainer arguments of a run that inference takes: those of the loss and its tokens, of precision, and of memory. Others
# may change which examples are read, and in which order.
_OF_INFERENCE = (
    *("label_smoothing_factor", "completion_only_loss", "loss_type", "router_aux_loss_coef"),
    *("eos_token", "pad_token", "max_length", "truncation_mode", "dataset_kwargs"),
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "use_cpu", "eval_accumulation_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "dataloader_num_workers", "dataset_num_proc"),
)


_NEW_TOKENS = 256  # default maximum for an adapter from elsewhere
# Fields of GenerationConfig that only matter for sampling, which they turn on.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class LoadedRun:
    """Finished run, or an adapter from elsewhere, ready for inference."""

    config: TrainConfig
    record: RunRecord
    processor: Any  # tokenizer or image processor
    model: Any
    generation: Mapping[str, Any] = field(default_factory=dict)  # fields of GenerationConfig

    @classmethod
    def read(cls, folder: Path, *, on_answers: bool = False) -> LoadedRun:
        """Load a run from its folder, or an adapter by `of_adapter`.

        Raises:
            ValueError: the folder has neither; the run is unfinished or damaged, or stores which tokens its loss is
                taken of; or its chat template has changed since training.

        """
        if not (folder / RUN_FILE).exists():
            return cls.of_adapter(str(folder), on_answers=on_answers)
        if on_answers:
            raise ValueError(f"{folder} is a run, which stores the tokens of its loss. Remove --assistant-only-loss.")
        config, record = read_run(folder)
        if not (folder / METRICS_FILE).exists():
            raise ValueError(f"The run in {folder} is not finished. {resume_hint(folder)}")
        remedy = "`lrlora train` wrote this folder. Restore it from a copy, or train again."
        saved = None
        with readable(folder, remedy):
            processor = TASKS[config.task].load_processor(folder)
            if record.rendering == CHAT and processor.chat_template != record.chat_template:
                raise ValueError(
                    f"The chat template in {folder} differs from the one used in training, which is stored in its "
                    f"{RUN_FILE}. Restore that template: with another, the answers are not those that were learned."
                )
            if config.method == "full":
                model = task_for(config.task, AutoConfig.from_pretrained(folder)).model_class.from_pretrained(folder)
            else:
                saved = SavedAdapter.read(folder)  # validate before PEFT reads its patterns
        if saved is not None:
            require_model_folder(config.model)
            source = model_source(config.model)
            task = task_for(config.task, AutoConfig.from_pretrained(source))
            base, _ = load_model(config.model, source, task, record.labels, processor, in_float32=False)
            with readable(folder, remedy):
                model = PeftModel.from_pretrained(base, folder, is_trainable=METHODS[config.method].has_penalty)
                require_all_weights(model, saved)
        return cls(config, record, processor, model)

    @classmethod
    def of_adapter(
        cls,
        source: str,
        *,
        base: str | None = None,
        task: str | None = None,
        on_answers: bool = False,
        saved: SavedAdapter | None = None,
    ) -> LoadedRun:
        """Load an adapter from elsewhere.

        Prompts and chats are rendered as the data says: chats with the model's template. For tasks with a head, texts
        are truncated at the limit of the tokenizer, which in a run's export is the run's `max_length`, and the model.
        A run's export also knows how the run's data is read.

        Args:
            source: folder or hub name.
            base: base model of the adapter; default: the one that it names.
            task: task of an adapter that does not store it.
            on_answers: whether the loss of chats is that of their answers; otherwise of all tokens.
            saved: the adapter as read.

        Raises:
            FileNotFoundError: the base model is missing.
            ValueError: base model or task is unknown, or an example has several labels.

        """
        saved = SavedAdapter.read(source).on_base(base) if saved is None else saved
        known = saved.config.task_type
        types = {name: each.adapter_fields.get("task_type") for name, each in TASKS.items()}
        if known not in (None, *types.values()):
            supported = sorted(set(filter(None, types.values())))
            raise ValueError(
                f"{source} is a {known} adapter. Supported: {', '.join(supported)}. By energy, any adapter can be "
                "exported (lrlora export --energy); by loss, in its training script (lrlora.shrink)."
            )
        trained_on = (saved.config.auto_mapping or {}).get("base_model_class")
        reading: Any = read_reading(Path(source))
        trained = reading.pop("task", None)
        found = task_stored(known, trained_on) if task is None else TASKS.get(task)
        if found is None or (task is not None and types[task] is None):
            *some, last = sorted(name for name, stored in types.items() if stored is not None)
            raise ValueError(
                f"{source} does not store its task: set task_type in its adapter_config.json. For an export, pass "
                f"--task {', '.join(some)} or {last}."
            )
        if known is not None and types[found.name] != known:
            raise ValueError(f"{source} is a {known} adapter, which does not fit --task {found.name}. Remove --task.")
        name = saved.base_model
        if not name:
            raise ValueError(f"{source} does not name its base model. Pass it: --base MODEL.")
        require_model_folder(name)
        found = found.for_model(AutoConfig.from_pretrained(name))
        names = saved.class_names
        if known is not None or base is None:
            model: Any = load_adapted(saved)
        else:
            model = found.model_class.from_pretrained(name, **(found.model_options(names) if names else {}))
            model = PeftModel.from_pretrained(model, source)
        if found.has_classes and is_multi_label(model):
            raise ValueError(
                f"{source} gives an example several labels (problem_type={model.config.problem_type!r}), but the task "
                f"{found.name} gives it one. Load it with PEFT, and apply a sigmoid to its logits."
            )
        if known is not None:
            found = found.with_outputs(model.config.num_labels)
        try:
            processor = found.load_processor(source)
        except (OSError, ValueError):  # it has none of its own
            processor = found.load_processor(name)
        labels: list[str] = []
        if found.has_classes:
            labels = names or [str(number) for number in range(model.config.num_labels)]
        if trained != found.name:  # whose columns have other roles
            reading = {}
        config = TrainConfig(name, source, found.name, method="lora", output=tempfile.gettempdir(), **reading)
        limit = max_tokens(processor, model.config) if found.has_head and found.reads_text else None
        record = RunRecord({}, labels, limit, {}, {}, loss_on=ANSWERS if on_answers else None)
        return cls(config, record, processor, model)

    def reading(self, **settings: Any) -> LoadedRun:
        """Copy of the run with other data options; None keeps the run's own."""
        return replace(self, config=replace(self.config, **{k: v for k, v in settings.items() if v is not None}))

    def generating(self, settings: Mapping[str, Any] | None) -> LoadedRun:
        """Copy of the run with other generation settings.

        Raises:
            ValueError: the run does not generate text, or a setting is unknown.

        """
        if settings and not self.task.generates:
            raise ValueError(f"Generation settings ({', '.join(settings)}) are for causal-lm, not {self.config.task}.")
        names = [name for name in GenerationConfig().to_dict() if not name.startswith("_")]
        for name in settings or ():
            require_known("generation setting", name, names)
        return replace(self, generation=settings or {})

    def __post_init__(self) -> None:
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @property
    def task(self) -> Task:
        return task_for(self.config.task, self.model.config)

    def examples(self, data: str | Dataset, split: str | None, announce: Announce, *, with_label: bool) -> Dataset:
        """The checked examples of data, named by their roles."""
        return self.with_rows(data, split, announce, with_label=with_label)[0]

    def with_rows(
        self, data: str | Dataset, split: str | None, announce: Announce, *, with_label: bool, as_written: bool = False
    ) -> tuple[Dataset, Dataset]:
        """`examples`, and their rows of the data, with all columns; of CSV files as text if `as_written`."""
        how = {"with_label": with_label, "as_written": as_written}
        examples, notes, rows = load_examples(self.config, self.task, data, split, self.record.labels, **how)
        for note in notes:
            announce(note)
        if self.task.generates:
            self._require_rendering(examples)
            is_chat = format_of(examples.column_names).name == "text" or holds_chats(examples)
            if self.record.rendering is None and not is_chat and rendering_of(examples, self.processor) == CHAT:
                announce(
                    "The prompts are rendered with the model's chat template. TRL trains on strings without it: for "
                    "such an adapter, pass the whole texts in the column text."
                )
        elif limit := self.record.max_length:
            count = sum(length > limit for length in self.task.lengths(examples, self.processor))
            if count:
                announce(f"{count:,} of {len(examples):,} examples are truncated to {limit} tokens.")
        return examples, rows

    def _require_rendering(self, examples: Dataset) -> None:
        """Raise ValueError unless the examples can be rendered as in training."""
        trained, format_ = self.record.rendering, format_of(examples.column_names)
        if trained is None:  # an adapter from elsewhere
            if self.record.loss_on == ANSWERS and format_.name != "messages":
                raise ValueError("--assistant-only-loss is for chats (the column messages). Remove it.")
            return
        if trained == CHAT and format_.name == "text":
            raise ValueError(
                "The run was trained on chats, but the column text has no turns. To use it as prompts, pass --column "
                "prompt=text"
            )
        if trained != CHAT and holds_chats(examples):
            raise ValueError(
                f"The data contains chats ({format_.name}), but the run was trained on plain text, without a chat "
                "template. Provide prompts as text, or train with --chat-template."
            )

    def encoded(self, examples: Dataset) -> Dataset:
        """Encode the examples as in training."""
        if self.task.generates:
            is_text = format_of(examples.column_names).name == "text"
            rendering = self.record.rendering or rendering_of(examples, self.processor)
            return as_trl_reads(examples, TEXT if is_text else rendering)
        return self.task.encode(examples, self.processor, self.record.max_length)

    def scored(self, rows: Dataset) -> Iterator[str]:
        """Tokens that the loss is taken of, in a sentence, for encoded chats and an adapter that does not store it."""
        if self.record.rendering is None and "messages" in rows.column_names:
            is_part = self.record.loss_on == ANSWERS
            part = "the answers" if is_part else "all tokens (--assistant-only-loss: of the answers)"
            yield f"The loss of the chats is that of {part}."

    def trainer(self, data: Dataset) -> Trainer:
        settings = {name: value for name, value in self.config.arguments.items() if name in _OF_INFERENCE}
        if self.task.generates:
            settings["assistant_only_loss"] = self.record.loss_on == ANSWERS
        arguments = training_arguments(self.task, settings, self.config.output, max_length=self.record.max_length)
        return make_trainer(self.task, self.model, self.processor, arguments, data, data, [])

    def answers(self, rows: Dataset) -> Iterator[str]:
        """Yield the continuation of every prompt."""
        with cached_weights(self.model):
            for row in progress_bar(rows, desc="Generating", disable=len(rows) == 1):
                inputs = self.prompt(prompt_of(row), row)
                tokens = self.generate(inputs)[0, inputs["input_ids"].shape[1] :]
                yield str(self.processor.decode(tokens, skip_special_tokens=True))

    def require_room(self, rows: Dataset) -> None:
        """Raise ValueError if a prompt is too long for the model, before any answer is written."""
        for row in rows:
            self._room(self.prompt(prompt_of(row), row))

    def _room(self, inputs: BatchEncoding) -> int:
        """Most tokens that may be added to a prompt."""
        length, limit = inputs["input_ids"].shape[1], max_positions(self.model.config)
        new_tokens, total = (self.generation.get(name) for name in ("max_new_tokens", "max_length"))
        limit = min(limit, total) if isinstance(total, int) else limit
        if length + (new_tokens if isinstance(new_tokens, int) else 1) > limit:
            raise ValueError(
                f"The prompt has {length:,} tokens, but together with the answer at most {limit:,} are possible. "
                f"Shorten the prompt, or {'raise max_length' if limit == total else 'lower max_new_tokens'}."
            )
        return limit - length

    def generate(self, inputs: BatchEncoding) -> Tensor:
        """Prompt and continuation, (1, tokens): by default greedy, and at most as long as a training example."""
        room = self._room(inputs)
        settings: dict[str, Any] = {"do_sample": any(name in self.generation for name in _SAMPLING)}
        is_total = isinstance(self.generation.get("max_length"), int)  # which `generate` would ignore
        settings["max_new_tokens"] = room if is_total else min(self.record.max_length or _NEW_TOKENS, room)
        settings |= {name: value for name, value in self.generation.items() if name != "max_length" or not is_total}
        settings |= {"pad_token_id": self.processor.pad_token_id, "return_dict_in_generate": False}
        with torch.no_grad():
            try:
                return self.model.generate(**inputs, **settings)
            except (ArithmeticError, TypeError, ValueError) as error:
                if not self.generation:
                    raise
                given = ", ".join(f"{name}={value!r}" for name, value in self.generation.items())
                raise ValueError(f"The generation settings {given} cannot be used: {error}") from None

    def prompt(self, asked: str | list[dict[str, Any]], row: dict[str, Any]) -> BatchEncoding:
        """Token ids of a prompt: plain text, or a chat rendered up to the start of the answer."""
        if isinstance(asked, str):
            inputs = self.processor(asked, return_tensors="pt")
        else:
            text = render_chat(self.processor, asked, row, add_generation_prompt=True)
            inputs = self.processor(text, return_tensors="pt", add_special_tokens=False)  # the template adds them
        return inputs.to(self.model.device)
