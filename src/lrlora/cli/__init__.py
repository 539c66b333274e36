"""The command line: parses, calls, prints. Installed packages add commands of their own."""

from importlib.metadata import entry_points

from . import adapters, doctor, train
from .common import app

for command in entry_points(group="lrlora.commands"):
    command.load()

__all__ = ["adapters", "app", "doctor", "train"]
