"""`python -m lrlora_lab`, for launchers that run a module."""

from .cli import app

app()
