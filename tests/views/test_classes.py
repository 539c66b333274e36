"""Scores by class, as the page and the terminal show them: the worst, where there are many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from rich.console import Console

from lrlora.by_class import CLASSES_FILE, ByClass, Scores, read_by_class
from lrlora.files import write_json
from lrlora.views.page import MOST_CLASSES, MOST_PAIRS, write_page
from lrlora.views.runs import Run
from lrlora.views.tables import MOST_ROWS, class_table

from .conftest import needs_browser, opened, record


def test_a_class_without_examples_is_not_the_worst() -> None:
    nothing = Scores(precision=0.0, recall=0.0, f1=0.0, support=0)
    some = record(3)
    both = ByClass({"absent": nothing, **some.classes}, {"absent": {}, **some.confusion})
    assert both.worst == some.worst == ["class 2", "class 1", "class 0"]
    assert [(pair.label, pair.answer, pair.examples, pair.share) for pair in both.confused] == [
        ("class 2", "class 0", 2, 0.02),
        ("class 1", "class 2", 1, 0.01),
    ]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    assert read_by_class(tmp_path) is None
    write_json(tmp_path / CLASSES_FILE, {"classes": {"a": {"f1": "high"}}, "confusion": {}})
    with pytest.raises(ValueError, match=r"classes\.json.*Remove it to continue"):
        read_by_class(tmp_path)


def test_the_terminal_shows_the_worst_of_many_classes() -> None:
    console = Console(width=120, record=True)
    console.print(class_table(record(40)))
    lines = console.export_text().splitlines()
    shown = [line.split()[1] for line in lines if line.strip().startswith("class ") and "0." in line]
    assert shown == [str(39 - row) for row in range(MOST_ROWS)]
    assert any("the 10 of lowest F1" in line for line in lines)
    assert "'class 39' taken for 'class 0': 39 (39%)" in " ".join(" ".join(lines).split())


@needs_browser
@pytest.mark.parametrize("count", [4, 60])
def test_the_page_shows_a_matrix_of_few_classes_and_the_worst_of_many(
    browser: Browser, runs: list[Run], tmp_path: Path, count: int
) -> None:
    write_page([replace(runs[0], by_class=record(count)), runs[1]], tmp_path / "page.html")
    page = opened(browser.new_page(viewport={"width": 390, "height": 800}), tmp_path / "page.html")
    tables = page.locator("#classes table")
    expect(tables).to_have_count(3 if count == 4 else 2)
    first = tables.nth(0).locator("tbody tr")
    expect(first).to_have_count(min(count, MOST_CLASSES))
    expect(first.nth(0).locator("th")).to_have_text(f"class {count - 1}")
    expect(tables.nth(1).locator("tbody tr")).to_have_count(min(count - 1, MOST_PAIRS))
    assert page.locator("#classes h3").first.inner_text().startswith("Scores by class of curved")
    if count == 4:
        cells = tables.nth(2).locator("tbody tr").nth(3).locator("td")
        assert cells.all_inner_texts() == ["3", "0", "0", "97"]
    else:
        assert "the 20 of 60 with the lowest F1" in page.locator("#classes h3").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


@needs_browser
def test_a_page_without_classes_has_no_section_of_them(browser: Browser, runs: list[Run], tmp_path: Path) -> None:
    write_page([runs[1]], tmp_path / "page.html")
    page = opened(browser.new_page(), tmp_path / "page.html")
    expect(page.locator("#classes")).to_be_hidden()
    page.close()
