"""The command `lrlora`. Imported before lrlora, it lets a command import torch and PEFT only when it needs them."""

from lrlora.cli import app

__all__ = ["app"]
