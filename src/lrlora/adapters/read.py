"""`read_updates`: read the updates of an adapter or checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import is_full_model, require_source
from .full_model import Checkpoint, updates_between
from .lora_file import SingleFile
from .peft_folder import SavedAdapter
from .peft_methods import updates_of_adapter
from .update import Updates


def read_updates(
    source: str | os.PathLike[str] | SavedAdapter | Updates, *, base: str | os.PathLike[str] | None = None
) -> Updates:
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
    if isinstance(source, Updates):
        if base is not None:
            raise ValueError(
                "base cannot be combined with an Updates object, which has already been read. Pass base when reading "
                "the source."
            )
        return source
    if isinstance(source, SavedAdapter):
        return updates_of_adapter(source, None if base is None else os.fspath(base))
    name = os.fspath(source)
    require_source(name, None if base is None else os.fspath(base))
    if Path(name).is_file() and (base is None or SingleFile.is_one(name)):
        return SingleFile.read(name).updates(base)
    if base is not None and (Path(name).is_file() or is_full_model(name)):
        return updates_between(Checkpoint(base), Checkpoint(name))
    return updates_of_adapter(SavedAdapter.read(name), None if base is None else os.fspath(base))
