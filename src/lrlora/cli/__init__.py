"""The command line: parses, calls, prints."""

# In the order in which `--help` lists their commands.
from . import train, adapters, demo, doctor  # isort: skip
from .common import app

__all__ = ["adapters", "app", "demo", "doctor", "train"]
