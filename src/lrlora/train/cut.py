"""Compression of an adapter by loss: examples, the smallest size that keeps a share of the gain, and healing."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..adapters import Factors, Updates, factorize, read_updates
from ..adapters.export import require_exportable
from ..adapters.full_model import FineTuned
from ..adapters.loading import check_base
from ..adapters.peft_folder import SavedAdapter
from ..adapters.update import changes_base
from ..checks import DEFAULT_ENERGY
from ..files import is_full_model, replacing, write_json
from ..learned.directions import Point, energy_curve, loss_curve, smallest
from ..learned.gain import Gain, Kept, example_losses, losses_of, mean_loss, mean_of
from ..learned.moments import IGNORED
from ..ranks import RankReport
from ..run_folder import LOSS_FILE, REPORT_FILE, RUN_FILE, LossRecord
from ..tuner import cached_weights
from .data import load_splits, load_task_data, only_split, require_data_path, sampled, split_by_groups
from .inference import LoadedRun
from .models import make_trainer, model_source, training_arguments
from .own_text import own_text
from .progress import Announce, Progress, StopOnNonFinite
from .tasks import Kind
from .tasks.base import plain_metrics

# Maximum number of examples, and of loss terms after which no further batch is read.
EXAMPLES, TERMS = 256, 4_096  # for the gradients
HELD_OUT, HELD_OUT_TERMS = 384, 8_192  # for the losses
FEWEST = 16  # minimum number of loss terms
_BATCHES = 4  # to divide, where there are as many examples
_OWN_BATCH = 8
_HEALING_RATE = 0.25  # share of the peak learning rate, for factors at the training scale
# Trainer arguments of a run that healing leaves out: several processes, reports, packing, and the schedule.
_NOT_OF_HEALING = (
    *("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "ddp_backend", "tf32", "use_liger_kernel"),
    *("report_to", "push_to_hub", "packing", "packing_strategy", "eval_packing", "padding_free"),
    *("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "warmup_ratio", "eval_steps", "save_steps"),
)


@dataclass
class Subject:
    """An adapter, or a full fine-tuning update, on its base model, with examples.

    Attributes:
        run: its run, or an adapter from elsewhere read as one.
        updates: updates as read.
        training: examples for the moments and for training.
        held_out: examples for the loss.
        data: where they are from, in words.
        is_own: whether the adapted model wrote them.
        is_given: whether they are others than those of the run.

    """

    run: LoadedRun
    updates: Updates
    training: Dataset
    held_out: Dataset
    data: str
    is_own: bool = False
    is_given: bool = False

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
            data: see `TrainConfig.data`; default: the run's data, or text that the adapted model writes.
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
        if is_run and task is not None:
            raise ValueError(f"{source} is a run of `lrlora train`, which stores its task. Remove --task.")
        saved = None if is_full_model(source) else SavedAdapter.read(source).on_base(base)
        if saved is not None:
            require_exportable(saved.config)
        on_answers = {"on_answers": assistant_only_loss}
        if is_run:
            run = LoadedRun.read(Path(source), **on_answers)
        else:
            run = LoadedRun.of_adapter(source, base=base, task=task, saved=saved, **on_answers)
        run = run.reading(data=data, **reading)
        if data is None and not is_run and not run.kind.generates:
            raise ValueError(
                f"An adapter for {run.config.task} cannot be cut by loss without examples. Pass --data, or cut it by "
                "energy: --energy, or --size with --by energy."
            )
        if saved is None and base is None and is_run:
            base = model_source(run.config.model)
        if saved is not None and base is None and getattr(saved.config, "use_dora", False):
            base = saved.base_model  # required to read an update with its magnitudes
        updates = check_base(read_updates(source if saved is None else saved, base=base))
        if data is None and not is_run:
            subject = cls(run, updates, Dataset.from_dict({}), Dataset.from_dict({}), "").on_own_text()
            announce(f"No data was given: cut by {subject.data}. What is kept there may differ on your task (--data).")
            return subject
        if data is None:
            splits = load_task_data(run.config, run.kind).splits
            training, held_out = splits["train"], splits["validation"]
        else:
            training, held_out = _given_examples(run, data, announce)
        return cls(run, updates, training, held_out, run.config.data, is_given=data is not None)

    def on_own_text(self) -> Subject:
        """Copy with text that the adapted language model writes, half of it held out."""
        parts = own_text(self.run).train_test_split(0.5, seed=0)
        words = "text that the adapted model wrote itself"
        return replace(self, training=parts["train"], held_out=parts["test"], data=words, is_own=True)

    @cached_property
    def on_base(self) -> nn.Module:
        """Model for factors, with the original base weights, which some adapters change."""
        model, origin = self.run.model, self.updates.origin
        with torch.no_grad():
            if isinstance(origin, FineTuned):
                head_keys = {key for keys in origin.whole.values() for key in keys}
                for key, tensor in model.state_dict().items():
                    name = None if key in head_keys else origin.base.name_of(key)
                    if name is not None:
                        tensor.copy_(origin.base.read(name))
            elif changes_base(origin.config):
                base = model.get_base_model()
                for update in self.updates:
                    layer = base.get_submodule(update.module).get_base_layer()
                    weight = update.weight()
                    assert weight is not None  # such updates are read with their weight
                    layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight.view_as(layer.weight))
        return model

    def with_lora(self, folder: Path, *, is_trainable: bool = False) -> PeftModel:
        """Replace the adapter on the base model by a LoRA made from it."""
        base: Any = self.on_base
        return PeftModel.from_pretrained(
            base.unload() if isinstance(base, PeftModel) else base, folder, is_trainable=is_trainable
        )

    def notes(self) -> Iterator[str]:
        """Tokens that the loss is taken of, and an example, of data that is not the run's."""
        if not self.is_given:
            return
        yield f"{self.data} must not contain training data of the adapter, which it may have learned by heart."
        first = self.run.encoded(self.held_out.select([0]))
        yield from self.run.scored(first)
        scored: Any = self.run.trainer(first).eval_dataset
        for row in scored:  # none, if no answer fits
            yield self.run.kind.shown(row, self.run.processor, self.run.record.labels)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum of the loss terms of each example, and their number; both (examples,)."""
        return self.run.kind.loss(model, batch)

    def batches(self, examples: Dataset, count: int, terms: int) -> list[Any]:
        """Batches of at most `count` examples, in random order, until they have this number of loss terms."""
        examples = examples.shuffle(seed=0).select(range(min(count, len(examples))))
        most = -(-len(examples) // _BATCHES)
        if "input_ids" in examples.column_names:  # text that the model wrote
            tokens = examples.with_format("torch", device=self.run.model.device)
            loader: Any = tokens.iter(min(_OWN_BATCH, most))
        else:
            trainer = self.run.trainer(self.run.encoded(examples))
            trainer.args.per_device_eval_batch_size = min(trainer.args.per_device_train_batch_size, most)
            loader = trainer.get_eval_dataloader()
        batches, found = [], 0
        for batch in loader:
            batches.append(batch)
            found += int((batch["labels"] != IGNORED).sum())
            if found >= terms and len(batches) >= _BATCHES:
                break
        if found < FEWEST or len(batches) < 2:
            raise ValueError(
                f"{len(examples)} examples with {found} labels or tokens to predict are too few to measure the loss; "
                f"at least {FEWEST}, in two examples, are needed. Pass more (--data), or use --by energy."
            )
        return batches

    @cached_property
    def whole(self) -> list[Factors]:
        """The update as thin factors: exact if it is a product, else at 99 % of its energy."""
        return factorize(self.updates, energy=1.0 if self.updates.are_products else DEFAULT_ENERGY, progressbar=True)


def _given_examples(run: LoadedRun, data: str, announce: Announce) -> tuple[Dataset, Dataset]:
    splits = load_splits(data, run.config)
    if {"train", "validation"} <= set(splits):
        parts = [run.examples(data, name, announce, with_label=True) for name in ("train", "validation")]
        return parts[0], parts[1]
    name = only_split(splits, ("train", "validation", "test"), f"{data} has", "a separate file")
    return split_by_groups(run.examples(data, name, announce, with_label=True), 0.5, "Provide more.")


class Part:
    """Held-out examples: their batches, and what the adapter gains on them.

    Create it before `Subject.on_base`, which may change the weights that the adapter was trained on.
    """

    def __init__(self, subject: Subject, batches: list[Any], training: list[Any]) -> None:
        self.subject, self.batches, self._training = subject, batches, training
        with cached_weights(subject.run.model):
            self.whole = self.losses_of(subject.run.model)
        self._known: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def without(self) -> Tensor:
        """`example_losses` without the adapter; trained heads, biases and tokens stay."""
        without = self.losses([])
        guessed = _guessed(self.subject.run.kind, self.batches, self._training)
        if guessed is not None and guessed.sum() < without[:, 0].sum():
            return torch.stack([guessed, without[:, 1]], dim=1)
        return without

    @cached_property
    def gain(self) -> Gain:
        return Gain(self.without, self.whole)

    def losses_of(self, model: Any) -> Tensor:
        """`example_losses` of a model with its current adapter."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return losses_of(base.eval(), self.batches, self.subject.loss)

    def losses(self, factors: Sequence[Factors]) -> Tensor:
        """`example_losses` of factors of one curve, cached by their ranks."""
        ranks = tuple(part.rank for part in factors)
        if ranks not in self._known:
            self._known[ranks] = example_losses(self.subject.on_base, factors, self.batches, self.subject.loss)
        return self._known[ranks]

    def kept(self, factors: Sequence[Factors]) -> Kept:
        """Share of the gain that factors keep."""
        return self.gain.kept(self.losses(factors))


def _guessed(kind: Kind, batches: list[Any], training: list[Any]) -> Tensor | None:
    """Losses (examples,) of the best constant answer: label shares, or the mean; None without a head.

    A new head's random answers are worse than no answer, and would make any adapter look good.
    """
    if not kind.has_head:
        return None
    known, labels = (torch.cat([batch["labels"].flatten().cpu() for batch in part]) for part in (training, batches))
    if known.is_floating_point():
        return (labels.double() - known.double().mean()).square()
    counts = torch.bincount(known, minlength=int(labels.max()) + 1).double() + 1
    return -(counts / counts.sum()).log()[labels]


class Cut:
    """Compression of an adapter: its curve, and the share of its gain that is kept on held-out examples.

    Half of the held-out examples are for the search of a size, the other half confirms it.

    Args:
        subject: adapter and examples.
        with_metric: measure the task's metric, too, which is then in `metric`.
        announce: receives the number of examples.
        progressbar: show a progress bar.

    """

    def __init__(
        self,
        subject: Subject,
        *,
        with_metric: bool = False,
        announce: Announce = print,
        progressbar: bool = False,
    ) -> None:
        self.subject = subject
        training = subject.batches(subject.training, EXAMPLES, TERMS)
        held_out = subject.batches(subject.held_out, HELD_OUT, HELD_OUT_TERMS)
        used, held = (sum(len(batch["labels"]) for batch in part) for part in (training, held_out))
        announce(
            f"Cut by loss: gradients from {used} examples and losses on {held} others, from {subject.data}. Half of "
            "those choose the size; the losses below are of the other half."
        )
        for note in subject.notes():
            announce(note)
        self.search, self.confirm = (Part(subject, part, training) for part in (held_out[::2], held_out[1::2]))
        self.metric = self.metric_of(subject.run.model) if with_metric and not subject.is_own else ""
        self.points: list[Point] = []
        gradients = tqdm(training, desc="Gradients of the loss", disable=not progressbar)
        self.curve = loss_curve(subject.on_base, subject.whole, gradients, subject.loss)
        self._progressbar = progressbar

    @property
    def loss(self) -> float:
        """Mean loss of the adapter on the examples that confirm."""
        return mean_of(self.confirm.whole)

    @property
    def base(self) -> float:
        """Mean loss without it."""
        return mean_of(self.confirm.without)

    def require_gain(self) -> None:
        """Raise ValueError unless the adapter has a gain that is measurable on the examples of the search alone."""
        parts = (self.search, self.confirm)
        without, whole = (torch.cat([getattr(part, name) for part in parts]) for name in ("without", "whole"))
        gain, count = Gain(without, whole), len(whole)
        losses = f"loss {mean_of(whole):.4g}, {mean_of(without):.4g} without it"
        remedy = "`lrlora export` can cut it by energy (--energy), to a size (--size), or by other examples (--data)."
        if gain.low <= 0:
            raise ValueError(
                f"The adapter gains nothing that {count} held-out examples could show ({losses}), so no share of it "
                f"can be kept. {remedy}"
            )
        if (part := self.search.gain).low <= 0:
            ratio = ((part.nats - part.low) / part.nats) ** 2 if part.nats > 0 else 2
            needed = math.ceil(2 * len(self.search.whole) * ratio)
            raise ValueError(
                f"The gain is too small ({losses}) for half of {count} held-out examples to tell which share a smaller "
                f"LoRA keeps; about {needed:,} would. {remedy}"
            )

    def within(self, budget: int, max_rank: int | None = None) -> list[Factors]:
        """Factors within a parameter budget; for a high-rank update, by loss or energy, whichever loses less.

        There, nearly everything is cut, far outside the range of the quadratic model of the loss.
        """
        by_loss = self.curve.within(budget, max_rank)
        if self.subject.updates.are_products:
            return by_loss
        by_energy = energy_curve(self.subject.whole).within(budget, max_rank)
        batches, loss = self.search.batches, self.subject.loss
        return min((by_loss, by_energy), key=lambda factors: mean_loss(self.subject.on_base, factors, batches, loss))

    def smallest(self, keep: float, max_rank: int | None = None, *, announce: Announce = print) -> list[Factors]:
        """Factors of the smallest size that keeps a share of the gain.

        Args:
            keep: share, such as 0.99: the lower bound on the search's examples, and the share on the others.
            max_rank: of any module.
            announce: receives the number of examples that would allow a smaller size.

        Raises:
            ValueError: no size keeps it, or there is no gain.

        """
        self.require_gain()
        try:
            with tqdm(desc="Sizes", disable=not self._progressbar, leave=False) as bar:

                def measure(factors: Sequence[Factors]) -> Kept:
                    bar.update()
                    return self.search.kept(factors)

                factors, self.points = smallest(
                    *(self.curve, measure, keep),
                    max_rank=max_rank,
                    confirm=lambda factors: self.confirm.kept(factors).share,
                )
        except ValueError as error:
            why = (
                ""
                if self.subject.updates.are_products
                else f" The update is not a product of thin factors, so {1 - DEFAULT_ENERGY:.0%} of its energy was "
                "dropped beforehand."
            )
            raise ValueError(f"{error}{why}") from None
        if sum(part.parameters for part in factors) == self.points[0].parameters:
            self._tell_why_whole(keep, max_rank, announce)
        return factors

    def _tell_why_whole(self, keep: float, max_rank: int | None, announce: Announce) -> None:
        likely = [point for point in self.points[1:] if point.kept.share > keep]
        if not likely:
            return
        point = likely[-1]
        confirmed = self.confirm.kept(self.curve.within(point.parameters, max_rank))
        needed = 2 * self.search.gain.examples_for(point.kept, keep)
        why = (
            f"only {confirmed} on as many others. Pass more examples (--data)."
            if confirmed.share < keep
            else f"{keep:.4g} is not certain. About {needed:,} held-out examples would show it."
        )
        announce(
            f"Too few examples to cut: {point.parameters:,} parameters keep {point.kept} of the gain on half of them, "
            f"but {why}"
        )

    def metric_of(self, model: Any) -> str:
        """Main metric of a model on the held-out examples, such as "accuracy 0.91"; empty if it is the loss."""
        run = replace(self.subject.run, model=model)
        name = next((name for name in run.kind.metrics if name != "loss"), None)
        metrics = plain_metrics(run.trainer(run.encoded(sampled(self.subject.held_out, HELD_OUT))).evaluate())
        name = name if name in metrics else "mean_token_accuracy" if "mean_token_accuracy" in metrics else None
        return "" if name is None else f"{name.replace('_', ' ')} {metrics[name]:.3f}"


def record_losses(folder: Path, cut: Cut, factors: Sequence[Factors], keep: float | None) -> LossRecord:
    """Save the share of a run's gain over the size, and the ranks at the chosen one."""
    record = LossRecord(
        loss=cut.loss,
        base=cut.base,
        keep=keep,
        sizes=[point.parameters for point in cut.points],
        kept=[point.kept.share for point in cut.points],
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
    settings = {name: value for name, value in config.arguments.items() if name not in _NOT_OF_HEALING}
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
        with closing(progress):
            trainer.train()
    if not is_better(model):
        return False
    trained = get_peft_model_state_dict(model)
    with replacing(file) as partial:
        healed = {key: trained.get(key, tensor).detach().to(tensor).clone() for key, tensor in stored.items()}
        save_file(healed, partial, {"format": "pt"})
    return True
