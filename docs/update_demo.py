"""Put the results of a demo run into docs/demo.md: python docs/update_demo.py [DEMO_FOLDER].

Without a folder, the page is made again from the results stored in docs/demo.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from lrlora_lab.sections import table, with_section

DOCS = Path(__file__).parent
STORED = DOCS / "demo"
PAGE = DOCS / "demo.md"


def store(demo: Path) -> None:
    """Copy what the page needs from a demo's output folder to docs/demo."""
    STORED.mkdir(exist_ok=True)
    for name in ("results.json", "settings.json", "ranks.png"):
        shutil.copy(demo / name, STORED / name)


def render() -> str:
    """The generated section, in Markdown."""
    settings, results = (json.loads((STORED / f"{name}.json").read_text()) for name in ("settings", "results"))
    rows = [
        [
            result["method"],
            f"{result['learning_rate']:g}",
            f"{result['parameters']:,}",
            f"{result['loss']:.3f}",
            f"{result['accuracy']:.3f} ± {result['standard_error']:.3f}",
        ]
        for result in results
    ]
    heads = ["method", "learning rate", "parameters, head included", "test loss", "accuracy ± standard error"]
    picture = "![Rank by layer and module: LoRA, LR-LoRA, and the LoRA cut](demo/ranks.png)"
    title = f"News topics, 8 classes; {settings['steps']} steps of 16, seed {settings['seed']}:"
    return "\n\n".join([picture, title, table(heads, rows)])


def updated(page: str) -> str:
    """The page with its section regenerated."""
    return with_section(page, "demo", render())


def main() -> None:
    """Store the given run, if there is one, and rewrite the page between its markers."""
    if len(sys.argv) > 1:
        store(Path(sys.argv[1]))
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
