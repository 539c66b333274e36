"""YAML files, and NAME=VALUE options, as values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not YAML, or not a mapping.

    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain keys and values, such as `task: classify`.")
    return content


def parse_assignments(assignments: Iterable[str], option: str) -> dict[str, Any]:
    """`name=value` → {name: value}, the value parsed as YAML: numbers, true, lists.

    Raises:
        ValueError: there is no `=`.

    """
    return {name: _parse(value, option) for name, value in parse_pairs(assignments, option).items()}


def parse_pairs(assignments: Iterable[str], option: str) -> dict[str, str]:
    """`name=value` → {name: value}, as text.

    Raises:
        ValueError: there is no `=`.

    """
    values = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} must be name=value, got {assignment!r}.")
        values[name] = value
    return values


# Type and pattern, as in YAML 1.2: YAML 1.1 reads no, off, yes and on as booleans, 1:30 as 90, 010 as 8, and dates.
_TYPES = {
    "null": r"(~|null|Null|NULL|)$",
    "merge": "<<$",
    "bool": r"(true|True|TRUE|false|False|FALSE)$",
    "int": r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$",
    "float": r"[-+]?(\d[\d_]*\.\d*|\.\d+)$|[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}


def _parse(text: str, where: str) -> Any:
    """Parse YAML, with 1e-4 as a number and `no` as a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            None: [(f"tag:yaml.org,2002:{name}", re.compile(pattern)) for name, pattern in _TYPES.items()]
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if duplicates := sorted({name for name in names if names.count(name) > 1}):
                raise yaml.YAMLError(f"the key {duplicates[0]} occurs twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from None
