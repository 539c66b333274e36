"""What a model card says of a run."""

from __future__ import annotations

from ..rank import MEASURES
from .figure import LABELS
from .page import Run


def card_section(run: Run, picture: str) -> str:
    """Method, base, data, metrics, ranks by kind of module, and the picture, as a section in Markdown.

    Args:
        run: the run.
        picture: path of the picture from the card.

    """
    facts = [f"- {name}: {value}" for name, value in run.facts.items()]
    kinds = sorted({row.kind for row in run.report.rows})
    lines = ["| | " + " | ".join(f"{kind}: min / mean / max" for kind in kinds) + " |", "|---|" + "---|" * len(kinds)]
    for measure in MEASURES:
        cells = []
        for kind in kinds:
            ranks = [getattr(row, measure) for row in run.report.rows if row.kind == kind]
            cells.append(f"{min(ranks):.3g} / {sum(ranks) / len(ranks):.3g} / {max(ranks):.3g}")
        lines.append(f"| {LABELS[measure]} | " + " | ".join(cells) + " |")
    return "\n".join(
        ["## What was trained", "", *facts, "", "Ranks of ΔW:", "", *lines, "", f"![Learned ranks]({picture})", ""]
    )
