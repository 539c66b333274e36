"""Put what the behaviour tests found into docs/compatibility.md: python docs/update_compatibility.py."""

from __future__ import annotations

import json
from pathlib import Path

from lrlora_lab.sections import table, with_section

DOCS = Path(__file__).parent
RESULTS = DOCS / "compatibility.json"
PAGE = DOCS / "compatibility.md"
FAMILIES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "gpt2": "GPT-2",
    "llama": "Llama",
    "mixtral": "Mixtral",
    "t5": "T5",
    "vit": "ViT",
    "features": "feature extraction",
    "mlp": "a module of one's own",
}


def render() -> str:
    """The table: a row for each behaviour, a column for each family."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [[behaviour, *(cells[family] for family in FAMILIES)] for behaviour, cells in results.items()]
    return table(["behaviour", *FAMILIES.values()], rows)


def updated(page: str) -> str:
    """The page with the table of the stored results."""
    return with_section(page, "behaviours", render())


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
