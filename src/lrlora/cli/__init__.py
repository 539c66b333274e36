"""The command line: parses, calls, prints. Installed packages add commands of their own."""

from importlib.metadata import entry_points

# In the order in which `--help` lists their commands.
from . import train, adapters, doctor  # isort: skip
from .common import app

for command in entry_points(group="lrlora.commands"):
    command.load()

__all__ = ["adapters", "app", "doctor", "train"]
