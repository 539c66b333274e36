"""The model card of a run."""

from __future__ import annotations

from ..rank import MEASURES
from ..tuner.config import CARD_SECTION
from .figure import LABELS
from .page import Run

_LOADING = """## Loading this LoRA adapter

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or hub name")
```
"""


def model_card(run: Run, picture: str) -> str:
    """Method, base, data, metrics, ranks by kind of module, their picture, and how to load it; Markdown.

    Args:
        run: the run.
        picture: path of the picture from the card.

    """
    method = run.facts["method"]
    kinds = sorted({row.kind for row in run.report.rows})
    lines = ["| | " + " | ".join(f"{kind}: min / mean / max" for kind in kinds) + " |", "|---|" + "---|" * len(kinds)]
    for measure in MEASURES:
        cells = []
        for kind in kinds:
            ranks = [getattr(row, measure) for row in run.report.rows if row.kind == kind]
            cells.append(f"{min(ranks):.3g} / {sum(ranks) / len(ranks):.3g} / {max(ranks):.3g}")
        lines.append(f"| {LABELS[measure]} | " + " | ".join(cells) + " |")
    parts = [
        f"# {run.name}",
        f"An adapter of the method {method}, trained with lrlora.",
        "\n".join(f"- {name}: {value}" for name, value in run.facts.items()),
        "## Ranks of ΔW",
        "\n".join(lines),
        f"![Learned ranks]({picture})",
        CARD_SECTION if method == "LR-LoRA" else _LOADING,
    ]
    return "\n\n".join(parts)
