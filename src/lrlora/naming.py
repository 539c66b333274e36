"""What the path of a module says: its layer, its place in it, what it is for."""

from __future__ import annotations

import re

# Of the base model in a PEFT model, and so of every name in a saved adapter.
PEFT_PREFIX = "base_model.model."


def path_in_base(path: str) -> str:
    """The path of a module in the base model, from that in the PEFT model."""
    return path.removeprefix(PEFT_PREFIX)


def _parts(path: str) -> list[str]:
    """Of a path what is between its points; of one of kohya's names, which has underscores for them, its numbers."""
    if "." in path:
        return path.split(".")
    return [part.strip("_") for part in re.split(r"_(\d+)(?=_|$)", path) if part]


def natural_order(path: str) -> list[tuple[int, str]]:
    """A key to sort by, with layer.2 before layer.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _parts(path)]


def module_type(path: str) -> str:
    """The place of a module in its layer, its path without the numbers: encoder.layer.3.mlp → encoder.layer.mlp"""
    return ".".join(part for part in _parts(path) if not part.isdecimal())


def layer_index(path: str) -> int | None:
    """Index of the transformer layer that a module is in, None outside one."""
    return next((int(part) for part in _parts(path) if part.isdecimal()), None)


# Not `attentions`, in which diffusers puts the MLP of a block too.
_ATTENTION = re.compile(
    r"att(?!entions)|(^|[._])(q|k|v|o|qkv|query|key|value|q_proj|k_proj|v_proj|o_proj)$", re.IGNORECASE
)
_MLP = re.compile(
    r"mlp|ffn|ff[._]|feed_?forward|intermediate|experts?|densereludense|fc\d|\.output\.dense$", re.IGNORECASE
)


def module_kind(path: str) -> str:
    """What a module is for, by its name: "attention", "mlp" or "other"."""
    if _ATTENTION.search(path):
        return "attention"
    return "mlp" if _MLP.search(path) else "other"


MOST_ROWS = 16  # of a table of modules in a terminal: of more, means by type and layer are shown


def shortened(path: str, room: int) -> str:
    """The path of a module in so many characters: what is too long loses its first parts, and no part is cut."""
    parts = path.split(".")
    first = next((i for i in range(len(parts)) if len(".".join(parts[i:])) + 2 * (i > 0) <= room), len(parts) - 1)
    return ("… " if first else "") + ".".join(parts[first:])
