"""Builds the hub in a temporary folder, serves it, and gives the environment that makes a command use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .server import serving
from .tree import build


def caches(folder: Path) -> dict[str, str]:
    """The variables for caches of their own, in an empty folder."""
    # HF_HOME alone is not enough: where a developer has set the others, they go before it.
    return {
        "HF_HOME": str(folder),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }


@contextmanager
def running_hub(folder: Path) -> Iterator[dict[str, str]]:
    """The variables for a subprocess that takes this hub for the real one; its caches are in `folder` too."""
    build(folder / "hub")
    with serving(folder / "hub") as address:
        yield {
            "HF_ENDPOINT": address,
            "LRLORA_TEST_HUB": str(folder / "hub"),
            **caches(folder / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # `datasets` also asks the host "datasets-server." + the endpoint's, which no name server knows.
            "HTTP_PROXY": address,
            "http_proxy": address,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
