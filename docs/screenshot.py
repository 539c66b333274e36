"""The picture in report.md: python docs/screenshot.py PAGE, a page that `lrlora demo` or `lrlora report` wrote."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent / "report" / "demo.png"


def main() -> None:
    """Open the page in Chromium, and save what a reader sees first."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1408})
        page.goto(Path(sys.argv[1]).absolute().as_uri())
        page.wait_for_selector("body[data-ready]")
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
