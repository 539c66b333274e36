"""Put the results of a demo run into docs/demo.md: python docs/update_demo.py [DEMO_FOLDER].

Without a folder, the page is made again from the results stored in docs/demo.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sections import row, with_section

from lrlora import RankReport

DOCS = Path(__file__).parent
STORED = DOCS / "demo"
PAGE = DOCS / "demo.md"


def store(demo: Path) -> None:
    """Copy what the page needs from a demo's output folder to docs/demo."""
    STORED.mkdir(exist_ok=True)
    for name in ("results.json", "settings.json", "ranks.png"):
        shutil.copy(demo / name, STORED / name)
    for result in results_of(demo, "reviews"):
        report = RankReport.from_json(demo / result["folder"] / "ranks.json")
        RankReport(report.rows).to_json(STORED / f"{result['folder']}.json")


def results_of(demo: Path, task: str) -> list[dict[str, Any]]:
    """The results on "reviews", which have a folder each, or "labels"."""
    return [result for result in json.loads((demo / "results.json").read_text()) if result["task"] == task]


def render() -> str:
    """The generated section, in Markdown."""
    steps = json.loads((STORED / "settings.json").read_text())["steps"]
    reviews, labels = (results_of(STORED, task) for task in ("reviews", "labels"))
    first = labels[0]["seconds_per_step"]
    lines = [
        "![Learned ranks by layer and module type, and the learned φ](demo/ranks.png)",
        "",
        f"MiniLM-L6 on movie-review sentiment, films held out; {steps} steps of 16, one seed:",
        "",
        row("", *(r["method"] for r in reviews)),
        "|---" * (len(reviews) + 1) + "|",
        row("accuracy ± standard error", *(f"{r['value']:.3f} ± {r['standard_error']:.3f}" for r in reviews)),
        row("trainable parameters, head included", *(f"{r['trainable_parameters']:,}" for r in reviews)),
    ]
    reports = [RankReport.from_json(STORED / f"{result['folder']}.json").rows for result in reviews]
    for measure, digits in (("stable_rank", 1), ("energy99_rank", 0)):
        for kind in ("attention", "mlp"):
            ranks = ([getattr(r, measure) for r in rows if r.kind == kind] for rows in reports)
            cells = (
                f"{min(values):.{digits}f} / {sum(values) / len(values):.1f} / {max(values):.{digits}f}"
                for values in ranks
            )
            lines.append(row(f"{measure.replace('_', ' ')}, {kind}: min / mean / max", *cells))
    above = (f"{sum(r.energy99_rank > r.r for r in rows)} of {len(rows)}" for rows in reports)
    lines += [
        row("modules with energy99 rank > r", *above),
        "",
        "The MLP of its last layer, on random labels to be memorized; rate and scale tuned for each method:",
        "",
        row("", *(r["method"] for r in labels)),
        "|---" * (len(labels) + 1) + "|",
        row("loss on the labels, nats (chance: 4.16)", *(f"{r['value']:.2f}" for r in labels)),
        row("trainable parameters", *(f"{r['trainable_parameters']:,}" for r in labels)),
        row("time of a step, relative to LoRA, r=4", *(f"{r['seconds_per_step'] / first:.2f}" for r in labels)),
    ]
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """The page with its section regenerated."""
    return with_section(readme, "demo", render())


def main() -> None:
    """Store the given run, if there is one, and rewrite the page between its markers."""
    if len(sys.argv) > 1:
        store(Path(sys.argv[1]))
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
