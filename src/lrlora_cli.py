"""Entry point of `lrlora`. Imported before lrlora, so that commands import torch and PEFT only when needed."""

import lrlora_lab.cli  # noqa: F401 (adds its commands)
from lrlora.cli import app

__all__ = ["app"]
