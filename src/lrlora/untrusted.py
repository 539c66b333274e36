"""Validation of an adapter's regular expressions: those that could take forever to match are rejected.

PEFT treats module names as regular expressions (`rank_pattern`, `target_modules`, …) and matches them with every module
of the base model. Python's engine backtracks, and ((.+)+)+Z has exponentially many ways to match. The number of ways is
therefore bounded from the tree that `re` parses a pattern into. A time limit would depend on the machine, require a
process to interrupt it, and not cover the names of a base model, which PEFT matches later.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from .checks import require_type

# `re._parser` is `sre_parse` in Python 3.10. Neither is documented; both have had this tree since Python 2.
_PARSER: Any = vars(re).get("_parser") or vars(re).get("sre_parse")
# Count of an unbounded quantifier: several share the hundred characters of a long name, four of them in (104 over 4) ≈
# 46⁴ ways and five in (105 over 5) ≈ 40⁵.
_PLACES = 40
# Four in a row, as in generated patterns, take the engine a tenth of a second at most; five take seconds, and so do 25
# choices between two.
_MOST_WAYS = 3e7
_LONGEST_NAME = 200  # characters
_LONGEST_PATTERN = 100_000  # an alternation of all modules of a large model
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_GROUPS = ("SUBPATTERN", "ASSERT", "ASSERT_NOT")
_NAMES_ONLY = ("target_modules", "exclude_modules")  # lists hold names; a string is a pattern


def require_quick_patterns(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless all patterns of a PEFT configuration match quickly.

    Args:
        config: its fields; in those named modules or pattern, strings, items and keys are patterns.
        where: origin, for the message: "in its adapter_config.json".

    """
    for field, value in config.items():
        is_whole = isinstance(value, str)
        if re.search("modules|pattern", field) is None:
            continue
        ways = 0.0
        for pattern in [value] if is_whole else value if isinstance(value, (list, tuple, set, dict)) else ():
            require_type(pattern, str, f"a name in {field} {where}")
            if field in _NAMES_ONLY and not is_whole:
                continue
            try:
                # PEFT allows any prefix unless the whole field is a string.
                ways += _ways_of(pattern) * (1 if is_whole else _PLACES)
            except ValueError as error:
                raise ValueError(
                    f"{field} {where} contains {pattern!r:.200}, which is not a valid pattern: {error}."
                ) from None
            if ways > _MOST_WAYS:
                raise ValueError(
                    f"{field} {where} contains {pattern!r:.200}, which can take too long to match. List the modules "
                    "by name, or use fewer of *, + and |, without nesting them."
                )


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """First pattern that matches a module, like PEFT's `get_pattern_key`; else the module.

    `re` caches 512 patterns; beyond that, PEFT recompiles each of them for every module.
    """
    return next((key for key, pattern in _compiled(tuple(patterns)) if pattern.match(module)), module)


@functools.lru_cache(maxsize=4)  # for ranks and α, of source and target
def _compiled(patterns: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    return [(key, re.compile(rf"(.*\.)?({key})$")) for key in patterns]


def require_plain_names(names: Iterable[str], file: str) -> None:
    """Raise ValueError for tensor names that exceed any module's length (slow to match) or contain a line break.

    PEFT's patterns, in which a dot excludes line breaks, would skip such names.
    """
    for name in names:
        if "\n" in name:
            raise ValueError(
                f"{file} is damaged or has an unexpected format: the tensor name {name[:80]!r} contains a line break."
            )
        if len(name) > _LONGEST_NAME:
            raise ValueError(
                f"{file} is damaged or has an unexpected format: a tensor name has {len(name)} characters "
                f"({name[:40]!r}…); the limit is {_LONGEST_NAME}."
            )


def _ways_of(pattern: str) -> float:
    """Upper bound on the number of ways a pattern matches a prefix of a name.

    Raises:
        ValueError: not a regular expression.

    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters; the limit is {_LONGEST_PATTERN}")
    try:
        return _ways(_PARSER.parse(pattern))
    except re.error as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        return math.inf


def _ways(tree: Any) -> float:
    ways = 1.0
    for operation, value in tree:
        if operation.name in _REPEATS:
            least, most, body = value
            once = _ways(body)
            if most > 1 and (once > 1 or body.getwidth()[0] == 0):
                return math.inf  # exponential: each repetition has a choice, or may be empty
            ways *= once + min(most - least, _PLACES)
        elif operation.name == "BRANCH":
            ways *= _ways_of_branches(value[1])
        elif operation.name == "GROUPREF_EXISTS":
            ways *= _ways(value[1]) + _ways(value[2] or ())
        elif operation.name == "ATOMIC_GROUP":
            ways *= _ways(value)
        elif operation.name in _GROUPS:
            ways *= _ways(value[-1])
    return ways


def _ways_of_branches(branches: Iterable[Any]) -> float:
    """Of alternatives; different leading letters exclude each other."""
    ways: dict[str, float] = {}
    for branch in branches:
        beginning = _beginning(branch)
        ways[beginning] = ways.get(beginning, 0) + _ways(branch)
    return max(sum(ways.get(longest[:end], 0) for end in range(len(longest) + 1)) for longest in ways)


def _beginning(branch: Any) -> str:
    """Required leading letters of an alternative; ASCII only, since others may match variants if case is ignored."""
    letters = takewhile(lambda part: part[0].name == "LITERAL" and part[1] < 128, branch)
    return "".join(chr(value) for _, value in letters).lower()
