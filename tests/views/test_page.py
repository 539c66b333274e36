"""The HTML page, as a reader meets it: in a headless Chromium, with clicks and keys."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from peft import LoraConfig, get_peft_model
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import save_file

from lrlora import RankReport, rank_report
from lrlora.ranks import Curve, RankRow, Spectrum
from lrlora.views.page import write_page
from lrlora.views.runs import Run, load_runs

from ..conftest import EXPERTS, TinyModel
from .conftest import needs_browser, opened


def cell(page: Page, run: str, module: str) -> Any:
    return page.get_by_role("table", name=f"of {run}").locator(f'[data-module="{module}"]')


def row_of(report: RankReport, module: str) -> RankRow:
    return next(row for row in report.rows if row.module == module)


@needs_browser
@pytest.mark.quick
def test_cells_show_the_measure_that_is_chosen(page: Page, runs: list[Run]) -> None:
    for measure, label in (("stable_rank", "stable rank"), ("energy99_rank", "energy-99 rank")):
        page.locator("#measure").select_option(label)
        for run in runs:
            for row in run.report.rows:
                value = getattr(row, measure)
                expected = f"{value:.1f}" if measure == "stable_rank" and value != int(value) else f"{value:.0f}"
                assert cell(page, run.name, row.module).inner_text() == expected


@needs_browser
def test_the_slider_goes_back_in_training(page: Page, runs: list[Run]) -> None:
    module = runs[0].report.rows[0].module
    slider = page.get_by_label("Training step")
    expect(page.locator("#step-shown")).to_have_text("as saved")
    slider.press("ArrowLeft")
    expect(page.locator("#step-shown")).to_have_text("10")
    slider.press("ArrowLeft")
    expect(page.locator("#step-shown")).to_have_text("5")
    expect(slider).to_have_attribute("aria-valuetext", "5")
    expected = row_of(runs[0].history[1][1], module).stable_rank
    assert float(cell(page, "curved", module).inner_text()) == pytest.approx(expected, abs=0.051)
    slider.press("Home")
    expect(cell(page, "curved", module)).to_have_text("0")
    slider.press("End")
    expect(page.locator("#step-shown")).to_have_text("as saved")


@needs_browser
def test_a_click_on_a_cell_opens_its_module(page: Page, runs: list[Run]) -> None:
    module = runs[0].report.rows[3].module
    cell(page, "curved", module).click()
    expect(page.locator("#module-name h3")).to_have_text(module)
    expect(cell(page, "curved", module)).to_have_attribute("aria-pressed", "true")
    lines = page.locator("#module-name .numbers")
    for i, run in enumerate(runs):
        row = row_of(run.report, module)
        assert lines.nth(i).locator('[data-key="energy99_rank"]').inner_text() == str(row.energy99_rank)
        curvature = lines.nth(i).locator('[data-key="curvature"]').inner_text()
        assert float(curvature) == pytest.approx(row.curvature, abs=6e-4)
    for chart in ("phi", "spectrum", "kinds", "history", "training"):
        expect(page.locator(f"#{chart} svg").first).to_be_visible()


@needs_browser
def test_hovering_tells_the_numbers(page: Page, runs: list[Run]) -> None:
    row = runs[0].report.rows[0]
    cell(page, "curved", row.module).hover()
    tip = page.get_by_role("tooltip")
    expect(tip).to_contain_text(row.module)
    expect(tip).to_contain_text(f"{row.m} × {row.n}, r = {row.r}")
    expect(tip).to_contain_text(f"energy-99 rank: {row.energy99_rank}")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    cell(page, "curved", runs[0].report.rows[1].module).hover()
    expect(tip).to_contain_text(runs[0].report.rows[1].module)
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()


@needs_browser
def test_the_keyboard_walks_the_map_and_chooses(page: Page) -> None:
    start = page.locator('#maps .cell[tabindex="0"]').first
    start.focus()
    column = int(start.get_attribute("data-at").split(",")[2])
    page.keyboard.press("ArrowRight" if column == 0 else "ArrowLeft")
    moved = page.evaluate("document.activeElement.dataset")
    assert int(moved["at"].split(",")[2]) == (1 if column == 0 else column - 1)
    page.keyboard.press("Enter")
    expect(page.locator("#module-name h3")).to_have_text(moved["module"])
    assert page.evaluate("document.activeElement.dataset.at") == moved["at"]


@needs_browser
def test_the_table_sorts_opens_modules_and_is_saved(page: Page, runs: list[Run], tmp_path: Path) -> None:
    heading = page.get_by_role("columnheader", name="stable rank")
    heading.get_by_role("button").click()
    expect(heading).to_have_attribute("aria-sort", "descending")
    rows = [row for run in runs for row in run.report.rows]
    modules = page.locator("#table tbody tr td:nth-child(2)")
    assert modules.first.inner_text() == max(rows, key=lambda row: row.stable_rank).module
    heading.get_by_role("button").click()
    expect(heading).to_have_attribute("aria-sort", "ascending")
    assert modules.first.inner_text() == min(rows, key=lambda row: row.stable_rank).module
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as CSV").click()
    download.value.save_as(tmp_path / "ranks.csv")
    with (tmp_path / "ranks.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for measure in ("effective_rank", "relative_norm"):
        saved = {(row["run"], row["module"]): float(row[measure]) for row in lines}
        expected = {(run.name, row.module): getattr(row, measure) for run in runs for row in run.report.rows}
        assert saved == pytest.approx(expected, rel=1e-5)
    assert {row["at"] for row in lines} == {"as saved"}
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    download.value.save_as(tmp_path / "ranks.json")
    assert len(json.loads((tmp_path / "ranks.json").read_text(encoding="utf-8"))) == len(rows)
    page.locator("#table tbody button").nth(2).click()
    expect(page.locator("#module-name h3")).to_have_text(modules.nth(2).inner_text())
    expect(page.locator("#module-title")).to_be_focused()


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(
    browser: Browser, file: Path, scheme: Any, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened(context.new_page(), file)
    results = Axe().run(page, options={"rules": {"region": {"enabled": True}}})
    found = [(v["id"], [node["html"][:160] for node in v["nodes"][:3]]) for v in results.response["violations"]]
    assert found == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


@needs_browser
def test_charts_follow_the_theme(page: Page) -> None:
    colour = "getComputedStyle(document.querySelector('#kinds svg text')).fill"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"document.querySelector('#kinds svg text') && {colour} !== '{light}'")
    assert page.locator("#training svg.marks").count() == 1


@needs_browser
def test_what_overflows_long_histories_and_long_names(browser: Browser, runs: list[Run], tmp_path: Path) -> None:
    report = runs[0].report
    log = [
        {"step": step, "loss": float("nan") if step % 3 else 1.0, "grad_norm": float("inf")} for step in range(2_000)
    ]
    long = Run("a-very-long-name/" * 12, report, history=[(step, report) for step in range(10_000)], log=log)
    write_page([long, runs[1]], tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < 3e6
    page = opened(browser.new_page(viewport={"width": 1280, "height": 800}), tmp_path / "long.html")
    assert page.get_by_label("Curve").locator("option").all_inner_texts() == [
        "loss, training and validation",
        "eval_accuracy",
    ]
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    expect(page.locator("#step")).to_have_attribute("max", re.compile(r"^6\d$"))
    page.close()


@needs_browser
def test_experts_of_a_cell_can_be_told_apart(browser: Browser, tmp_path: Path) -> None:
    tiny = TinyModel("mixtral")
    model = get_peft_model(tiny.build(), LoraConfig(r=2, target_parameters=EXPERTS, **tiny.targets))
    tiny.train(model, 2)
    report = rank_report(model)
    write_page([Run("experts", report)], tmp_path / "experts.html")
    page = opened(browser.new_page(), tmp_path / "experts.html")
    expected = [row for row in report.rows if row.layer == 0 and row.type.endswith("experts.gate_up_proj")]
    shared = page.locator(f'#maps .cell[data-module="{expected[0].module}"]')
    expect(shared).to_have_attribute("aria-label", re.compile("^mean of 4 modules"))
    mean = sum(row.stable_rank for row in expected) / 4
    assert float(shared.inner_text()) == pytest.approx(mean, abs=0.051)
    shared.click()
    page.get_by_label("Module of the cell").select_option(expected[2].module)
    number = page.locator('#module-name [data-key="stable_rank"]').inner_text()
    assert float(number) == pytest.approx(expected[2].stable_rank, abs=0.051)
    page.close()


@needs_browser
def test_a_stack_has_a_map_of_its_own_with_one_cell_a_module(browser: Browser, tmp_path: Path) -> None:
    blocks = [f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn1_to_{k}" for i in (0, 1) for k in "qk"]
    names = [*(f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1" for i in range(3)), *blocks]
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 8) for name in names}
    save_file(tensors | {f"{name}.lora_up.weight": torch.randn(8, 2) for name in names}, tmp_path / "a.safetensors")
    write_page(load_runs([str(tmp_path / "a.safetensors")]), tmp_path / "a.html")
    page = opened(browser.new_page(viewport={"width": 400, "height": 800}), tmp_path / "a.html")
    assert [table.get_attribute("aria-label") for table in page.locator("table.map").all()] == [
        "stable rank of a, te1",
        "stable rank of a, unet_input",
    ]
    assert page.locator("#maps .cell").count() == len(names)
    headings = page.get_by_role("table", name="unet_input").locator("thead th").all_inner_texts()
    assert headings == ["unet_input", "4.1.0", "4.1.1"]
    page.locator(f'.cell[data-module="{names[2]}"]').focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")  # into the next map
    page.keyboard.press("Enter")
    expect(page.locator("#module-name")).to_contain_text(names[6])  # the first by name
    page.close()


@needs_browser
def test_an_adapter_alone_shows_what_there_is(browser: Browser, runs: list[Run], tmp_path: Path) -> None:
    write_page([Run("adapter", replace(runs[1].report, spectra={}))], tmp_path / "one.html")
    page = opened(browser.new_page(), tmp_path / "one.html")
    expect(page.get_by_label("Training step")).to_be_hidden()
    for hidden in ("#phi", "#spectrum", "#history", "#overlap", "#sizes", "#course", "#settings"):
        expect(page.locator(hidden)).to_be_hidden()
    expect(page.locator("#kinds svg").first).to_be_visible()
    page.close()


@needs_browser
def test_a_large_model_fits_in_six_megabytes(browser: Browser, tmp_path: Path) -> None:
    chance = random.Random(0)

    def some(count: int) -> list[float]:
        return [float(f"{chance.random():.6g}") for _ in range(count)]

    rows, curves, spectra = [], {}, {}
    for layer in range(32):
        for kind, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                module = f"model.layers.{layer}.{kind}.{name}_proj"
                ranks = [math.ceil(100 * value) for value in some(4)]
                rows.append(
                    RankRow(
                        module,
                        layer,
                        f"model.layers.{kind}.{name}_proj",
                        kind,
                        4096,
                        4096,
                        8,
                        *ranks,
                        0.01,
                        0.0,
                        0.1,
                        4096,
                    )
                )
                curves[module] = Curve(some(201), some(201), some(201), some(200))
                spectra[module] = Spectrum(list(range(1, 65)), some(64), some(8))
    report = RankReport(rows, curves, spectra)
    write_page([Run("large", report, history=[(step, report) for step in range(0, 500, 10)])], tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 6e6
    page = opened(browser.new_page(), tmp_path / "large.html")
    assert page.locator("#maps .cell").count() == 224
    page.close()


def test_text_of_a_run_cannot_become_part_of_the_page(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "plain </script>" not in text
    assert "<h1>Two &lt;runs&gt;</h1>" in text
    assert not re.search(r'(src|href)="(https?:)?//', text)


def test_the_size_of_the_update_is_told_where_only_the_history_has_it(runs: list[Run], tmp_path: Path) -> None:
    bare = RankReport([replace(row, relative_norm=None) for row in runs[0].report.rows])
    write_page([replace(runs[0], report=bare)], tmp_path / "page.html")
    assert '"key":"relative_norm"' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_runs_without_names_of_their_own_are_refused(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got curved, curved"):
        write_page([runs[0], runs[0]], tmp_path / "page.html")
    with pytest.raises(ValueError, match="nothing to show"):
        write_page([], tmp_path / "page.html")
    with pytest.raises(ValueError, match="show for empty"):
        write_page([Run("empty", RankReport([]))], tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"at most 6 .*got 7"):
        write_page([replace(runs[0], name=str(i)) for i in range(7)], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
