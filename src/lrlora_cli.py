"""Entry point of `lrlora`. Imported before lrlora, so that commands import torch and PEFT only when needed."""

from lrlora.cli import app

__all__ = ["app"]
