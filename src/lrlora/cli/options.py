"""Settings of a run as command-line options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..train.settings import TOPICS, TrainConfig, read_run, with_short_names
from ..train.yaml import parse_assignments, parse_pairs, read_yaml

REQUIRED = ("model", "data", "task")


def settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**settings` by an option for each setting of a run, with its help and topic.

    Options that are not given are None.
    """
    hints = get_type_hints(TrainConfig)
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [each for each in own.values() if each.kind is not each.VAR_KEYWORD]
    options = [_option(setting, hints[setting.name]) for setting in _by_topic()]
    position = 1 + [each.name for each in parameters].index("config")
    signature = inspect.Signature([*parameters[:position], *options, *parameters[position:]])
    vars(command)["__signature__"] = signature
    command.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    return command


def _by_topic() -> list[Field[Any]]:
    return sorted(fields(TrainConfig), key=lambda setting: TOPICS.index(setting.metadata["topic"]))


def _option(setting: Field[Any], hint: Any) -> inspect.Parameter:
    kind: Any = list[str] | None if "dict" in str(hint) else (bool | None if hint is bool else hint | None)
    flag = f"--{setting.name.replace('_', '-')}"
    names = (flag, "--column") if setting.name == "columns" else (flag,)
    has_default = not any(setting.default is nothing for nothing in (MISSING, None, False))
    about: str = setting.metadata["help"] + (" Required." if setting.name in REQUIRED else "")
    about = f"{about.rstrip('.')}; default: {setting.default}." if has_default else about
    option = typer.Option(*names, help=about, show_default=False, rich_help_panel=setting.metadata["topic"])
    annotation = Annotated[kind, option]
    return inspect.Parameter(setting.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def settings_of(file: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Merge the settings of the run to start from, a file, and the command line; later ones take precedence."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, parse in (("columns", parse_pairs), ("adapter", parse_assignments), ("training", parse_assignments)):
        if name in given:
            given[name] = parse(given[name], f"--{name}")
    told = read_yaml(file) if file else {}
    start = given.get("start_from", told.get("start_from"))
    layers = [] if start is None else [_inherited(read_run(Path(str(start)))[0])]
    settings: dict[str, Any] = {}
    for layer in (*layers, told, given):
        method = layer.get("method", settings.get("method"))
        named = with_short_names(layer | ({"method": method} if method else {}))
        if "learning_rate" in named:
            settings.pop("find_rate", None)
        if "epochs" in named:
            settings.pop("steps", None)  # steps take precedence over epochs
        for name, value in named.items():
            is_nested = isinstance(value, dict) and isinstance(settings.get(name), dict)
            settings[name] = settings[name] | value if is_nested else value
    return settings


def _inherited(config: TrainConfig) -> dict[str, Any]:
    """Settings inherited from the run to start from. An adapter whose ranks were learned keeps them."""
    settings = {**asdict(config), "output": TrainConfig.output}
    return settings | dict.fromkeys(("size", "keep", "cut_at", "cut_rate")) if config.learns_ranks else settings
