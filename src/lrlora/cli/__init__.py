"""The command line: parses, calls, prints."""

# In the order in which `--help` lists their commands.
from . import train, compare, adapters, doctor  # isort: skip
from .common import app

__all__ = ["adapters", "app", "compare", "doctor", "train"]
