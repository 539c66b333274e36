"""The model card of a run."""

from __future__ import annotations

import re
from pathlib import Path

from ..files import write_whole
from ..rank import MEASURES
from ..run_folder import CHAT, PICTURE_FILE
from ..tuner.config import CARD_SECTION
from .runs import PROMPTS, Run, load_run

_LOADING = """## Loading this LoRA adapter

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or hub name")
```
"""

_ASKING = """## Asking it

It was trained on chats: ask it in chats, with the tokenizer that is beside it.

```python
chat = [{"role": "user", "content": "…"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def write_card(folder: Path, metrics: dict[str, float] | None = None) -> None:
    """Replace the text of a saved adapter's model card by what is known of the run.

    Args:
        folder: of the run, with the adapter and PEFT's card, whose header stays. A picture of the ranks in it is shown.
        metrics: of the run, if they are not there as a file yet.

    """
    run = load_run(str(folder), folder.resolve().name, metrics)
    card = folder / "README.md"
    header = re.match(r"---\n.*?\n---\n", card.read_text(encoding="utf-8"), re.DOTALL)
    picture = PICTURE_FILE if (folder / PICTURE_FILE).exists() else None
    write_whole(card, (header[0] if header else "") + model_card(run, picture))


def model_card(run: Run, picture: str | None = None) -> str:
    """Method, base, data, metrics, ranks by kind of module, their picture, and how to load it; Markdown.

    Args:
        run: the run.
        picture: path of the picture from the card; None: there is none.

    """
    method = run.facts["method"]
    kinds = sorted({row.kind for row in run.report.rows})
    lines = ["| | " + " | ".join(f"{kind}: min / mean / max" for kind in kinds) + " |", "|---|" + "---|" * len(kinds)]
    for measure in MEASURES:
        cells = []
        for kind in kinds:
            ranks = [getattr(row, measure) for row in run.report.rows if row.kind == kind]
            cells.append(f"{min(ranks):.3g} / {sum(ranks) / len(ranks):.3g} / {max(ranks):.3g}")
        lines.append(f"| {MEASURES[measure].label} | " + " | ".join(cells) + " |")
    parts = [
        f"# {run.name}",
        f"An adapter of the method {method}, trained with lrlora.",
        "\n".join(f"- {name}: {value}" for name, value in run.facts.items()),
        "## Ranks of ΔW",
        "\n".join(lines),
        *([f"![Learned ranks]({picture})"] if picture else []),
        CARD_SECTION if method == "LR-LoRA" else _LOADING,
        *([_ASKING] if run.facts.get("prompts") == PROMPTS[CHAT] else []),
    ]
    return "\n\n".join(parts)
