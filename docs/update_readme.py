"""Put the results of a demo run into the README: python docs/update_readme.py [DEMO_FOLDER].

Without a folder, the README is rendered again from the results stored in docs/demo.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from sections import row, with_section

from lrlora import RankReport
from lrlora.rank import MEASURES

DOCS = Path(__file__).parent
STORED = DOCS / "demo"
README = DOCS.parent / "README.md"
METHODS = ("lr-lora", "lora")


def store(demo: Path) -> None:
    """Copy what the README needs from a demo's output folder to docs/demo."""
    STORED.mkdir(exist_ok=True)
    for name in ("results.json", "settings.json", "ranks.png"):
        shutil.copy(demo / name, STORED / name)
    for method in METHODS:
        report = RankReport.from_json(demo / method / "ranks.json")
        RankReport(report.rows).to_json(STORED / f"{method}.json")


def render() -> str:
    """The README's section, in Markdown."""
    settings = json.loads((STORED / "settings.json").read_text())
    results = {result["method"]: result for result in json.loads((STORED / "results.json").read_text())}
    reports = {method: RankReport.from_json(STORED / f"{method}.json").rows for method in METHODS}
    lines = [
        "![Learned ranks by layer and module type, and the learned φ](docs/demo/ranks.png)",
        "",
        f"MiniLM-L6 on movie-review sentiment, films held out; r = {settings['r']}, {settings['steps']} steps of "
        f"{settings['batch_size']} at learning rate {settings['learning_rate']:g}, seed {settings['seed']}, "
        "both methods alike:",
        "",
        "| | LR-LoRA | LoRA |",
        "|---|---|---|",
        row(
            "accuracy ± standard error", *(f"{r['accuracy']:.3f} ± {r['standard_error']:.3f}" for r in ordered(results))
        ),
        row(
            "training time, relative to LoRA",
            *(f"{r['seconds'] / results['lora']['seconds']:.2f}" for r in ordered(results)),
        ),
        row("trainable parameters", *(f"{r['trainable_parameters']:,}" for r in ordered(results))),
    ]
    for measure in MEASURES:
        digits = 0 if measure.startswith("energy") else 1
        for kind in ("attention", "mlp"):
            ranks = ([getattr(r, measure) for r in rows if r.kind == kind] for rows in reports.values())
            cells = (
                f"{min(values):.{digits}f} / {sum(values) / len(values):.1f} / {max(values):.{digits}f}"
                for values in ranks
            )
            lines.append(row(f"{measure.replace('_', ' ')}, {kind}: min / mean / max", *cells))
    above = (f"{sum(r.energy99_rank > r.r for r in rows)} of {len(rows)}" for rows in reports.values())
    lines.append(row("modules with energy99 rank > r", *above))
    return "\n".join(lines) + "\n"


def ordered(results: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    """The results in the order of the table's columns."""
    return [results[method] for method in METHODS]


def updated(readme: str) -> str:
    """The README's text with its section rendered anew."""
    return with_section(readme, "demo", render())


def main() -> None:
    """Store the given run, if there is one, and rewrite the README between its markers."""
    if len(sys.argv) > 1:
        store(Path(sys.argv[1]))
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
