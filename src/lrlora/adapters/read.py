"""`read_updates`: from whatever holds an adapter, or a checkpoint, to its updates."""

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
    """Read the updates of an adapter, or what full fine-tuning has changed.

    LoRA (with patterns and rsLoRA), LoHa, LoKr and LR-LoRA are read from their factors, which needs no base model. All
    other methods of PEFT's that change a weight (HiRA, VeRA, RandLoRA, FourierFT, OFT, (IA)³, …, and LoRA that starts
    as PiSSA or OLoRA) go through PEFT's own merge into the weights of the base model, one module at a time. DoRA is
    read as s·BA, its update of the direction, or whole if `base` is given.

    Args:
        source: folder or hub name of a PEFT adapter; a LoRA in one `.safetensors` file, with the keys of kohya,
            ComfyUI, LyCORIS or diffusers; or a full model (folder or file), for which `base` is needed.
        base: the base model: folder, `.safetensors` file or hub name. Only its tensors are read, one at a time; where
            PEFT merges, that takes the memory of the adapted weights in float32.

    Raises:
        ValueError: there is nothing that can be read, and why; or the base model is needed and not there.

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
            raise ValueError("base is for what is still to be read, and these updates have been read.")
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
