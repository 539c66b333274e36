"""Where a setting belongs: to the run, to the Trainer's arguments, or to the adapter's configuration."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import fields
from itertools import chain

from .config import TrainConfig
from .kinds import KINDS
from .methods import METHODS


def require_settings(config: TrainConfig) -> None:
    """Raise a ValueError for a name under `training` or `adapter` that is no field there."""
    known = _fields(config.task, config.method)
    for place, given in (("training", config.training), ("adapter", config.adapter)):
        for name in given:
            if name not in known[place] and not (place == "adapter" and config.method == "full"):
                raise unknown_setting(name, place, config.task, config.method)


def unknown_setting(name: str, place: str, task: str | None, method: str | None) -> ValueError:
    """The error that says of an unknown setting where it belongs, or names the nearest of all that there are.

    Args:
        name: of the setting.
        place: "run", "training" or "adapter", where it was given.
        task: of the run, which decides the class of the Trainer's arguments.
        method: of the run, which decides the class of the adapter's configuration.

    """
    known = _fields(task, method)
    homes = {
        "run": ("setting of a run", "--{flag} or the key {name} of the YAML file"),
        "training": ("field of TrainingArguments", "--training {name}=VALUE or the key training of the YAML file"),
        "adapter": ("field of the adapter", "--adapter {name}=VALUE or the key adapter of the YAML file"),
    }

    def home(found: str) -> str:
        """Where a known name belongs; here, if there is one of that name."""
        there = next(each for each in (place, *known) if found in known[each])
        what, how = homes[there]
        how = how.format(name=found, flag=found.replace("_", "-"))
        return "" if there == place else f", a {what}: give it by {how}"

    said = f"Unknown {homes[place][0]} {name!r}."
    if any(name in names for names in known.values()):
        return ValueError(f"{said} It is{home(name).removeprefix(',')}.")
    near = difflib.get_close_matches(str(name), dict.fromkeys(chain(*known.values())), 1, 0.5)
    if near:
        return ValueError(f"{said} Did you mean {near[0]}{home(near[0])}?")
    return ValueError(f"{said} Known: {', '.join(known[place])}.")


def _fields(task: str | None, method: str | None) -> dict[str, list[str]]:
    """Place → the names that are known there."""
    arguments = KINDS[task if task in KINDS else "classify"].arguments_class()
    adapter = METHODS[method if method in METHODS else "lr-lora"].config
    return {
        "run": [f.name for f in fields(TrainConfig)],
        "training": list(arguments.__dataclass_fields__),
        "adapter": [*inspect.signature(adapter.__init__).parameters][1:] if adapter else [],
    }
