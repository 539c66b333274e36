"""Two runs, the page of them, and a headless Chromium to read it in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from playwright.sync_api import Browser, Page, sync_playwright

from lrlora import LrLoraConfig, rank_report
from lrlora.by_class import ByClass, Scores
from lrlora.shrunk import Kept, Shrunk
from lrlora.views.page import write_page
from lrlora.views.runs import Run

from ..conftest import TinyModel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


def record(count: int) -> ByClass:
    """So many classes of 100 examples; the class of number i has i wrong answers, all for the next class."""
    names = [f"class {number}" for number in range(count)]
    scores = {
        name: Scores(precision=1.0, recall=1 - number / 100, f1=1 - number / 100, support=100)
        for number, name in enumerate(names)
    }
    confusion = {
        name: {name: 100 - number, names[(number + 1) % count]: number} if number else {name: 100}
        for number, name in enumerate(names)
    }
    return ByClass(scores, confusion)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """LR-LoRA and LoRA on a tiny Llama, with a history of three records."""
    tiny = TinyModel("llama")
    found = []
    for name, config in (
        ("curved", LrLoraConfig(r=2, phi_lr_multiplier=100, **tiny.targets)),
        ("plain </script><b>", LoraConfig(r=2, **tiny.targets)),
    ):
        model = get_peft_model(tiny.build(), config)
        history = [(0, rank_report(model))]
        for step in (5, 10):
            tiny.train(model, 5)
            history.append((step, rank_report(model)))
        log = [{"step": step, "loss": 1 / step, "eval_loss": 2 / step, "eval_accuracy": 0.5} for step in (5, 10)]
        facts = {"method": name, "accuracy, held out": "0.5"}
        ranks = {row.module: 1 for row in history[-1][1].rows}
        shrunk = Shrunk(
            *(0.99, Kept(0.99, 0.985, 0.995), 0.5, 0.9, ranks, 200, 400, 100, 120, "held-out examples"),
            **{"equal_rank": 3, "sizes": [400, 200, 100], "shares": [1.0, 0.99, 0.72], "lows": [1.0, 0.985, None]},
        )
        settings = {"adapter": {"r": 2}}
        found.append(Run(name, history[-1][1], facts, settings, history, log, shrunk=shrunk))
    found[0].by_class = record(4)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(runs, path, title="Two <runs>")
    return path


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Page]:
    """The page, opened; at the end nothing must have gone wrong or been asked of a network."""
    context = browser.new_context()
    wrong: list[str] = []
    yield opened(context.new_page(), file, wrong)
    context.close()
    assert wrong == []


def opened(page: Page, file: Path, wrong: list[str] | None = None) -> Page:
    wrong = [] if wrong is None else wrong
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else wrong.append(request.url),
    )
    page.goto(file.as_uri())
    try:
        page.wait_for_selector("body[data-ready]")
    finally:
        assert wrong == []
    return page
