"""The command line: parses, calls, prints."""

from .common import app

# The commands, in the order in which `--help` lists them.
from . import lab, compare, adapters, doctor  # isort: skip

__all__ = ["adapters", "app", "compare", "doctor", "lab"]
