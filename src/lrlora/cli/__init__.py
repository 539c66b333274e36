"""The command line: parses, calls, prints."""

# In the order in which `--help` lists their commands.
from . import train, adapters, demo  # isort: skip
from .common import app

__all__ = ["adapters", "app", "demo", "train"]
