"""The command line: parses, calls, prints."""

# In the order in which `--help` lists their commands.
from . import train, adapters, compare, demo, doctor  # isort: skip
from .common import app

__all__ = ["adapters", "app", "compare", "demo", "doctor", "train"]
