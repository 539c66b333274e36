"""GPU memory and hours required by a comparison's jobs, before anything is loaded.

One step of a model with one layer, and with two, runs on PyTorch's meta device, which has shapes but no data: PyTorch
counts operations and tensors saved for backward. Larger numbers of layers are extrapolated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from lrlora.train.methods import adapter_config
from lrlora.train.models import model_source
from lrlora.train.tasks import KINDS, Kind, kind_for
from lrlora.tuner.config import EXPANSION

from .jobs import Comparison
from .methods import Method, find_method
from .suite import Suite, Task

GIB = 2**30
# Peak rates of an A100, of which training is assumed (not measured) to reach two fifths.
GPU, _HALF, _TF32, _SINGLE, _UTILISATION = "A100", 312e12, 156e12, 19.5e12, 0.4
_ADAM, _GRADIENT, _FLOAT32 = 8, 4, 4  # bytes per trained number
_CHOICES = 4


@dataclass(frozen=True)
class Needs:
    """Requirements of one job; bytes and floating-point operations of a training step, padded to the maximum length.

    Memory is for training only. Evaluations use batches four times as large (for choices by likelihood, all choices of
    a quarter batch) without saving for backward and are not counted: with a large vocabulary, the float32 logits of all
    those choices may take as much memory as a training step saves.

    Attributes:
        parameters: of the base model.
        trainable: of these, or of the adapter and a new head.
        weights, trained, activations: bytes of the base model; of trained parameters, gradients and Adam's moments; of
            tensors saved for backward.
        operations: of a training step.
        hours: GPU hours of all steps, without evaluations.

    """

    parameters: float
    trainable: float
    weights: float
    trained: float
    activations: float
    operations: float
    hours: float

    @property
    def gib(self) -> float:
        """Memory in GiB, excluding CUDA's own."""
        return (self.weights + self.trained + self.activations) / GIB


@dataclass(frozen=True)
class _Step:
    """Requirements of a step at some number of layers."""

    parameters: float
    trainable: float
    kept: float
    forward: float
    operations: float
    adapted: float  # number of entries of adapted weights
    widest: float  # number of entries of the largest one
    inputs: float  # bytes of a transformer layer's input
    tokens: float

    def extended(self, second: _Step, layers: int) -> _Step:
        """Extrapolate from one and two layers."""
        names = ("parameters", "trainable", "kept", "forward", "operations", "adapted")
        grown = {name: getattr(self, name) * (2 - layers) + getattr(second, name) * (layers - 1) for name in names}
        return _Step(**grown, widest=self.widest, inputs=self.inputs, tokens=self.tokens)


def needs(suite: Suite, task: Task, method: Method, rank: int) -> Needs:
    """Requirements of a job.

    Raises:
        FileNotFoundError: the model's configuration is missing.
        RuntimeError: it lacks a field, or PyTorch's meta device does not support the step.
        ValueError: the method cannot be set up without weights.

    """
    layout = _Layout.of(suite, task, method, rank)
    layers = layout.told("num_hidden_layers")
    first = layout.measured(1)
    step = first.extended(layout.measured(2), layers)
    kept, operations = step.kept, step.operations
    if suite.training.get("gradient_checkpointing"):  # all layer inputs and one layer's activations; second forward
        kept = first.kept + layers * step.inputs
        operations += step.forward - first.forward
    if method.train == "lr-lora" and method.options.get("form") != EXPANSION:
        kept += 2 * _FLOAT32 * step.widest  # φ(BA), and the weight gradient that it needs
        operations += 2 * step.tokens * step.adapted
    of_each = _GRADIENT + _ADAM + (0 if method.train == "full" else _FLOAT32)
    return Needs(
        parameters=step.parameters,
        trainable=step.trainable,
        weights=step.parameters * layout.stored.itemsize,
        trained=step.trainable * of_each,
        activations=kept,
        operations=operations,
        hours=operations * task.steps / (_UTILISATION * layout.peak) / 3600,
    )


@dataclass(frozen=True)
class _Layout:
    """A model with a method, for a step without its weights."""

    suite: Suite
    task: Task
    method: Method
    rank: int
    source: str
    config: Any
    kind: Kind

    @classmethod
    def of(cls, suite: Suite, task: Task, method: Method, rank: int) -> _Layout:
        source = model_source(suite.model)
        config = AutoConfig.from_pretrained(source)
        kind = kind_for(task.task, config)
        config.problem_type = "regression" if kind.name == "regress" else "single_label_classification"
        if kind.name == "regress":
            config.num_labels = 1
        return cls(suite, task, method, rank, source, config, kind)

    @property
    def stored(self) -> torch.dtype:
        """Of the base weights."""
        is_single = self.kind.has_head or self.method.train == "full"
        return torch.float32 if is_single else self.config.dtype or torch.float32

    @property
    def computed(self) -> torch.dtype:
        is_mixed = self.suite.training.get("bf16") or self.suite.training.get("fp16")  # of equal size and speed
        return torch.bfloat16 if is_mixed else self.stored

    @property
    def peak(self) -> float:
        """Operations per second. The Trainer enables TF32 only on request."""
        if self.computed != torch.float32:
            return _HALF
        return _TF32 if self.suite.training.get("tf32") else _SINGLE

    def told(self, name: str) -> int:
        """Optional field of the model's configuration."""
        value: int | None = getattr(self.config, name, None)
        if value is None:
            raise RuntimeError(f"The configuration of {self.suite.model} has no {name}.")
        return value

    def measured(self, layers: int) -> _Step:
        """Step with `layers` layers."""
        with torch.device("meta"):
            base = self._base(layers)
            parameters = sum(p.numel() for p in base.parameters())
            model, adapted = self._adapted(base)
            batch = self._batch()
        kept: dict[int, Tensor] = {}
        weights = {id(p) for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            base = tensor if tensor._base is None else tensor._base
            if id(base) not in weights:
                kept[id(base)] = base
            return tensor

        model.train()
        forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        with backward:
            loss.backward()
        width = self.told("hidden_size")
        hidden = next(each for each in kept.values() if each.dim() == 3 and each.shape[-1] == width)
        return _Step(
            parameters=parameters,
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            kept=sum(each.numel() * each.element_size() for each in kept.values()),
            forward=forward.get_total_flops(),
            operations=forward.get_total_flops() + backward.get_total_flops(),
            adapted=sum(adapted),
            widest=max(adapted),
            inputs=hidden.numel() * self.computed.itemsize,
            tokens=hidden.numel() / width,
        )

    def _base(self, layers: int) -> Any:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return self.kind.model_class.from_config(config, dtype=self.computed)

    def _adapted(self, model: Any) -> tuple[Any, list[int]]:
        """Model with the method, and the sizes of the adapted or trained weights."""
        method = self.method
        if method.train == "full":
            return model, [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
        # LR-LoRA is set up as LoRA, which has the same factors; φ is counted separately.
        train = "lora" if method.train == "lr-lora" else method.train
        options = {k: v for k, v in method.options.items() if train == method.train or k in ("r", "target_modules")}
        given = {**self.suite.adapter, **replace(method, train=train, options=options).adapter(self.rank)}
        wanted = adapter_config(train, self.kind.adapter_fields, max(self.task.steps, 100), given)
        assert wanted is not None  # not full fine-tuning
        adapted = get_peft_model(model, wanted)
        names = set(adapted.targeted_module_names)
        modules: Any = adapted.get_base_model().named_modules()
        return adapted, [module.weight.numel() for name, module in modules if name in names]

    def _batch(self) -> dict[str, Tensor]:
        """Batch of a training step, with texts of maximum length."""
        kind, size = self.kind, self.task.batch_size
        labels = torch.zeros(size, dtype=torch.float32 if kind.name == "regress" else torch.long)
        if not kind.reads_text:
            processor = kind.load_processor(self.source)
            last = "crop_size" if getattr(processor, "do_center_crop", False) else "size"
            edges = getattr(processor, last, None) or {}
            if "height" not in edges or "width" not in edges:
                raise RuntimeError(f"The image size for {self.suite.model} depends on the input image.")
            pixels = torch.zeros(size, 3, edges["height"], edges["width"], dtype=self.computed)
            return {"pixel_values": pixels, "labels": labels}
        if self.task.max_length is None:
            raise ValueError("The length of its texts is unknown before they are read.")
        choices = (_CHOICES,) if kind.has_head and kind.name == "multiple-choice" else ()
        ids = torch.zeros(size, *choices, self.task.max_length, dtype=torch.long)
        return {"input_ids": ids, "labels": labels if kind.has_head else ids}


@dataclass(frozen=True)
class Planned:
    """Jobs of one method on one task."""

    task: str
    method: str
    jobs: int
    needs: Needs | None  # None if unknown


def planned(comparison: Comparison) -> list[Planned]:
    """Planned cells of a comparison, with a job's requirements."""
    jobs = comparison.plan({})
    left = comparison.cells_left(jobs)
    cells = []
    for name in comparison.task_names:
        task = comparison.definition.tasks[name]
        for key in comparison.methods_of(name):
            found = None
            if isinstance(task, Task):
                found = _needs_if_known(comparison, task, key)
            cells.append(Planned(name, find_method(key).name, left.count((name, key)), found))
    return cells


def _needs_if_known(comparison: Comparison, task: Task, key: str) -> Needs | None:
    if task.max_length is None and KINDS[task.task].reads_text:
        return None  # its texts may be of any length
    try:
        return needs(comparison.definition, task, find_method(key), comparison.r)
    except RuntimeError:  # a field is missing, or the meta device does not support it
        return None
