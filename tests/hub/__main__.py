"""`python -m tests.hub` serves the hub until Ctrl-C, and says what to set to try commands by hand."""

from __future__ import annotations

import shlex
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from .running import running_hub

with tempfile.TemporaryDirectory() as folder, running_hub(Path(folder)) as environment:
    for name, value in environment.items():
        print(f"export {name}={shlex.quote(value)}", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
