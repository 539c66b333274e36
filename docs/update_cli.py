"""Write the page of all commands from the commands themselves: python docs/update_cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from lrlora.cli import app

PAGE = Path(__file__).parent / "cli.md"


def render() -> str:
    """The page, in Markdown."""
    parts = ["# All commands", "What `lrlora COMMAND --help` says, in one place."]
    group: Any = typer.main.get_command(app)
    for name, command in sorted(group.commands.items()):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["lrlora", name, *(p.name.upper() for p in arguments), "[OPTIONS]"])
        rows = [f"| {_name(p)} | {_about(p)} |" for p in command.params if p.name != "help"]
        table = ["| option | what |", "|---|---|", *rows] if rows else []
        parts += [f"## lrlora {name}", f"`{usage}`", command.help, "\n".join(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def _about(parameter: Any) -> str:
    default = parameter.default
    is_said = default is None or default is False or "default:" in parameter.help or parameter.required
    about = parameter.help + ("" if is_said else f" Default: {default}.")
    about += " Required." if parameter.required and "Required." not in about else ""
    return " ".join(about.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
