"""Compression of an adapter by loss: examples, the smallest size that keeps a share of the gain."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from ..adapters import Factors, Updates, factorize, read_updates, save_as_lora
from ..adapters.loading import check_layers
from ..adapters.peft_folder import SavedAdapter
from ..checks import DEFAULT_ENERGY
from ..files import write_json
from ..learned.gain import Gain, mean_of
from ..learned.held_out import LiveLosses, at_rest
from ..learned.live_cut import LiveCut, loss_curve
from ..learned.moments import IGNORED, model_loss
from ..learned.search import FEWEST_UNITS, PASSES, SPLITS, Split, require_units
from ..lora.config import require_exportable
from ..lora.host import base_of
from ..ranks import RankReport
from ..run_folder import REPORT_FILE, RUN_FILE
from ..shrunk import SHRUNK_FILE, Shrunk
from ..straightened import Straightened
from ..tuner import cached_weights
from .data import load_splits, load_task_data, only_split, require_data_path, sampled, split_by_groups
from .loaded import LoadedRun
from .progress import Announce

# Maximum number of examples, and of loss terms after which no further batch is read.
EXAMPLES, TERMS = 256, 4_096  # for the gradients
HELD_OUT, HELD_OUT_TERMS = 384, 8_192  # for the losses
FEWEST = 16  # minimum number of loss terms
_BATCHES = 12  # to divide, where there are as many examples


@dataclass
class Subject:
    """An adapter on its base model, with examples.

    Attributes:
        run: its run, or an adapter from elsewhere read as one.
        updates: updates as read.
        training: examples for the moments and for training.
        held_out: examples for the loss.
        data: where they are from, in words.
        is_other_data: whether they are others than those of the run.
        model: the base model, with the adapter or with the LoRA of `with_lora`.

    """

    run: LoadedRun
    updates: Updates
    training: Dataset
    held_out: Dataset
    data: str
    is_other_data: bool = False

    def __post_init__(self) -> None:
        self.model = self.run.model

    @classmethod
    def read(
        cls,
        source: str,
        *,
        base: str | None = None,
        data: str | None = None,
        task: str | None = None,
        assistant_only_loss: bool = False,
        announce: Announce = print,
        **reading: Any,
    ) -> Subject:
        """Load an adapter and its examples.

        Args:
            source: output folder of a run, or folder or hub name of a PEFT adapter.
            base: base model; default: the one named by the adapter.
            data: see `TrainConfig.data`; default: the run's data.
            task: task of an adapter that does not specify it.
            assistant_only_loss: see `lrlora.train.inference.evaluate`.
            announce: receives messages on skipped examples.
            **reading: data options, see `lrlora.train.inference.evaluate`.

        Raises:
            FileNotFoundError: base model or data is missing.
            ValueError: no data is given or it does not fit; or the adapter cannot be read.

        """
        if data is not None:
            require_data_path(data)
        is_run = (Path(source) / RUN_FILE).is_file()
        if data is None and not is_run:
            raise ValueError(
                f"{source} is no run of `lrlora train`, so it cannot be cut by loss without examples. Pass --data, or "
                "cut it by energy: --energy, or --size with --by energy."
            )
        if is_run and task is not None:
            raise ValueError(f"{source} is a run of `lrlora train`, which stores its task. Remove --task.")
        saved = SavedAdapter.read(source).on_base(base)
        require_exportable(saved.config)
        on_answers = {"on_answers": assistant_only_loss}
        if is_run:
            run = LoadedRun.read(Path(source), **on_answers)
        else:
            run = LoadedRun.of_adapter(source, base=base, task=task, saved=saved, **on_answers)
        run = run.reading(data=data, **reading)
        if base is None and getattr(saved.config, "use_dora", False):
            base = saved.base_model  # required to read an update with its magnitudes
        updates = check_layers(read_updates(saved, base=base))
        if data is None:
            splits = load_task_data(run.config, run.task).splits
            training, held_out = splits["train"], splits["validation"]
        else:
            training, held_out = _read_examples(run, data, announce)
        return cls(run, updates, training, held_out, run.config.data, is_other_data=data is not None)

    @property
    def base(self) -> nn.Module:
        """The model of transformers inside, the same object whatever adapter it has."""
        return base_of(self.run.model)

    @cached_property
    def whole(self) -> list[Factors]:
        """The update as thin factors: exact if it is a product, else at 99 % of its energy."""
        return factorize(self.updates, energy=1.0 if self.updates.are_products else DEFAULT_ENERGY, progressbar=True)

    def as_lora(self, factors: Sequence[Factors]) -> PeftModel:
        """Replace the adapter on the base model by a LoRA of these factors."""
        with tempfile.TemporaryDirectory() as scratch:
            save_as_lora(factors, self.updates, Path(scratch) / "lora", dtype=torch.float32)
            return self.with_lora(Path(scratch) / "lora")

    def with_lora(self, folder: Path) -> PeftModel:
        """Replace the adapter on the base model by a LoRA."""
        model = self.model
        self.model = PeftModel.from_pretrained(model.unload() if isinstance(model, PeftModel) else model, folder)
        return self.model

    def notes(self) -> Iterator[str]:
        """Tokens that the loss is taken of, and an example, of data that is not the run's."""
        if not self.is_other_data:
            return
        yield f"{self.data} must not contain training data of the adapter, which it may have learned by heart."
        first = self.run.encoded(self.held_out.select([0]))
        yield from self.run.scored(first)
        scored: Any = self.run.trainer(first).eval_dataset
        for row in scored:  # none, if no answer fits
            yield self.run.task.shown(row, self.run.processor, self.run.record.labels)

    def batches(self, examples: Dataset, count: int, terms: int) -> list[Any]:
        """Inputs of the model: of at most `count` examples, in random order, until they have this number of terms."""
        examples = examples.shuffle(seed=0).select(range(min(count, len(examples))))
        max_batch_size = -(-len(examples) // _BATCHES)
        trainer = self.run.trainer(self.run.encoded(examples))
        trainer.args.per_device_eval_batch_size = min(trainer.args.per_device_train_batch_size, max_batch_size)
        batches, labels = [], 0
        for batch in trainer.get_eval_dataloader():
            batches.append(self.run.task.inputs(batch))
            labels += int((batch["labels"] != IGNORED).sum())
            if labels >= terms and len(batches) >= _BATCHES:
                break
        if labels < FEWEST or len(batches) < 2:
            raise ValueError(
                f"{len(examples)} examples with {labels} labels or tokens to predict are too few to measure the loss; "
                f"at least {FEWEST}, in two examples, are needed. Pass more (--data), or use --by energy."
            )
        return batches


def _read_examples(run: LoadedRun, data: str, announce: Announce) -> tuple[Dataset, Dataset]:
    splits = load_splits(data, run.config)
    if {"train", "validation"} <= set(splits):
        examples = [run.examples(data, name, announce, with_label=True) for name in ("train", "validation")]
        return examples[0], examples[1]
    name = only_split(splits, ("train", "validation", "test"), f"{data} has", "a separate file")
    return split_by_groups(run.examples(data, name, announce, with_label=True), 0.5, "Provide more.")


class Compression:
    """Compression of an adapter: its curve, and the share of its gain that is kept on held-out examples.

    Args:
        subject: adapter and examples.
        with_metric: measure the task's metric, too.
        for_share: refuse too few examples for a share of the gain, before anything is measured.
        announce: receives the number of examples, and the cost.

    Attributes:
        cut: of the adapter as a live LoRA.
        metric: name and value of the task's metric; None without one.

    """

    def __init__(
        self,
        subject: Subject,
        *,
        with_metric: bool = False,
        for_share: bool = False,
        announce: Announce = print,
    ) -> None:
        self.subject = subject
        training = subject.batches(subject.training, EXAMPLES, TERMS)
        held_out = subject.batches(subject.held_out, HELD_OUT, HELD_OUT_TERMS)
        training_count, held_out_count = (
            sum(len(batch["labels"]) for batch in batches) for batches in (training, held_out)
        )
        if for_share:
            self._require_share(held_out)
        announce(
            f"Cut by loss: gradients from {training_count} examples and losses on {held_out_count} others, from "
            f"{subject.data}; about {PASSES * len(held_out) + 3 * len(training)} forward passes of a batch."
        )
        for note in subject.notes():
            announce(note)
        with at_rest(subject.base, None):
            with cached_weights(subject.run.model):
                losses = LiveLosses.of_batches(subject.base, held_out, model_loss, training)
            self.metric = self.metric_of(subject.run.model) if with_metric else None
            model = subject.as_lora(subject.whole)
            (adapter,) = model.active_adapters
            self.cut = LiveCut(
                model, adapter, losses, loss_curve(model, adapter, losses, subject.whole), is_exact=False
            )

    def _require_share(self, held_out: list[Any]) -> None:
        """Raise ValueError if a share of the gain cannot be measured on these batches."""
        sizes = [sum(len(batch["labels"]) for batch in held_out[start::SPLITS]) for start in range(SPLITS)]
        try:
            require_units(sizes, "held-out examples")
        except ValueError as error:
            counts = [len(examples) for examples in (self.subject.held_out, self.subject.training)]
            needed = math.ceil(SPLITS * FEWEST_UNITS * sum(counts) / counts[0])
            raise ValueError(
                f"{error} {self.subject.data} has {sum(counts)} examples, of which {counts[1]} give the gradients: "
                f"about {needed} are needed in all (--data, or --validation-share before training), or cut by energy "
                "(--energy) or to a size (--size)."
            ) from None

    @property
    def last(self) -> Split:
        """The split of the held-out examples that chooses nothing."""
        return self.cut.splits[-1]

    def within(self, budget: int | None, max_rank: int | None = None) -> tuple[list[Factors], Shrunk]:
        """Factors within a budget, and their record; see `LiveCut.within`."""
        with at_rest(self.subject.base, None):
            return self.cut.within(budget, max_rank)

    def smallest(self, keep: float, max_rank: int | None = None) -> tuple[list[Factors], Shrunk]:
        """Factors of the smallest size that keeps a share of the gain, and their record; see `find_smallest`.

        Raises:
            ValueError: no size keeps it, or there is no gain, or too few examples.

        """
        try:
            with at_rest(self.subject.base, None):
                return self.cut.smallest(keep, max_rank)
        except ValueError as error:
            remedy = (
                "Hold out more (--validation-share) before training; or, in an export, pass other examples (--data), "
                "or cut it by energy (--energy) or to a size (--size)."
            )
            if not self.subject.updates.are_products:
                remedy = (
                    f"The update is not a product of thin factors, so {1 - DEFAULT_ENERGY:.0%} of its energy was "
                    f"dropped beforehand. {remedy}"
                )
            raise ValueError(f"{error} {remedy}") from None

    def losses_as_loaded(self, folder: Path) -> Tensor:
        """Losses on the last split with a LoRA as PEFT loads it, which replaces the adapter."""
        self.subject.with_lora(folder)
        with at_rest(self.subject.base, None):
            return self.cut.losses.losses(self.cut.losses.held_out[SPLITS - 1 :: SPLITS])

    @torch.no_grad()
    def straightened(self) -> Straightened | None:
        """What φ is worth; None if the adapter has none."""
        if any(update.learned is None or update.learned.phi is None for update in self.subject.updates):
            return None
        lines: list[Factors] = []
        total = bent = beyond = 0.0
        for update, whole in zip(self.subject.updates, self.subject.whole, strict=True):
            assert update.learned is not None
            U, V = (factor.double() for factor in update.learned.linear())
            delta, product = update.matrix().double(), U @ V
            slope = (delta * product).sum() / product.square().sum().clamp(min=1e-300)
            lines.append(replace(whole, A=V.float(), B=(slope * U).float()))
            total += delta.square().sum().item()
            bent += (delta - slope * product).square().sum().item()
            beyond += torch.linalg.svdvals(delta)[len(V) :].square().sum().item()
        losses = self.cut.losses
        assert losses.whole_losses is not None
        with at_rest(self.subject.base, None):
            self.subject.as_lora(lines)
            straight, with_phi = losses.losses(losses.held_out), torch.cat([*losses.whole_losses])
            self.cut.model = self.subject.as_lora(self.subject.whole)
        rise = Gain(straight, with_phi)
        return Straightened(
            r=max(line.rank for line in lines),
            bent=bent / max(total, 1e-300),
            beyond=beyond / max(total, 1e-300),
            loss=mean_of(with_phi),
            straight=mean_of(straight),
            low=rise.low,
            high=rise.high,
            units=len(with_phi),
        )

    def metric_of(self, model: Any) -> tuple[str, float] | None:
        """Name and value of the main metric of a model on the held-out examples; None if it is the loss."""
        run = replace(self.subject.run, model=model)
        name = next((name for name in run.task.metrics if name != "loss"), None)
        metrics = run.task.reported(run.trainer(run.encoded(sampled(self.subject.held_out, HELD_OUT))).evaluate())
        name = name if name in metrics else "mean_token_accuracy" if "mean_token_accuracy" in metrics else None
        return None if name is None else (name, metrics[name])


def record_shrunk(folder: Path, record: Shrunk) -> None:
    """Save the record of a run's smallest LoRA, and the ranks there in the report of its ranks."""
    if (folder / REPORT_FILE).exists():
        RankReport.from_json(folder / REPORT_FILE).with_loss_ranks(record.ranks).to_json(folder / REPORT_FILE)
    write_json(folder / SHRUNK_FILE, asdict(record))
