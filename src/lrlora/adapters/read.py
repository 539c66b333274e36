"""`read_updates`: read the updates of an adapter, whatever its format."""

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
from ..sources import ADAPTER_EXPECTED, require_source
from .checkpoint import Checkpoint
from .lora_file import SingleFile
from .peft_folder import AdapterSource, SavedAdapter
from .products import expert_updates, rank_of, require_shapes, scaling_of, update_from_tensors
from .skeleton import stacks_of_adapter, updates_of_lrlora
from .update import MAGNITUDES_NOTE, Update, Updates

_NAMES = {
    "LRLORA": "LR-LoRA",
    "LORA": "LoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
}
_FROM_FACTORS = ("LORA", "LOHA", "LOKR")
_PART = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.(lora_[AB]|lora_embedding_[AB]|hada_\w+|lokr_\w+)(?:\.weight)?$")


def read_updates(source: AdapterSource, *, base: str | os.PathLike[str] | None = None) -> Updates:
    """Read the updates of an adapter.

    LoRA (with patterns and rsLoRA), LoHa, LoKr and LR-LoRA are read from their factors, without a base model. DoRA is
    read as s·BA, its update of the direction, or in full if `base` is given.

    Args:
        source: folder or hub name of a PEFT adapter; or a single-file LoRA (`.safetensors`) with the keys of kohya,
            ComfyUI, LyCORIS or diffusers.
        base: base model: folder, `.safetensors` file or hub name. Only its tensors are read, one at a time.

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
    require_source(name)
    if Path(name).is_file():
        return _with_weights(SingleFile.read(name).updates(), base)
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
    if kind == "LRLORA":
        with readable(saved.name, ADAPTER_EXPECTED):
            updates = updates_of_lrlora(saved)
    else:
        _require_factors(saved)
        with readable(saved.name, ADAPTER_EXPECTED):
            updates = _from_factors(saved, stacks)
    if not updates:
        raise ValueError(f"{saved.name} contains no adapted layer.")
    is_dora = bool(getattr(config, "use_dora", False))
    notes = (MAGNITUDES_NOTE,) if is_dora and base is None else ()
    directions = _with_weights(Updates(saved.name, method, updates, saved, notes), base)
    if not is_dora or base is None:
        return directions
    with readable(saved.name, ADAPTER_EXPECTED):
        return replace(directions, updates=[_with_magnitudes(update, saved) for update in directions])


def _require_factors(saved: SavedAdapter) -> None:
    """Raise ValueError if an adapter's factors are not its update."""
    config, option = saved.config, variant_option(saved.config)
    if option is None and config.peft_type.value in _FROM_FACTORS:
        return
    kind = method_name(config) if option is None else f"LoRA with {option}={getattr(config, option)!r}"
    way = "path_initial_model_for_weight_conversion" if option == "init_lora_weights" else "save_as_lora"
    raise ValueError(
        f"{saved.name} is an adapter of {kind}, whose update is not in its file alone. Load it, and save it as a plain "
        f"LoRA with PEFT ({way}); `rank_report(model)` measures it as loaded."
    )


def _with_magnitudes(update: Update, saved: SavedAdapter) -> Update:
    """DoRA in full: the rows of W0 + s·BA, scaled to the trained magnitudes, minus W0."""
    magnitudes = saved.weights[f"{PEFT_PREFIX}{update.module}.lora_magnitude_vector"].flatten()
    if len(magnitudes) != update.shape[0]:
        raise ValueError(
            f"{update.module} is an embedding, of which DoRA is read without its magnitudes. Remove --base."
        )

    def matrix() -> Tensor:
        weight, factors = update.weight(), update.factors()
        if weight is None or factors is None:
            raise ValueError(f"The base model has no weight of {update.module}, to which the magnitudes belong.")
        whole = weight.double() + factors[0].double() @ factors[1].double()
        return magnitudes.double()[:, None] * whole / whole.norm(dim=1, keepdim=True) - weight.double()

    return replace(update, compute=matrix, is_product=False, limit=min(update.shape))


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
