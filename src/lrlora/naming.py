"""Layer, type and kind of a module, from its path."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

# Prefix of the base model in a PEFT model and in all keys of a saved adapter.
PEFT_PREFIX = "base_model.model."


def _segments(path: str) -> list[str]:
    """Split a path at dots; split kohya's names, which use underscores, at numbers."""
    if "." in path:
        return path.split(".")
    return [segment.strip("_") for segment in re.split(r"_(\d+)(?=_|$)", path) if segment]


def natural_order(path: str) -> list[tuple[int, str]]:
    """Sort key that puts layer.2 before layer.10."""
    return [(int(segment), "") if segment.isdecimal() else (-1, segment) for segment in _segments(path)]


def module_type(path: str) -> str:
    """Path of a module within its layer, without numbers: encoder.layer.3.mlp → encoder.layer.mlp"""
    return ".".join(segment for segment in _segments(path) if not segment.isdecimal())


# What holds layers, at the end of a stack's path; and blocks inside of blocks, as in the U-Net of SDXL.
_CONTAINER = re.compile(r"[._](text_model[._]encoder[._]layers|layers?|blocks?|h)$")
_NESTED = re.compile(r"(blocks|attentions|resnets)$")


def stack_of(path: str) -> str | None:
    """Short name of the stack of layers around a module, such as te1 and unet_input; None outside of layers."""
    segments = _segments(path)
    first = next((i for i, segment in enumerate(segments) if segment.isdecimal()), None)
    return None if first is None else _CONTAINER.sub("", ".".join(segments[:first]).removeprefix("lora_"))


def has_several_stacks(paths: Iterable[str]) -> bool:
    """Whether modules are in more than one stack, such as an encoder and a decoder."""
    return len({stack for path in paths if (stack := stack_of(path)) is not None}) > 1


def position_in_stack(path: str) -> str | None:
    """Numbers of the layer and of the blocks nested in it, such as 4.1.0; None outside of layers."""
    numbers: list[str] = []
    is_open = True
    for segment in _segments(path):
        if not segment.isdecimal():
            is_open = not numbers or _NESTED.search(segment) is not None
        elif is_open:
            numbers.append(segment)
    return ".".join(numbers) or None


def place_in_layer(path: str) -> str:
    """Path of a module within its layer: encoder.layer.3.attention.query → attention.query"""
    segments = _segments(path)
    first = next((i for i, segment in enumerate(segments) if segment.isdecimal()), -1)
    names = [segment for segment in segments[first + 1 :] if not segment.isdecimal()]
    return ".".join([segment for segment in names if not _NESTED.search(segment)] or names)


def type_label(path: str, *, with_stack: bool) -> str:
    """Module type in a table: the path without numbers, or the stack and the place in its layer."""
    stack = stack_of(path)
    return f"{stack} {place_in_layer(path)}" if with_stack and stack is not None else module_type(path)


def layer_index(path: str) -> int | None:
    """Index of a module's transformer layer, None outside of layers."""
    return next((int(segment) for segment in _segments(path) if segment.isdecimal()), None)


# Excludes `attentions`, which in diffusers also contains a block's MLP.
_ATTENTION = re.compile(
    r"att(?!entions)|(^|[._])(q|k|v|o|qkv|query|key|value|q_proj|k_proj|v_proj|o_proj)$", re.IGNORECASE
)
_MLP = re.compile(
    r"mlp|ffn|ff[._]|feed_?forward|intermediate|experts?|densereludense|fc\d|\.output\.dense$", re.IGNORECASE
)


def module_kind(path: str) -> str:
    """Kind of a module, from its name: "attention", "mlp" or "other"."""
    if _ATTENTION.search(path):
        return "attention"
    return "mlp" if _MLP.search(path) else "other"


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """First pattern that matches a module, like PEFT's `get_pattern_key`; else the module.

    `re` caches 512 patterns; beyond that, PEFT recompiles each of them for every module.
    """
    return next((key for key, pattern in _compiled(tuple(patterns)) if pattern.match(module)), module)


@functools.lru_cache(maxsize=4)  # for ranks and α, of source and target
def _compiled(patterns: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    return [(key, re.compile(rf"(.*\.)?({key})$")) for key in patterns]


def pattern_of(path: str, paths: Iterable[str]) -> str:
    """Key of `rank_pattern` for one module; PEFT matches a plain key with any path that ends in it."""
    return f"^{path}" if any(longer_path.endswith(f".{path}") for longer_path in paths) else path
