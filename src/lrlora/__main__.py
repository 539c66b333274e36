"""`python -m lrlora`, for launchers that run a module."""

from .cli import app

app()
