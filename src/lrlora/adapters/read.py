"""`read_updates`: read the updates of an adapter or checkpoint, whatever its format.

Adapters in PEFT's format are read from their factors if sufficient, else through PEFT on a skeleton model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from ..files import readable
from ..lora.config import variant_option
from ..lora.factors import Layout, Stack
from ..naming import PEFT_PREFIX, natural_order, pattern_key
from ..sources import ADAPTER_EXPECTED, is_full_model, require_source
from .full_model import Checkpoint, updates_between
from .lora_file import SingleFile
from .peft_folder import AdapterSource, SavedAdapter
from .products import expert_updates, rank_of, require_shapes, scaling_of, update_from_tensors
from .skeleton import stacks_of_adapter, updates_of_lrlora, updates_through_peft
from .update import MAGNITUDES_NOTE, Update, Updates

_NAMES = {
    "LRLORA": "LR-LoRA",
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "HIRA": "HiRA",
    "VERA": "VeRA",
    "RANDLORA": "RandLoRA",
    "FOURIERFT": "FourierFT",
    "IA3": "(IA)³",
}
_FROM_FACTORS = ("LORA", "LOHA", "LOKR")
_PART = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.(lora_[AB]|lora_embedding_[AB]|hada_\w+|lokr_\w+)(?:\.weight)?$")


def read_updates(source: AdapterSource, *, base: str | os.PathLike[str] | None = None) -> Updates:
    """Read the updates of an adapter, or the changes made by full fine-tuning.

    LoRA (with patterns and rsLoRA), LoHa, LoKr and LR-LoRA are read from their factors, without a base model. All other
    PEFT methods that change a weight (HiRA, VeRA, RandLoRA, FourierFT, OFT, (IA)³, …, and LoRA initialized with PiSSA
    or OLoRA) use PEFT's own merge into the base weights, one module at a time. DoRA is read as s·BA, its update of the
    direction, or in full if `base` is given.

    Args:
        source: folder or hub name of a PEFT adapter; a single-file LoRA (`.safetensors`) with the keys of kohya,
            ComfyUI, LyCORIS or diffusers; or a full model (folder or file), which requires `base`.
        base: base model: folder, `.safetensors` file or hub name. Only its tensors are read, one at a time; where PEFT
            merges, this takes the memory of the adapted weights in float32.

    Raises:
        ValueError: the source cannot be read, with the reason; or a required base model is missing.

    Examples:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> tensors = {"up.lora_down.weight": torch.eye(2, 8), "up.lora_up.weight": torch.eye(4, 2)}
        >>> save_file(tensors, "tiny.safetensors")
        >>> [(update.module, update.shape, update.r) for update in read_updates("tiny.safetensors")]
        [('up', (4, 8), 2)]

    """
    base = None if base is None else os.fspath(base)
    if isinstance(source, SavedAdapter):
        return _updates_of_adapter(source, base)
    name = os.fspath(source)
    require_source(name, base)
    is_file = Path(name).is_file()
    if is_file and (base is None or SingleFile.is_one(name)):
        return _with_weights(SingleFile.read(name).updates(), base)
    if base is not None and (is_file or is_full_model(name)):
        return updates_between(Checkpoint(base), Checkpoint(name))
    return _updates_of_adapter(SavedAdapter.read(name), base)


def _updates_of_adapter(saved: SavedAdapter, base: str | None) -> Updates:
    """Updates of a saved adapter; `base` is needed only where its weights are, and then defaults to the adapter's."""
    config = saved.config
    kind, method = config.peft_type.value, method_name(config)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or not issubclass(tuner, BaseTuner):
        raise ValueError(
            f"{saved.name} is an adapter of type {kind}, which adds no matrix to any weight and so has no rank."
        )
    has_stacks = bool(getattr(config, "target_parameters", None))
    stacks = stacks_of_adapter(saved, base) if has_stacks else {}
    if has_stacks and base is not None and not _has_weights(base):
        base = None  # the configuration was enough
    is_dora = bool(getattr(config, "use_dora", False))
    notes: tuple[str, ...] = ()
    if kind == "LRLORA":
        with readable(saved.name, ADAPTER_EXPECTED):
            updates = updates_of_lrlora(saved)
    elif kind in _FROM_FACTORS and variant_option(config) is None and not (is_dora and base is not None):
        with readable(saved.name, ADAPTER_EXPECTED):
            updates = _from_factors(saved, stacks)
        notes = (MAGNITUDES_NOTE,) if is_dora else ()
    else:
        updates, notes = updates_through_peft(saved, base, method)
        base = None  # they have their weights
    if not updates:
        raise ValueError(f"{saved.name} contains no adapted layer.")
    return _with_weights(Updates(saved.name, method, updates, saved, notes), base)


def method_name(config: Any) -> str:
    """Common name of the adapter's method."""
    method = config.peft_type.value
    return "DoRA" if getattr(config, "use_dora", False) else _NAMES.get(method, method)


def _has_weights(base: str) -> bool:
    """Whether a base model's weights are here: those of a large mixture are not downloaded for a norm."""
    path = Path(base)
    return path.is_file() or any(path.glob("*.safetensors"))


def _from_factors(saved: SavedAdapter, stacks: Mapping[Stack, tuple[int, int]]) -> list[Update]:
    by_module = {stack.module: stack for stack in stacks}
    modules: dict[str, dict[str, Tensor]] = {}
    for key in sorted(saved.weights, key=natural_order):
        if match := _PART.match(key):
            modules.setdefault(match[1], {})[match[2]] = saved.weights[key]
    config = saved.config.to_dict()
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    default: int = config["r"]
    updates: list[Update] = []
    for module, tensors in modules.items():
        if (stack := by_module.get(module)) is not None:
            r = ranks.get(pattern_key(ranks, stack.parameter), default)
            factors = tensors["lora_A"], tensors["lora_B"]
            require_shapes(saved.name, stack, factors, r, stacks[stack])
            updates += expert_updates(stack, factors, scaling_of(config, stack.parameter, r))
            continue
        # A LoKr stored in full on both sides divides α by an r that no shape shows.
        r = ranks.get(pattern_key(ranks, module), default)
        if (rank := rank_of(tensors)) not in (None, r):
            raise ValueError(f"the factors of {module} have rank {rank}, but adapter_config.json has {r}")
        updates.append(update_from_tensors(module, tensors, scaling_of(config, module, r), from_peft=True))
    return updates


def _with_weights(updates: Updates, base: str | None) -> Updates:
    """Add the weights of the base model, and with them the kernel sizes of convolutions.

    Raises:
        ValueError: a weight has another shape.

    """
    if base is None:
        return updates
    weights = Checkpoint(base)
    return replace(updates, updates=[_with_weight(update, weights) for update in updates])


def _with_weight(update: Update, base: Checkpoint) -> Update:
    if update.layout.stack is not None:
        return _with_expert(update, base)
    key = base.weight_of(update.module)
    if key is None:
        return update  # a task head, which a base model lacks
    shape = base.shape(key)
    if math.prod(shape) != math.prod(update.shape) or shape[0] not in update.shape:
        raise ValueError(
            f"The base model {base.name} does not fit the adapter: {update.module} has shape {shape} in the base "
            f"model, but {update.shape} in the adapter."
        )

    def weight() -> Tensor:
        matrix = base.read(key).flatten(1)
        return matrix if matrix.shape == update.shape else matrix.T

    return replace(update, weight=weight, layout=Layout(shape[2:]) if len(shape) > 2 else update.layout)


def _with_expert(update: Update, base: Checkpoint) -> Update:
    """Add the weights of an expert, if the file of the base model has all experts in one tensor."""
    assert update.layout.stack is not None
    parameter, _, experts = update.layout.stack
    key, expert = base.name_of(parameter), update.expert
    shapes = (update.shape, update.shape[::-1])
    if key is None or base.shape(key) not in [shape if expert is None else (experts, *shape) for shape in shapes]:
        return update

    def weight() -> Tensor:
        matrix = base.read(key) if expert is None else base.read(key)[expert]
        return matrix if matrix.shape == update.shape else matrix.T

    return replace(update, weight=weight)
