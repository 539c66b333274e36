"""`read_updates`: read the updates of an adapter or checkpoint.

Adapters in PEFT's format are read from their factors if sufficient, else through PEFT on a skeleton model.
"""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..files import ADAPTER_EXPECTED, is_full_model, readable, require_source
from ..naming import PEFT_PREFIX, natural_order, pattern_key
from .full_model import Checkpoint, updates_between, with_weight
from .layers import updates_of_model
from .lora_file import SingleFile
from .peft_folder import AdapterSource, SavedAdapter, require_all_weights, require_reproducible_start
from .products import rank_of, scaling_of, update_from_parts
from .update import MAGNITUDES_NOTE, Layout, Update, Updates, beyond_factors

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
# Methods that also change a layer's bias.
_WITH_BIAS = ("IA3", "GLORA", "BEFT", "ROAD", "OSF")
_BIAS_NOTE = "This method also changes biases, which are included neither in the ranks nor in an exported LoRA."
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
    if Path(name).is_file() and (base is None or SingleFile.is_one(name)):
        return SingleFile.read(name).updates(base)
    if base is not None and (Path(name).is_file() or is_full_model(name)):
        return updates_between(Checkpoint(base), Checkpoint(name))
    return _updates_of_adapter(SavedAdapter.read(name), base)


def _updates_of_adapter(saved: SavedAdapter, base: str | None) -> Updates:
    """Updates of a saved adapter; `base` is needed only where its weights are, and then defaults to the adapter's."""
    config = saved.config
    if config.peft_type is None:
        raise ValueError(f"{saved.name} does not contain a readable adapter: it names no method. {ADAPTER_EXPECTED}")
    method = config.peft_type.value
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or not issubclass(tuner, BaseTuner):
        raise ValueError(
            f"{saved.name} is an adapter of type {method}, which adds no matrix to any weight and so has no rank."
        )
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"{saved.name} adapts parameters of modules ({', '.join(config.target_parameters)}), which cannot be told "
            "apart without the base model. Load the adapter on it and call `rank_report(model)`."
        )
    notes: tuple[str, ...] = ()
    is_whole = base is not None and getattr(config, "use_dora", False)
    if method == "LRLORA":
        with readable(saved.name, ADAPTER_EXPECTED):
            # Convolutions and embeddings look like linear layers in its files.
            linear = updates_of_model(load_on_skeleton(saved))
            updates = [replace(update, layout=Layout(is_known=False)) for update in linear]
    elif method in _FROM_FACTORS and not is_whole and beyond_factors(config) is None:
        with readable(saved.name, ADAPTER_EXPECTED):
            updates = _from_factors(saved)
        if getattr(config, "use_dora", False):
            notes = (MAGNITUDES_NOTE,)
    else:
        updates, notes = _through_peft(saved, base)
        base = None  # they have their weights
    if not updates:
        raise ValueError(f"{saved.name} contains no adapted layer.")
    if base is not None:
        weights = Checkpoint(base)
        updates = [with_weight(update, weights) for update in updates]
    return Updates(saved.name, method_name(config), updates, saved, notes)


def method_name(config: Any) -> str:
    """Common name of the adapter's method."""
    method = config.peft_type.value
    return "DoRA" if getattr(config, "use_dora", False) else _NAMES.get(method, method)


def _from_factors(saved: SavedAdapter) -> list[Update]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key in sorted(saved.weights, key=natural_order):
        if match := _PART.match(key):
            parts.setdefault(match[1], {})[match[2]] = saved.weights[key]
    config = saved.config.to_dict()
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    usual: int = config["r"]
    updates = []
    for module, tensors in parts.items():
        # A LoKr stored in full on both sides divides α by an r that no shape shows.
        r = ranks.get(pattern_key(ranks, module), usual)
        if (rank := rank_of(tensors)) not in (None, r):
            raise ValueError(f"the factors of {module} have rank {rank}, but adapter_config.json has {r}")
        updates.append(update_from_parts(module, tensors, scaling_of(config, module, r), of_peft=True))
    return updates


def load_on_skeleton(saved: SavedAdapter) -> PeftModel:
    """Load an LR-LoRA adapter onto a model of its adapted layers only, as linear layers.

    The result can be measured but not run. The skeleton's weights are zeros that take no memory.
    """
    weights = saved.weights
    layers: dict[str, nn.Module] = {}
    for key in sorted((key for key in weights if key.endswith(".lrlora_A.weight")), key=natural_order):
        m, n = len(weights[key.replace("_A.", "_B.")]), weights[key].shape[1]
        with torch.device("meta"):
            linear = nn.Linear(n, m, bias=False)
        linear.weight = nn.Parameter(torch.zeros(()).expand(m, n), requires_grad=False)
        layers[key.removesuffix(".lrlora_A.weight").removeprefix(PEFT_PREFIX)] = linear
    if not layers:
        raise ValueError(f"{saved.name} contains no adapted linear layer.")
    return _on_skeleton(saved, layers)


def _on_skeleton(saved: SavedAdapter, layers: dict[str, nn.Module]) -> PeftModel:
    """Load the adapter onto a model of these layers."""
    config = copy.deepcopy(saved.config)
    skeleton = nn.Module()
    skeleton.name_or_path = config.base_model_name_or_path  # PEFT writes it into the configuration
    for path, layer in layers.items():
        _place(skeleton, path, layer)
    # The skeleton has only the adapted layers, so the original selection no longer applies.
    chosen = {"target_modules": set(layers), "fan_in_fan_out": any(isinstance(x, Conv1D) for x in layers.values())}
    nothing = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices")
    for name, value in (chosen | dict.fromkeys(nothing)).items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.task_type = None
    model = get_peft_model(skeleton, config)
    # Files may also contain base model weights: embeddings, heads, biases.
    set_peft_model_state_dict(model, saved.method_weights)
    require_all_weights(model, saved)
    return model


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _through_peft(saved: SavedAdapter, base: str | None) -> tuple[list[Update], tuple[str, ...]]:
    """Updates that depend on the base weight or its shape: PEFT merges each, and ΔW is the difference."""
    config = saved.config
    require_reproducible_start(saved)
    name = base or saved.base_model
    if not name:
        raise ValueError(f"{_why(saved)} The adapter does not name one. Pass it (base=, --base).")
    try:
        weights = Checkpoint(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{_why(saved)} {error}") from None
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    adapted = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.{re.escape(prefix)}")
    matches = (adapted.match(key) for key in sorted(saved.weights, key=natural_order))
    paths = list(dict.fromkeys(match[1] for match in matches if match))
    if not paths:
        raise ValueError(
            f"{saved.name} does not name its adapted modules, because its method has one tensor for all of them."
        )
    originals = {path: _weight_of(path, weights, saved) for path in paths}
    if weights.on_meta is not None:
        # Some methods index the modules in model order.
        order = {name: place for place, (name, _) in enumerate(weights.on_meta.named_parameters())}
        originals = dict(sorted(originals.items(), key=lambda item: order.get(item[1], len(order))))
    layers = {path: _layer(weights, key, saved) for path, key in originals.items()}
    with readable(saved.name, ADAPTER_EXPECTED):
        model = _on_skeleton(saved, layers)
        updates = list(updates_of_model(model, original=lambda path: weights.read(originals[path])))
    has_bias = any(getattr(layer, "bias", None) is not None for layer in layers.values())
    return updates, (_BIAS_NOTE,) if has_bias and config.peft_type.value in _WITH_BIAS else ()


def _weight_of(path: str, base: Checkpoint, saved: SavedAdapter) -> str:
    """Name of a module's weight in the base model; must be a matrix."""
    key = base.weight_of(path)
    if key is None:
        raise ValueError(f"{_why(saved)} {base.name} has no weight for {path}.")
    if len(base.shape(key)) < 2:
        raise ValueError(f"{saved.name} changes {key}, which is a vector and has no rank.")
    return key


def _why(saved: SavedAdapter) -> str:
    return f"{saved.name} is a {method_name(saved.config)} adapter, whose update depends on the base model."


def _layer(base: Checkpoint, key: str, saved: SavedAdapter) -> nn.Module:
    """Layer for a base model weight, of its class in the model or inferred from its shape."""
    # float32: subtracting an initial BA from a half-precision weight would round.
    weight = base.read(key).float()
    found = None if base.on_meta is None else dict(base.on_meta.named_modules()).get(key.removesuffix(".weight"))
    module = f".{key.removesuffix('.weight')}."
    names = [name for name in saved.weights if module in f".{name}"]
    is_embedding = isinstance(found, nn.Embedding) or any("_embedding_" in name for name in names)
    is_conv1d = isinstance(found, Conv1D) or (found is None and bool(getattr(saved.config, "fan_in_fan_out", False)))
    layer: Any
    first, second, *kernel = weight.shape
    with torch.device("meta"):
        if kernel:
            kinds: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            layer = kinds[len(kernel) - 1](second, first, tuple(kernel))
        elif is_embedding:
            layer = nn.Embedding(first, second)
        else:
            layer = Conv1D(second, first) if is_conv1d else nn.Linear(second, first)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if not is_embedding:
        bias = f"{key.removesuffix('.weight')}.bias"
        outputs = weight.shape[1] if is_conv1d else len(weight)
        values = base.read(bias).float() if bias in base else torch.zeros(outputs) if is_conv1d else None
        layer.bias = None if values is None else nn.Parameter(values, requires_grad=False)
    return layer
