"""What the page shows of several runs beside each other, of runs of other methods, and on a telephone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from lrlora.ranks import RankReport
from lrlora.views.charts import CHARTS
from lrlora.views.page import kept_over_size, write_page
from lrlora.views.runs import Run

from .conftest import needs_browser, opened


@pytest.fixture
def phone(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 400, "height": 800})
    yield context.new_page()
    context.close()


@needs_browser
def test_a_slider_and_a_click_choose_a_size(page: Page, runs: list[Run]) -> None:
    budgets, kept = kept_over_size([run.report for run in runs])
    slider = page.get_by_role("slider", name="Size")
    expect(page.locator("#energy svg.marks")).to_be_visible()
    assert all(points[int(slider.input_value())][0] >= 0.9 for points in kept)
    slider.press("Home")
    for _ in range(20):
        slider.press("ArrowRight")
    told = page.locator("#kept > div")
    for i, run in enumerate(runs):
        share, parameters, smallest, mean, largest = kept[i][20]
        text = told.nth(i).inner_text()
        assert text.startswith(f"{run.name} keeps {100 * share:.1f} % of its energy")
        size = float(re.search(r"([\d.]+) MiB as float32", text)[1])
        assert size == pytest.approx(4 * parameters / 2**20, rel=0.006)
        assert f"ranks from {smallest} to {largest}, {mean:.1f} on average" in text
        words = shlex.split(told.nth(i).locator("code").inner_text())
        assert words[:3] == ["lrlora", "export", run.name]
        assert words[3:] == ["--by", "energy", "--size", str(budgets[20]), "--output", f"{run.name}-small"]
    expect(slider).to_have_attribute("aria-valuetext", f"{budgets[20]:,} parameters")
    chart = page.locator("#energy svg.marks")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    for share in (0.3, 0.8):
        before = slider.input_value()
        page.mouse.click(box["x"] + share * box["width"], box["y"] + 0.7 * box["height"])
        expect(slider).not_to_have_value(before)
        expect(page.locator("#size-shown")).to_have_text(f"{budgets[int(slider.input_value())]:,} parameters")
    page.emulate_media(color_scheme="dark")  # the chart is drawn anew, and listens again
    page.wait_for_timeout(1000)
    slider.press("Home")
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 0.7 * box["height"])
    expect(slider).not_to_have_value("0")


def test_a_command_takes_any_name(runs: list[Run], tmp_path: Path) -> None:
    write_page([replace(runs[0], name="--help; rm $HOME '</script>")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"""lrlora export './--help; rm $HOME '\"'\"'\u003c/script>' --by energy --size """ in text


@needs_browser
def test_lines_of_the_course_can_be_told_apart_without_colours(page: Page) -> None:
    for chart, series in (("history", ["attention", "mlp", "chosen module"]), ("training", ["loss", "eval_loss"])):
        svg = page.locator(f"#{chart} svg.marks")
        labels = svg.locator(".role-legend-label text").all_text_contents()
        assert [label for label in labels if label in series] == series
        dashes = svg.locator(".role-legend-symbol path").evaluate_all(
            "paths => paths.map(path => path.getAttribute('stroke-dasharray'))"
        )
        assert len({dash for dash in dashes if dash}) == len(series)
        lines = svg.locator(".mark-line path").evaluate_all(
            "paths => paths.map(path => [path.getAttribute('stroke'), path.getAttribute('stroke-dasharray')].join())"
        )
        assert len(set(lines)) == len(lines) == 2 * len(series)
        shapes = svg.locator(".mark-symbol.role-mark path").evaluate_all(
            "paths => paths.map(path => path.getAttribute('d').replace(/[-\\d.]+/g, ''))"
        )
        assert len(set(shapes)) >= 2


@needs_browser
def test_on_a_telephone_nothing_is_cut(phone: Page, runs: list[Run], tmp_path: Path) -> None:
    names = (
        "curved",
        "a-long-name-of-a-run-with-all-its-settings-lr-0.0003-seed-17-of-40",
        "a third: LoRA r=4",
        r'say "4" \\ {{title}}',
        "5",
    )
    write_page([replace(runs[i % 2], name=name) for i, name in enumerate(names)], tmp_path / "phone.html")
    opened(phone, tmp_path / "phone.html")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 400
    for chart in CHARTS:
        svg = phone.locator(f"#{chart} svg.marks")
        inside, around = svg.bounding_box(), phone.locator(f"#{chart}").bounding_box()
        assert around["x"] <= inside["x"]
        assert inside["x"] + inside["width"] <= around["x"] + around["width"] <= 400
        texts = svg.locator("text").evaluate_all(
            "texts => texts.filter(text => text.getAttribute('opacity') !== '0')"
            ".map(text => [text.textContent, text.getBoundingClientRect().toJSON()])"
        )
        assert any("seed-17" in text for text, _ in texts)
        for text, box in texts:
            assert "…" not in text
            assert inside["x"] - 1 <= box["left"] <= box["right"] <= inside["x"] + inside["width"] + 1, text
            assert inside["y"] - 1 <= box["top"] <= box["bottom"] <= inside["y"] + inside["height"] + 1, text
        assert overlapping([box for text, box in texts if text and box["width"]]) == []


def overlapping(boxes: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of boxes that share more than a line's leading."""
    return [
        (a, b)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if min(a["right"], b["right"]) - max(a["left"], b["left"]) > 1
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 4
    ]


@needs_browser
def test_runs_without_phi_read_nothing_of_it(browser: Browser, runs: list[Run], tmp_path: Path) -> None:
    bare = RankReport([replace(row, r=None) for row in runs[1].report.rows], spectra=runs[1].report.spectra)
    write_page([replace(runs[1], name="LoRA"), replace(runs[1], name="full", report=bare)], tmp_path / "page.html")
    page = opened(browser.new_page(), tmp_path / "page.html")
    text = page.locator("body").inner_text()
    assert "φ" not in text
    assert "s·BA" not in text
    assert "smallest LoRA" in text
    assert "curvature" not in " ".join(page.locator("option").all_inner_texts())
    expect(page.locator("#module-name .numbers").nth(1)).to_contain_text("r = –")
    page.locator("#maps .cell").last.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("r = –")
    page.get_by_role("columnheader", name="r", exact=True).get_by_role("button").click()
    expect(page.locator("#table tbody tr").last.locator("td").nth(5)).to_have_text("–")
    page.close()


@needs_browser
def test_the_page_opens_on_the_measure_of_the_picture(page: Page) -> None:
    expect(page.locator("#measure")).to_have_value("stable_rank")
    expect(page.locator("#about")).to_contain_text("stable rank")


@needs_browser
def test_losses_over_sizes_are_drawn_with_the_command_of_the_chosen_one(
    browser: Browser, runs: list[Run], tmp_path: Path
) -> None:
    assert runs[0].shrunk is not None
    run = replace(runs[0], report=runs[0].report.with_loss_ranks(runs[0].shrunk.ranks))
    write_page([run], tmp_path / "page.html")
    write_page([replace(run, shrunk=None)], tmp_path / "without.html")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    expect(page.locator("#loss svg.marks")).to_be_visible()
    expect(page.locator("#smallest")).to_contain_text(run.shrunk.sentence)
    expect(page.locator("#smallest pre")).to_contain_text(" --keep 0.99 --output ")
    page.locator("#measure").select_option("loss rank")
    assert page.locator("#maps .cell").first.inner_text() == "1"
    page.goto((tmp_path / "without.html").as_uri())
    expect(page.locator("#sizes")).to_be_visible()
    expect(page.locator("#losses")).to_be_hidden()
    page.close()
