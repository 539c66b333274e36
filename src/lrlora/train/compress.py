"""Compression of an adapter by loss: examples, the smallest size within a loss limit, and healing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from ..adapters import Factors, Updates, factorize, read_updates
from ..adapters.card import class_names
from ..adapters.full_model import FineTuned
from ..adapters.loading import check_base, load_adapted
from ..adapters.peft_folder import SavedAdapter
from ..adapters.update import CHANGING_STARTS
from ..checks import DEFAULT_ENERGY
from ..files import is_full_model, replacing, write_json
from ..learned.directions import Point, energy_curve, loss_curve, mean_loss, smallest
from ..ranks import RankReport
from ..run_folder import ANSWERS, LOSS_FILE, REPORT_FILE, RUN_FILE, LossRecord, RunRecord
from .chat import rendering_of
from .data import choose_max_length, load_splits, load_task_data, only_split, sampled
from .inference import OF_TRAINING, LoadedRun
from .models import make_trainer, max_tokens, model_source, require_model_folder, training_arguments
from .progress import Announce, Progress, StopOnNonFinite
from .settings import TrainConfig
from .tasks import kind_for

EXAMPLES = 256  # maximum number per part
TERMS = 4_096  # number of loss terms after which a part takes no further batch
FEWEST = 16  # minimum number of loss terms
_HEALING_RATE = 0.25  # share of the peak learning rate, for factors at the training scale
_OF_SCHEDULE = (
    *("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "warmup_ratio", "eval_steps", "save_steps"),
)
_TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "classify"}


@dataclass
class Subject:
    """An adapter, or a full fine-tuning update, on its base model, with examples.

    Attributes:
        run: its run, or a synthetic one for an external adapter.
        updates: updates as read.
        training: examples for the moments and for training.
        held_out: examples for the loss.

    """

    run: LoadedRun
    updates: Updates
    training: Dataset
    held_out: Dataset

    @classmethod
    def read(
        cls,
        source: str,
        *,
        base: str | None = None,
        data: str | None = None,
        task: str | None = None,
        announce: Announce = print,
        **reading: Any,
    ) -> Subject:
        """Load an adapter and its examples.

        Args:
            source: output folder of a run, or folder or hub name of a PEFT adapter.
            base: base model; default: the one named by the adapter.
            data: see `TrainConfig.data`; default: the run's data.
            task: task of an adapter that does not specify it.
            announce: receives messages on skipped examples.
            **reading: data options, see `lrlora.train.inference.evaluate`.

        Raises:
            FileNotFoundError: base model or data is missing.
            ValueError: no data is given or it does not fit; or the adapter cannot be read.

        """
        is_run = (Path(source) / RUN_FILE).is_file()
        if data is None and not is_run:
            raise ValueError(
                f"{source} is not a run of `lrlora train`, so its data is unknown. Pass examples like its training "
                "data (--data), or use --by energy, which needs no data."
            )
        if is_run and task is not None:
            raise ValueError(f"{source} is a run of `lrlora train`, which stores its task. Remove --task.")
        saved = None if is_full_model(source) else SavedAdapter.read(source).on_base(base)
        if getattr(saved and saved.config, "lora_bias", False):
            raise ValueError("Adapters with lora_bias=True cannot be exported. Merge the adapter instead.")
        run = LoadedRun.read(Path(source)) if is_run else _made_up(source, saved, base, str(data), task, reading)
        run = run.reading(**reading)
        if saved is None and base is None and is_run:
            base = model_source(run.config.model)
        if saved is not None and base is None and getattr(saved.config, "use_dora", False):
            base = saved.base_model  # required to read an update with its magnitudes
        updates = read_updates(source if saved is None else saved, base=base)
        check_base(updates)
        training, held_out = _own_examples(run) if data is None else _given_examples(run, data, announce)
        return cls(run, updates, training, held_out)

    @cached_property
    def on_base(self) -> nn.Module:
        """Model for factors, with the original base weights, which some adapters change."""
        model, origin = self.run.model, self.updates.origin
        with torch.no_grad():
            if isinstance(origin, FineTuned):
                kept = {key for keys in origin.whole.values() for key in keys}
                for key, tensor in model.state_dict().items():
                    name = None if key in kept else origin.base.name_of(key)
                    if name is not None:
                        tensor.copy_(origin.base.read(name))
            elif str(getattr(origin.config, "init_lora_weights", "")).startswith(CHANGING_STARTS):
                base = model.get_base_model()
                for update in self.updates:
                    layer = base.get_submodule(update.module).get_base_layer()
                    weight = update.weight()
                    assert weight is not None  # such updates are read with their weight
                    layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight.view_as(layer.weight))
        return model

    @torch.no_grad()
    def loss_of(self, model: Any, batches: Sequence[Any]) -> float:
        """Mean loss of a model with its current adapter."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        values = [self.loss(base, batch) for batch in batches]
        return sum(value.item() for value, _ in values) / max(1, sum(terms for _, terms in values))

    def with_lora(self, folder: Path, *, is_trainable: bool = False) -> PeftModel:
        """Replace the adapter on the base model by a LoRA made from it."""
        base: Any = self.on_base
        return PeftModel.from_pretrained(
            base.unload() if isinstance(base, PeftModel) else base, folder, is_trainable=is_trainable
        )

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """Sum of a batch's loss terms, and their number."""
        return self.run.kind.loss(model, batch)

    def batches(self, examples: Dataset) -> list[Any]:
        """Batches of training size, up to the required number of terms."""
        trainer = self.run.trainer(self.run.encoded(sampled(examples, EXAMPLES)))
        trainer.args.per_device_eval_batch_size = trainer.args.per_device_train_batch_size
        batches, terms = [], 0
        for batch in trainer.get_eval_dataloader():
            batches.append(batch)
            terms += int((batch["labels"] != -100).sum())
            if terms >= TERMS:
                break
        if terms < FEWEST:
            raise ValueError(
                f"{len(examples)} examples with {terms} labels or tokens to predict are too few to measure the loss; "
                f"at least {FEWEST} are needed. Pass more (--data), or use --by energy."
            )
        return batches

    @cached_property
    def whole(self) -> list[Factors]:
        """The update as thin factors: exact if it is a product, else at 99 % of its energy."""
        is_thin = all(update.is_product for update in self.updates)
        return factorize(self.updates, energy=1.0 if is_thin else DEFAULT_ENERGY, progressbar=True)


def _own_examples(run: LoadedRun) -> tuple[Dataset, Dataset]:
    splits = load_task_data(run.config, run.kind).splits
    return splits["train"], splits["validation"]


def _given_examples(run: LoadedRun, data: str, announce: Announce) -> tuple[Dataset, Dataset]:
    splits = load_splits(data, run.config)
    if {"train", "validation"} <= set(splits):
        parts = [run.examples(data, name, announce, with_label=True) for name in ("train", "validation")]
        return parts[0], parts[1]
    name = only_split(splits, ("train", "validation", "test"), f"{data} has", "a separate file")
    parts = run.examples(data, name, announce, with_label=True).train_test_split(0.5, seed=0)
    return parts["train"], parts["test"]


def _made_up(
    source: str, saved: SavedAdapter | None, base: str | None, data: str, task: str | None, reading: dict[str, Any]
) -> LoadedRun:
    """Wrap an external adapter as a run that reads data like `lrlora train`."""
    known = None if saved is None else saved.config.task_type
    if known not in (None, *_TASKS):
        raise ValueError(f"{source} is a {known} adapter, whose loss cannot be measured. Use --by energy.")
    task = task or _TASKS.get(str(known))
    if task is None or task not in (*_TASKS.values(), "regress"):
        raise ValueError(f"{source} does not store its task. Pass --task {', '.join(_TASKS.values())} or regress.")
    if known is not None and _TASKS[known] != task.replace("regress", "classify"):
        raise ValueError(f"{source} is a {known} adapter, which does not fit --task {task}. Remove --task.")
    name = source if saved is None else saved.base_model
    if not name:
        raise ValueError(f"{source} does not name its base model. Pass it: --base MODEL.")
    require_model_folder(name)
    kind = kind_for(task, AutoConfig.from_pretrained(name))
    if saved is not None and (known is not None or base is None):
        model = load_adapted(saved)
    else:
        names = class_names(saved) if saved else []
        model = kind.model_class.from_pretrained(name, **(kind.model_options(names) if names else {}))
        model = PeftModel.from_pretrained(model, source) if saved else model
    if known is not None and kind.has_head and model.config.num_labels == 1:
        task, kind = "regress", kind_for("regress", model.config)
    config = TrainConfig(name, data, task, method="lora", output=tempfile.gettempdir())
    try:
        processor = kind.load_processor(source)
    except (OSError, ValueError):  # it has none of its own
        processor = kind.load_processor(name)
    labels = [] if task != "classify" else class_names(saved) if saved else list(model.config.id2label.values())
    if task == "classify" and not labels:
        labels = [str(index) for index in range(model.config.num_labels)]
    run = LoadedRun(config, RunRecord({}, labels, None, {}, {}), processor, model).reading(**reading)
    splits = load_splits(data, run.config)
    examples = run.examples(data, next(iter(splits)), lambda line: None, with_label=True)
    limit = max_tokens(processor, model.config)
    record = replace(
        run.record,
        max_length=choose_max_length(kind.lengths(sampled(examples, EXAMPLES), processor), limit),
        rendering=rendering_of(examples, processor) if kind.generates else None,
        loss_on=ANSWERS if kind.generates else None,
        chat_template=processor.chat_template,
    )
    return replace(run, record=record)


class Cut:
    """Compression of an adapter: loss curve and loss on held-out examples.

    Args:
        subject: adapter and examples.
        announce: receives the number of examples.
        progressbar: show a progress bar.

    """

    def __init__(self, subject: Subject, *, announce: Announce = print, progressbar: bool = False) -> None:
        self.subject, self._progressbar = subject, progressbar
        training, self._held_out = (subject.batches(part) for part in (subject.training, subject.held_out))
        used, held = (sum(len(batch["labels"]) for batch in part) for part in (training, self._held_out))
        announce(
            f"Cut by loss: gradients from {used} examples and losses on {held} others, from {subject.run.config.data}."
        )
        self.loss = subject.loss_of(subject.run.model, self._held_out)
        self.points: list[Point] = []
        self._known: dict[tuple[int, ...], float] = {}
        whole = subject.whole
        gradients = tqdm(training, desc="Gradients of the loss", disable=not progressbar)
        self.curve = loss_curve(subject.on_base, whole, gradients, subject.loss)
        self.base = self.measure([])  # trained heads, biases and tokens stay

    @property
    def gain(self) -> float:
        """Loss that the update saves on held-out examples."""
        return self.base - self.loss

    def measure(self, factors: Sequence[Factors]) -> float:
        """Loss with these factors in place of the adapter."""
        size = sum(part.parameters for part in factors)
        batches = tqdm(self._held_out, desc=f"Loss of {size:,} parameters", disable=not self._progressbar, leave=False)
        return mean_loss(self.subject.on_base, factors, batches, self.subject.loss)

    def measured(self, factors: Sequence[Factors]) -> float:
        """Cached `measure`, keyed by the ranks: for factors of one curve."""
        ranks = tuple(part.rank for part in factors)
        if ranks not in self._known:
            self._known[ranks] = self.measure(factors)
        return self._known[ranks]

    def within(self, budget: int, max_rank: int | None = None) -> list[Factors]:
        """Factors within a parameter budget; for a high-rank update, by loss or energy, whichever loses less.

        There, nearly everything is cut, far outside the range of the quadratic model of the loss.
        """
        by_loss = self.curve.within(budget, max_rank)
        if self._is_thin:
            return by_loss
        by_energy = energy_curve(self.subject.whole).within(budget, max_rank)
        return min((by_loss, by_energy), key=self.measure)

    def smallest(self, rise: float, max_rank: int | None = None) -> list[Factors]:
        """Factors of the smallest size whose loss is within a share of the adapter's loss, and keeps half of its gain.

        Args:
            rise: relative, such as 0.01.
            max_rank: of any module.

        Raises:
            ValueError: no size is within, or there is no gain.

        """
        if self.gain <= 0:
            raise ValueError(
                f"The adapter gains nothing on the held-out examples (loss {self.loss:.4g}, {self.base:.4g} without "
                "it), so no size can be chosen by loss. Cut it by energy (--energy) or to a size (--budget), or pass "
                "other examples (--data)."
            )
        allowed, half = rise * abs(self.loss), self.gain / 2
        try:
            factors, self.points = smallest(
                self.curve, self.measured, self.loss + min(allowed, half), max_rank=max_rank
            )
        except ValueError as error:
            why = "" if allowed <= half else " A rise of more than half of the adapter's gain is not allowed."
            if not self._is_thin:
                why += (
                    f" The update is not a product of thin factors, so {1 - DEFAULT_ENERGY:.0%} of its energy was "
                    "dropped beforehand."
                )
            raise ValueError(f"{error}{why}") from None
        return factors

    @property
    def _is_thin(self) -> bool:
        return all(update.is_product for update in self.subject.updates)

    def loss_of(self, model: Any) -> float:
        """Loss of a model."""
        return self.subject.loss_of(model.eval(), self._held_out)


def record_losses(folder: Path, cut: Cut, factors: Sequence[Factors], rise: float | None) -> LossRecord:
    """Save a run's loss curve, and the ranks at the chosen size."""
    record = LossRecord(
        loss=cut.loss,
        rise=rise,
        sizes=[point.parameters for point in cut.points],
        losses=[point.loss for point in cut.points],
        chosen=sum(part.parameters for part in factors),
        ranks={part.module: part.rank for part in factors},
    )
    if (folder / REPORT_FILE).exists():
        RankReport.from_json(folder / REPORT_FILE).with_loss_ranks(record.ranks).to_json(folder / REPORT_FILE)
    write_json(folder / LOSS_FILE, asdict(record))
    return record


def heal(
    subject: Subject,
    folder: Path,
    steps: int,
    announce: Announce,
    is_better: Callable[[Any], bool] = lambda model: True,
) -> bool:
    """Train a saved LoRA further on the adapter's examples, and overwrite it if better.

    Uses a quarter of the run's peak learning rate and the default schedule. The file stays unchanged until the end.
    """
    config, kind = subject.run.config, subject.run.kind
    # A full fine-tuning learning rate does not apply to factors.
    rate = kind.rates[0] if config.method == "full" else config.arguments.get("learning_rate", kind.rates[0])
    rate *= _HEALING_RATE * subject.updates.updates[0].scaling ** 0.5
    settings = {name: value for name, value in config.arguments.items() if name not in (*OF_TRAINING, *_OF_SCHEDULE)}
    settings |= {"max_steps": steps, "learning_rate": rate}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    progress = Progress(announce)
    model = subject.with_lora(folder, is_trainable=True)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    stored = load_file(file)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(kind, settings, scratch, max_length=subject.run.record.max_length)
        data = subject.run.marked(subject.run.encoded(subject.training))
        trainer = make_trainer(kind, model, subject.run.processor, arguments, data, data, [progress, StopOnNonFinite()])
        with progress.closed_at_the_end():
            trainer.train()
    if not is_better(model):
        return False
    trained = get_peft_model_state_dict(model)
    with replacing(file) as partial:
        healed = {key: trained.get(key, tensor).detach().to(tensor).clone() for key, tensor in stored.items()}
        save_file(healed, partial, {"format": "pt"})
    return True
