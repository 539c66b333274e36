"""The regular expressions that come with an adapter: one that could take for ever to match is refused.

PEFT takes names of modules for regular expressions (`rank_pattern`, `target_modules`, …), and matches them against
every module of the base model. Python's engine tries one way to match after the other, and of ((.+)+)+Z there are
exponentially many. So an upper bound on these ways is taken from the tree that `re` itself parses a pattern into: a
time limit would depend on the machine and want a process for what cannot be interrupted, and it would say nothing of
the names in a base model, which PEFT matches later.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from .checks import require_type

# `re._parser` is `sre_parse` in Python 3.10. Neither is documented, and both have had this tree since Python 2.
_PARSER: Any = vars(re).get("_parser") or vars(re).get("sre_parse")
# What an unbounded quantifier counts: several share the hundred characters of a long name, four of them in
# (104 over 4) ≈ 46⁴ ways and five in (105 over 5) ≈ 40⁵.
_PLACES = 40
# Four in a row, as generated patterns have, take the engine a tenth of a second at most; five take seconds, and so do
# 25 choices between two.
_MOST_WAYS = 3e7
_LONGEST_NAME = 200  # characters
_LONGEST_PATTERN = 100_000  # an alternation of all modules of a large model, in full
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_GROUPS = ("SUBPATTERN", "ASSERT", "ASSERT_NOT")
_NAMES_ONLY = ("target_modules", "exclude_modules")  # of these a list holds names, and a string is a pattern


def require_quick_patterns(config: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError unless all patterns of a PEFT configuration are matched in a short time.

    Args:
        config: its fields: where one is called modules or pattern, strings, items and keys are patterns.
        where: it is from, for the message: "in its adapter_config.json".

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
                # PEFT looks for all but whole strings after any beginning.
                ways += _ways_of(pattern) * (1 if is_whole else _PLACES)
            except ValueError as error:
                raise ValueError(f"{field} {where} holds {pattern!r:.200}, which is no pattern: {error}.") from None
            if ways > _MOST_WAYS:
                raise ValueError(
                    f"{field} {where} holds {pattern!r:.200}, which could take for ever to match. Name the modules in "
                    "full instead, or use fewer of *, + and |, and none of them within another."
                )


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """The first of these patterns that stands for a module, as PEFT's `get_pattern_key` finds it; else the module.

    `re` remembers 512 patterns, and of more PEFT has each compiled again for every module.
    """
    return next((key for key, pattern in _compiled(tuple(patterns)) if pattern.match(module)), module)


@functools.lru_cache(maxsize=4)  # of ranks and of α, of what is read and of what it is loaded into
def _compiled(patterns: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    return [(key, re.compile(rf"(.*\.)?({key})$")) for key in patterns]


def require_plain_names(names: Iterable[str], file: str) -> None:
    """Raise a ValueError if a tensor has a name that is longer than any module's, and slow to match, or of two lines.

    Patterns of PEFT's, in which a point is no line break, would pass over such a name.
    """
    for name in names:
        if "\n" in name:
            raise ValueError(
                f"{file} is damaged or not what it should be: it names a tensor {name[:80]!r}, with a line break."
            )
        if len(name) > _LONGEST_NAME:
            raise ValueError(
                f"{file} is damaged or not what it should be: it names a tensor by {len(name)} characters "
                f"({name[:40]!r}…), and {_LONGEST_NAME} are read."
            )


def _ways_of(pattern: str) -> float:
    """An upper bound on the ways in which a pattern matches the beginning of a name.

    Raises:
        ValueError: it is no regular expression.

    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, and {_LONGEST_PATTERN} are read")
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
                return math.inf  # exponential: every round has a choice, or may take nothing
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
    """Of alternatives, of which those that begin with other letters exclude each other."""
    ways: dict[str, float] = {}
    for branch in branches:
        beginning = _beginning(branch)
        ways[beginning] = ways.get(beginning, 0) + _ways(branch)
    return max(sum(ways.get(longest[:end], 0) for end in range(len(longest) + 1)) for longest in ways)


def _beginning(branch: Any) -> str:
    """The letters that an alternative must begin with. Those beyond ASCII may stand for others if case is ignored."""
    letters = takewhile(lambda part: part[0].name == "LITERAL" and part[1] < 128, branch)
    return "".join(chr(value) for _, value in letters).lower()
