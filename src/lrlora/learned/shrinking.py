"""Shrink a trained LoRA to the smallest size that keeps a share of its gain, in the units of its own loss.

The loss is that of the training: the Trainer's, on its evaluation batches, or a function. Candidates are written into
the live factors, so that losses that switch the adapter off, such as DPO's, see them as they see the adapter.

In several processes, each measures its share of the batches, and all find the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters import Factors
from ..checks import DEFAULT_KEEP, check_truncation
from ..files import write_json
from ..shrunk import SHRUNK_FILE, Shrunk
from .directions import LossCurve, directions
from .gain import at_most, constant_losses, losses_of, mean_of
from .learned_ranks import unwrapped
from .live_lora import (
    SmallSave,
    lora_factors,
    lora_layers,
    lora_weights,
    make_small,
    pad_state,
    peft_model,
    put,
    require_plain_lora,
)
from .moments import Loss, Moments, channel_dim, model_loss, watch, with_sampled_labels
from .search import FEWEST_UNITS, LEARNED, PARTS, PASSES, Part, find_smallest, too_few
from .sharded import full_value, is_whole, of_first, process_index, processes, write

if TYPE_CHECKING:
    from transformers import Trainer  # imports `datasets`, which an adapter does without

WHOLE_FOLDER = "whole"  # in the Trainer's output folder
_GRADIENT_BATCHES = (8, 32)  # at least and at most; between, a tenth of those of the training
_EXAMPLES = (150, 600)  # held-out, at least and at most; between, a share of those trained on
_BATCHES = 120  # held-out, where the loss is known by batch alone
_SHARE = 1 / 20  # so that about six forward passes cost a tenth of the training, of a forward and a backward pass
_SAME = {"rel_tol": 0.01, "abs_tol": 1e-4}  # losses of the Trainer and of its model


@dataclass(frozen=True)
class _Source:
    """Batches, and their losses by the live model.

    Attributes:
        training: batches for the gradients.
        held_out: batches for the losses.
        loss: mean loss of a batch, with a graph.
        units: sum of the loss terms of each unit of a batch, and their number, (units, 2).
        unit: of these, in words.
        sampled: returns a batch with labels sampled from the model; None without labels.

    """

    training: Sequence[Any]
    held_out: Sequence[Any]
    loss: Callable[[Any], Tensor]
    units: Callable[[Any], Tensor]
    unit: str = "held-out examples"
    sampled: Callable[[Any], Any] | None = None

    @classmethod
    def of_batches(cls, model: PeftModel, training: Iterable[Any], held_out: Iterable[Any], loss: Loss) -> _Source:
        def mean(batch: Any) -> Tensor:
            sums, numbers = loss(model, batch)
            return sums.sum() / numbers.sum()

        sampled = partial(with_sampled_labels, model) if loss is model_loss else None
        units = partial(_units, model, loss)
        return cls(list(training), list(held_out), mean, units, sampled=sampled)

    @classmethod
    def of_trainer(cls, trainer: Trainer, model: PeftModel, on: str) -> _Source:
        whole: Any = trainer.model  # which may be around the PEFT model
        data: Any = trainer.train_dataset if on == "train" else trainer.eval_dataset
        kind = "training" if on == "train" else "held-out"
        with _on_every_process(trainer):
            training = _training_batches(trainer)
            first = next(iter(trainer.get_eval_dataloader(data)))

        def prepared(batch: Any) -> Any:
            return trainer._prepare_inputs(dict(batch))

        def loss(batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                result: Any = trainer.compute_loss(whole, prepared(batch))
            return result[0] if isinstance(result, tuple) else result

        def by_example(batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                return _units(model, model_loss, prepared(batch))

        def by_batch(batch: Any) -> Tensor:
            size = len(next(value for value in batch.values() if hasattr(value, "__len__")))
            with torch.no_grad():
                return torch.tensor([[loss(batch).item() * size, size]]).double()

        def sampled(batch: Any) -> Any:
            with trainer.compute_loss_context_manager():
                return with_sampled_labels(model, prepared(batch))

        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            sums, numbers = by_example(first).sum(0).tolist()
            if math.isclose(sums / numbers, by_batch(first)[0, 0].item() / len(by_example(first)), **_SAME):
                held_out = _held_out(trainer, data, _examples(trainer))
                return cls(training, held_out, loss, by_example, f"{kind} examples", sampled)
        held_out = _held_out(trainer, data, _BATCHES * trainer.args.eval_batch_size)
        return cls(training, held_out, loss, by_batch, f"{kind} batches")

    def losses(self, batches: Sequence[Any]) -> Tensor:
        """Losses of the units of batches, (units, 2), the same on every process."""
        world, rank = processes(), process_index()
        # As many on each, since a sharded model needs all processes.
        own = [self.units(batches[at % len(batches)]) for at in range(rank, -(-len(batches) // world) * world, world)]
        if world == 1:
            return torch.cat(own)
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, own)
        return torch.cat([everyone[at % world][at // world] for at in range(len(batches))])


@torch.no_grad()
def _units(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    return losses_of(model, [batch], loss)


@contextlib.contextmanager
def _on_every_process(trainer: Trainer) -> Iterator[None]:
    """Data loaders that give every process all batches, on the CPU."""
    arguments, accelerator = trainer.args, trainer.accelerator
    persistent, arguments.dataloader_persistent_workers = arguments.dataloader_persistent_workers, False
    setattr(accelerator, "prepare", lambda loader, **options: loader)  # noqa: B010 (of this one alone)
    try:
        yield
    finally:
        del accelerator.prepare
        arguments.dataloader_persistent_workers = persistent


def _sample(data: Any, size: int) -> Any:
    """Random examples of a data set, the same every time; all of one without a length."""
    if not hasattr(data, "__len__") or len(data) <= size:
        return data
    if hasattr(data, "shuffle"):
        return data.shuffle(seed=0).select(range(size))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.Subset(data, order[:size].tolist())


def _training_batches(trainer: Trainer) -> list[Any]:
    fewest, most = _GRADIENT_BATCHES
    number = trainer.state.global_step * trainer.args.gradient_accumulation_steps // 10
    number = min(most, max(fewest, number - number % fewest))
    data: Any = trainer.train_dataset
    if not hasattr(data, "__len__"):
        return list(islice(trainer.get_train_dataloader(), number))
    return list(trainer.get_eval_dataloader(_sample(data, number * trainer.args.eval_batch_size)))


def _examples(trainer: Trainer) -> int:
    """Number of held-out examples: so that their losses cost at most a tenth of the training, or as few as suffice."""
    of_batch = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * processes()
    fewest, most = _EXAMPLES
    return min(most, max(fewest, int(_SHARE * trainer.state.global_step * of_batch)))


def _held_out(trainer: Trainer, data: Any, size: int) -> list[Any]:
    """Batches of a sample of this size, at least three."""
    with _on_every_process(trainer):
        loader = trainer.get_eval_dataloader(_sample(data, size))
        return list(islice(loader, -(-size // trainer.args.eval_batch_size)))


def shrink(
    model: Any,
    batches: Iterable[Any] = (),
    held_out: Iterable[Any] = (),
    *,
    keep: float = DEFAULT_KEEP,
    loss: Loss = model_loss,
    max_rank: int | None = None,
    on: str = "eval",
) -> Shrunk:
    """Shrink a LoRA after training, to the smallest size found that keeps a share of its gain.

        trainer.train()
        print(lrlora.shrink(trainer, keep=0.99))
        trainer.save_model("small")

    The adapter becomes smaller, not better, and stays a plain LoRA. The whole one is saved before, in the folder
    `whole` (then `whole-2`, …) of the Trainer's output folder. A LoRA that is trained at this size may gain more or
    less. It measures about six times the loss of 150 to 600 held-out examples, as many as cost a tenth of the
    training.

    Call it on every process.

    Args:
        model: Trainer after training, of transformers, TRL or sentence-transformers; or a PEFT model, with `batches`.
        batches: training batches, on the model's device, for the gradients; the same on every process.
        held_out: batches that were not trained on, for the losses; the same on every process.
        keep: share of the gain, in (0, 1).
        loss: of batches: returns the sum of the loss terms of each example, and their number, both (examples,).
        max_rank: largest rank of any module.
        on: "eval" for the Trainer's evaluation data, or "train" for its training data, which it may have learned by
            heart.

    Raises:
        ValueError: there are too few held-out examples, or no gain; or the adapter cannot be cut.

    """
    check_truncation(keep=keep)
    trainer = model if hasattr(model, "compute_loss") else None
    live = peft_model(model if trainer is None else trainer.model)
    adapter = require_plain_lora(live)
    folder = None
    if trainer is not None:
        require_measurable(trainer, on)
        folder = _save_whole(live, adapter, Path(str(trainer.args.output_dir)))
    with _at_rest(live, trainer):
        source = (
            _Source.of_batches(live, batches, held_out, loss)
            if trainer is None
            else _Source.of_trainer(trainer, live, on)
        )
        if len(source.held_out) < PARTS:
            raise ValueError(too_few(f"{len(source.held_out)} batches of held-out data"))
        _tell_cost(source, trainer)
        before = None if trainer is None else _metrics(trainer, on)
        stored = [full_value(weight).clone() for weight in _weights(live, adapter)]
        try:
            factors, found = _search(live, adapter, source, keep, max_rank)
        except BaseException:
            for weight, value in zip(_weights(live, adapter), stored, strict=True):
                write(weight, value)
            raise
        put(live, adapter, factors)
        if before is not None:
            after = _metrics(trainer, on)
            found = replace(found, metrics={name: [value, after[name]] for name, value in before.items()})
    _make_small(live, adapter, found, getattr(trainer, "optimizer", None))
    if folder is not None and process_index() == 0:
        write_json(folder / SHRUNK_FILE, asdict(found))
    return found


def require_measurable(trainer: Trainer, on: str) -> None:
    """Raise ValueError for a Trainer whose loss does not tell what its adapter gained."""
    if any(hasattr(trainer, name) for name in ("reward_funcs", "reward_model", "value_model")):
        raise ValueError(
            f"The loss of {type(trainer).__name__} on stored data does not tell what the adapter gained. Save it, and "
            "cut it by data: lrlora export ADAPTER --keep 0.99 --data FILE --output SMALL"
        )
    if on not in ("eval", "train"):
        raise ValueError(f"on must be eval or train, got {on!r}.")
    if on == "train":
        return
    data: Any = trainer.eval_dataset
    if data is None:
        raise ValueError(
            "shrink measures the gain on held-out data, but the Trainer has no eval_dataset. Pass one, or on='train' "
            "for the data that was trained on."
        )
    if isinstance(data, dict):
        raise ValueError("shrink measures the gain on one evaluation set, but the Trainer has several. Pass one.")
    if hasattr(data, "__len__") and len(data) < PARTS * FEWEST_UNITS:
        raise ValueError(too_few(f"{len(data)} held-out examples"))


@contextlib.contextmanager
def _at_rest(model: PeftModel, trainer: Any) -> Iterator[None]:
    """Evaluation mode, without gradients of parameters; what TRL counts for its log stays as it is."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counted = copy.deepcopy(getattr(trainer, "_metrics", None))
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad = True
        if counted is not None:
            trainer._metrics = counted


def _weights(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    return [weight for layer in lora_layers(model, adapter).values() for weight in lora_weights(layer, adapter)]


def _save_whole(model: PeftModel, adapter: str, output: Path) -> Path:
    """Save the whole adapter in the first folder of whole, whole-2, … that does not exist or has the same."""
    state = None
    if not is_whole(model):
        trained = {name: full_value(p).to(p.dtype) for name, p in model.named_parameters() if p.requires_grad}
        state = {name: value.cpu() for name, value in trained.items()}
    names = chain([WHOLE_FOLDER], (f"{WHOLE_FOLDER}-{number}" for number in count(2)))
    folder = output / WHOLE_FOLDER
    if process_index():
        return folder
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, suffix=".partial") as scratch:
        new = Path(scratch) / WHOLE_FOLDER
        model.save_pretrained(str(new), selected_adapters=[adapter], state_dict=state)
        if adapter != "default":
            new /= adapter
        for folder in (output / name for name in names):
            if not folder.exists():
                new.rename(folder)
                break
            if _is_same(folder, new):  # of a process that was killed
                break
    return folder


def _is_same(folder: Path, other: Path) -> bool:
    """Whether two folders have the same adapter."""
    first, second = (path / SAFETENSORS_WEIGHTS_NAME for path in (folder, other))
    if not (first.exists() and second.exists()):
        return False
    mine, theirs = load_file(first), load_file(second)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _tell_cost(source: _Source, trainer: Trainer | None) -> None:
    passes = PASSES * len(source.held_out) + 3 * len(source.training)
    line = f"Shrinking takes about {passes:,} forward passes of a batch"
    if trainer is not None:
        steps = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        line += f"; training took {steps:,} forward and backward passes"
    if process_index() == 0:
        tqdm.write(f"{line}.")


def _metrics(trainer: Any, on: str) -> dict[str, float]:
    """Metrics of the task on the held-out sample; empty without any."""
    if (evaluator := getattr(trainer, "evaluator", None)) is not None:  # of sentence-transformers
        return {name: float(value) for name, value in evaluator(trainer.model).items()}
    if trainer.compute_metrics is None:
        return {}
    data = _sample(trainer.train_dataset if on == "train" else trainer.eval_dataset, _examples(trainer))
    with contextlib.suppress(TypeError):  # of logits that are not gathered
        found = trainer.predict(data, metric_key_prefix="").metrics
    known = {name.removeprefix("_"): value for name, value in found.items() if isinstance(value, (int, float))}
    speed = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {name: float(value) for name, value in known.items() if name not in speed}


def _moments(model: PeftModel, adapter: str, source: _Source, whole: Sequence[Factors]) -> dict[str, Moments]:
    """Moments of the modules, from the gradients of the training batches of all processes."""
    layers = lora_layers(model, adapter)
    device = lora_weights(next(iter(layers.values())), adapter)[0].device
    moments = {part.module: Moments.zeros(part, device) for part in whole if part.energy}
    if not moments:
        raise ValueError("The adapter gains nothing: all of its updates are zero. Train it first.")

    def collect(path: str, down: nn.Module, inputs: Any, z: Tensor) -> None:
        if torch.is_grad_enabled():
            watch(z.requires_grad_(), moments[path], channel_dim(down))

    world, batches = processes(), list(source.training)
    batches = batches[: len(batches) - len(batches) % world] or batches * world
    hooks = [layers[path].lora_A[adapter].register_forward_hook(partial(collect, path)) for path in moments]
    try:
        for batch in batches[process_index() :: world]:
            source.loss(batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
    for of in moments.values():
        if world > 1:
            dist.all_reduce(of.sums)
    if idle := [path for path, of in moments.items() if not of.calls]:
        raise ValueError(
            f"No token reached {idle[0]} ({len(idle)} of {len(moments)} modules), so its effect on the loss is "
            "unknown. Provide more training data."
        )
    return {path: of.to("cpu") for path, of in moments.items()}


def _search(
    model: PeftModel, adapter: str, source: _Source, keep: float, max_rank: int | None
) -> tuple[list[Factors], Shrunk]:
    held_out = [source.held_out[at::PARTS] for at in range(PARTS)]
    batches = [*held_out, source.training]
    whole = [source.losses(part) for part in batches]
    if source.sampled is not None and mean_of(whole[-1]) < LEARNED:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            source = replace(source, training=[source.sampled(batch) for batch in source.training])
    factors = lora_factors(model, adapter)
    moments = _moments(model, adapter, source, factors)
    # Others may round otherwise.
    curve = of_first(LossCurve([directions(part, moments.get(part.module), 1) for part in factors]))
    bar = tqdm(total=PASSES * len(source.held_out), desc="Shrinking", unit="batch", disable=process_index() > 0)

    def measure(batches: Sequence[Any], factors: Sequence[Factors]) -> Tensor:
        put(model, adapter, factors)
        bar.update(len(batches))
        return source.losses(batches)

    nothing, known = [of.factors(0) for of in curve.modules], _answers(source.training)

    def without(batches: Sequence[Any]) -> Tensor:
        losses, given = measure(batches, nothing), _answers(batches)
        return losses if known is None or given is None else at_most(losses, constant_losses(given, known))

    *parts, training = (
        Part(losses, partial(without, part), partial(measure, part))
        for losses, part in zip(whole, batches, strict=True)
    )
    factors, found = find_smallest(parts, curve, keep, unit=source.unit, max_rank=max_rank)
    if not source.unit.startswith("training"):
        found = replace(found, training=training.kept(factors).share)
    bar.close()
    return factors, found


def _answers(batches: Sequence[Any]) -> Tensor | None:
    """Labels of single examples; None for tokens or pairs."""
    labels = [batch["labels"].cpu() if isinstance(batch, Mapping) and "labels" in batch else None for batch in batches]
    known = [part for part in labels if part is not None and part.dim() == 1]
    return torch.cat(known) if known and len(known) == len(labels) else None


def _make_small(model: PeftModel, adapter: str, found: Shrunk, optimizer: Any) -> None:
    """Make the live model as small as what is saved; where it is shared or sharded, what is saved alone."""
    if is_whole(model):
        make_small(model, adapter, found.ranks, None if optimizer is None else unwrapped(optimizer)[-1])
        return
    save = SmallSave(model, adapter, 0)
    save.ranks = found.ranks
    setattr(model, "save_pretrained", save)  # noqa: B010 (of this model alone)
    model.register_load_state_dict_pre_hook(partial(pad_state, adapter))
