"""Comparisons whose workers need not import torch first."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lrlora_lab import queue
from lrlora_lab.suite import Suite

from ..processes import Process


class _Worker(queue._Worker):
    """The worker as it is, in a fork of a process that has imported what it imports."""

    def __init__(self, suite: Suite) -> None:
        super().__init__(suite)
        self._suite = json.dumps(asdict(suite))

    def _start(self, log: Path) -> Any:
        code = "from lrlora_lab.worker import main; main()"
        with log.open("w", encoding="utf-8") as written:
            self._process: Any = Process(code, self._suite, env=queue._environment(), stderr=written)
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


@pytest.fixture
def started_worker() -> None:
    """For tests whose workers are started as users' are."""


@pytest.fixture(autouse=True)
def _quick_worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "started_worker" not in request.fixturenames:
        monkeypatch.setattr(queue, "_Worker", _Worker)
