"""Layer, type and kind of a module, from its path."""

from __future__ import annotations

import re

# Prefix of the base model in a PEFT model and in all keys of a saved adapter.
PEFT_PREFIX = "base_model.model."


def path_in_base(path: str) -> str:
    """Convert a module path in the PEFT model to the base model."""
    return path.removeprefix(PEFT_PREFIX)


def _parts(path: str) -> list[str]:
    """Split a path at dots; split kohya's names, which use underscores, at numbers."""
    if "." in path:
        return path.split(".")
    return [part.strip("_") for part in re.split(r"_(\d+)(?=_|$)", path) if part]


def natural_order(path: str) -> list[tuple[int, str]]:
    """Sort key that puts layer.2 before layer.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _parts(path)]


def module_type(path: str) -> str:
    """Path of a module within its layer, without numbers: encoder.layer.3.mlp → encoder.layer.mlp"""
    return ".".join(part for part in _parts(path) if not part.isdecimal())


def layer_index(path: str) -> int | None:
    """Index of a module's transformer layer, None outside of layers."""
    return next((int(part) for part in _parts(path) if part.isdecimal()), None)


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


MOST_ROWS = 16  # of a terminal table; larger tables show means by type and layer


def shortened(path: str, room: int) -> str:
    """Shorten a module path to `room` characters by dropping leading parts; parts are never cut."""
    parts = path.split(".")
    first = next((i for i in range(len(parts)) if len(".".join(parts[i:])) + 2 * (i > 0) <= room), len(parts) - 1)
    return ("… " if first else "") + ".".join(parts[first:])
