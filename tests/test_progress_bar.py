"""Progress of long work in a file."""

from __future__ import annotations

import io

import pytest

from lrlora import progress_bar as module
from lrlora.progress_bar import progress_bar


def test_a_file_gets_whole_lines_and_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_APART", 0)
    file = io.StringIO()
    bar = progress_bar(total=4, desc="Measuring", file=file)
    for _ in range(3):
        bar.update()
    bar.close()
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue()
    assert all(line.startswith("Measuring") for line in lines)
    assert [line.split("/")[0].split()[-1] for line in lines] == ["0", "1", "2", "3"]


def test_lines_are_rare_and_short_work_that_leaves_nothing_has_none() -> None:
    file = io.StringIO()
    assert list(progress_bar(range(1_000), desc="Decomposing", file=file)) == list(range(1_000))
    assert len(file.getvalue().splitlines()) == 2
    file = io.StringIO()
    assert len(list(progress_bar(range(1_000), leave=False, file=file))) == 1_000
    assert file.getvalue() == ""
