"""Validation of user input and file contents, and safe display."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

DEFAULT_ENERGY = 0.99  # default share of ‖ΔW‖² kept by a plain LoRA
DEFAULT_KEEP = 0.99  # default share of the gain kept by a cut by loss
_LARGEST = 2.0**128 - 2.0**104  # of float32
# All of Cc except tab, bidirectional controls (Unicode's Trojan Source), line breaks, and surrogates.
_OBEYED = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class CannotCutError(ValueError):
    """An adapter, or its gain on the data, does not allow a cut; the adapter stays as it is."""


def printable(line: str) -> str:
    """Escape characters that a terminal would interpret instead of showing, such as colors and line breaks.

    Pass multi-line text line by line.
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), line)


def in_markdown(line: str) -> str:
    """Escape a line for literal display in a Markdown paragraph, heading or table cell."""
    return re.sub(r"[\\`*\[\]<|]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(line))


def require_known(kind: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError with the nearest choice unless `value` is one of the `choices`.

    `kind` is the kind of value, without an article: "task".
    """
    choices = list(choices)
    if value in choices:
        return
    matches = difflib.get_close_matches(str(value), choices, 1, 0.5)
    hint = f" Did you mean {matches[0]}?" if matches else ""
    raise ValueError(f"Unknown {kind} {value!r}.{hint} Known: {', '.join(choices)}.")


_NAMES: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # cached, because it re-evaluates annotations


def require_type(value: Any, kind: Any, name: str) -> None:
    """Raise ValueError, with the location, unless a value from a file matches a type annotation.

    Args:
        value: plain types, or a dataclass or named tuple of them.
        kind: annotation, possibly a TypedDict; float accepts any number.
        name: name of the value in the message.

    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType and inner[1:] == (NoneType,) and value is not None:
        require_type(value, inner[0], name)
    elif is_typeddict(kind) and isinstance(value, dict):
        for key, annotation in _hints(kind).items():
            if key in value:
                require_type(value[key], annotation, f"{name}[{key!r}]")
            elif key in kind.__required_keys__:
                raise ValueError(f"{name} lacks {key!r}.")
    elif is_dataclass(origin) or (isinstance(origin, type) and issubclass(origin, tuple) and origin is not tuple):
        for field, annotation in _hints(origin).items():
            require_type(getattr(value, field), annotation, f"{name}.{field}")
    elif origin in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            require_type(item, inner[0], f"{name}[{index}]")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            require_type(key, inner[0], f"a key of {name}")
            require_type(item, inner[1], f"{name}[{key!r}]")
    elif not is_type(value, kind):
        is_mapping = is_typeddict(kind) or origin is dict
        expected = "map names to values" if is_mapping else f"be {_NAMES.get(kind, getattr(kind, '__name__', kind))}"
        raise ValueError(f"{name} must {expected}, got {value!r:.200}.")


def require_float32(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a number, global or per module, that is NaN or infinite in float32."""
    for name, setting in options.items():
        for value in setting.values() if isinstance(setting, Mapping) else [setting]:
            if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
                raise ValueError(
                    f"{name} {where} must be finite in float32 (at most {_LARGEST:.1e}), got {setting!r:.200}."
                )


def is_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; an integer is a float, but a bool no number."""
    if get_origin(kind) is UnionType:
        return any(is_type(value, member) for member in get_args(kind))
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool  # not a number, although Python says so
    return not is_typeddict(kind) and isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def require_share(keep: object) -> None:
    """Raise ValueError unless a share of the gain is a number between 0 and 1."""
    if not is_type(keep, float) or not 0 < keep < 1:  # type: ignore[operator]
        raise ValueError(f"keep must be a share of the gain in (0, 1), such as 0.99, got {keep!r}.")


def check_truncation(*, energy: float | None = None, max_rank: int | None = None, **alternatives: object) -> None:
    """Raise ValueError unless these define what an export keeps.

    `alternatives` to `energy` are those that the caller offers: `keep`, and a number of parameters under the caller's
    name, or a size that has been parsed.
    """
    options = {"energy": energy, **alternatives}
    names = [name for name, value in options.items() if value is not None]
    if len(names) > 1 or not (names or max_rank is not None):
        raise ValueError(
            f"Pass exactly one of {', '.join(options)}, or max_rank alone; got {' and '.join(names) or 'none'}."
        )
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy!r}.")
    if (keep := alternatives.pop("keep", None)) is not None:
        require_share(keep)
    for name, value in (*alternatives.items(), ("max_rank", max_rank)):
        if isinstance(value, (int, float)) and value < 1:
            raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}.")
