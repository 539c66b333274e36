"""Namespace of a setting: the run, the Trainer's arguments, or the adapter configuration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from itertools import chain

from .methods import METHODS
from .settings import ARGUMENTS
from .tasks import KINDS

# Other libraries' names for run settings.
_ALIASES = {name: setting for setting, name in ARGUMENTS.items()} | {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "use_dora": "method dora",
    "use_rslora": "adapter use_rslora=true",
}


def require_settings(given: Iterable[str], place: str, settings: Iterable[str], task: str, method: str) -> None:
    """Raise ValueError for an unknown setting, with its correct place or the nearest known name.

    Args:
        given: names of settings.
        place: "run", "training" or "adapter", where they were given.
        settings: settings of a run.
        task: task, which determines the class of the Trainer's arguments.
        method: method, which determines the class of the adapter configuration.

    """
    known = {"run": list(settings), **_fields(task, method)}
    for name in given:
        if name not in known[place] and not (place == "adapter" and method == "full"):
            raise _unknown_setting(name, place, known)


def _unknown_setting(name: str, place: str, known: dict[str, list[str]]) -> ValueError:
    homes = {
        "run": ("setting of a run", "--{flag} or the key {name} of the YAML file"),
        "training": ("field of TrainingArguments", "--training {name}=VALUE or the key training of the YAML file"),
        "adapter": ("field of the adapter", "--adapter {name}=VALUE or the key adapter of the YAML file"),
    }

    def home(found: str) -> str:
        """Location of a known name, preferring this place."""
        there = next(each for each in (place, *known) if found in known[each])
        what, how = homes[there]
        how = how.format(name=found, flag=found.replace("_", "-"))
        return "" if there == place else f", a {what}: set it with {how}"

    said = f"Unknown {homes[place][0]} {name!r}."
    alias = _ALIASES.get(name, "")
    if (place == "run" and alias) or (place == "adapter" and alias.startswith("method")):
        return ValueError(f"{said} Use {alias}: --{alias}, or the key {alias.split()[0]}.")
    if any(name in names for names in known.values()):
        return ValueError(f"{said} It is{home(name).removeprefix(',')}.")
    near = difflib.get_close_matches(str(name), dict.fromkeys(chain(*known.values())), 1, 0.5)
    if near:
        return ValueError(f"{said} Did you mean {near[0]}{home(near[0])}?")
    return ValueError(f"{said} Known: {', '.join(known[place])}.")


def _fields(task: str, method: str) -> dict[str, list[str]]:
    """Place → known names."""
    arguments = KINDS[task if task in KINDS else "classify"].arguments_class()
    adapter = METHODS[method if method in METHODS else "lr-lora"].config
    return {
        "training": list(arguments.__dataclass_fields__),
        "adapter": [*inspect.signature(adapter.__init__).parameters][1:] if adapter else [],
    }
