"""The folder where downloads and compiled kernels are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`LRLORA_CACHE` if set, else `~/.cache/lrlora`."""
    return Path(os.environ.get("LRLORA_CACHE") or Path.home() / ".cache" / "lrlora")
