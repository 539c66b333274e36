"""`python -m lrlora`, for launchers that start a module."""

from .cli import app

app()
