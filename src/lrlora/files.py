"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write under a temporary name and rename: a reader never sees half a file, whoever else writes it."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write what JSON can hold."""
    write_whole(path, json.dumps(content, indent=1))
