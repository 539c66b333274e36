"""`python -m lrlora`, for launchers that run a module."""

from lrlora_cli import app

app()
