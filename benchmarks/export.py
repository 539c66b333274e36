"""Export quality: the demo's adapter as plain LoRA at several sizes, evaluated with PEFT alone on held-out films.

lrlora demo
python benchmarks/export.py lrlora-demo            # about 5 minutes; --python names one without lrlora
python benchmarks/export.py --report               # only render docs/export.md from the stored results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

PAGE, RESULTS = DOCS / "export.md", DOCS / "export" / "demo.json"
BUDGET_RANK = 4
# Runs without lrlora: transformers and PEFT alone.
EVALUATE = """
import json, sys
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
folder, inputs, needs_lrlora = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3] == "lrlora"
if needs_lrlora:
    import lrlora
model = AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
assert needs_lrlora or "lrlora" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
answers = []
with torch.no_grad():
    for start in range(0, len(inputs["texts"]), 64):
        batch = tokenizer(inputs["texts"][start : start + 64], padding=True, truncation=True,
                          max_length=inputs["max_tokens"], return_tensors="pt")
        answers += model(**batch).logits.argmax(-1).tolist()
json.dump(answers, sys.stdout)
"""


def answers(python: str, folder: Path, inputs: Path, *, with_lrlora: bool = False) -> list[int]:
    """Classes predicted in a separate process."""
    command = [python, "-c", EVALUATE, str(folder), str(inputs), "lrlora" if with_lrlora else "peft"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(demo: Path, python: str) -> list[dict[str, Any]]:
    """Records of the demo's two adapters and of each export of the first."""
    from lrlora.adapters import factorize, output_difference, read_updates, save_as_lora
    from lrlora.adapters.factorize import parameters_of_rank
    from lrlora.train.embedded import load_movie_reviews

    test = load_movie_reviews()["test"]
    adapter = demo / "reviews-lr-lora"
    model = read_updates(adapter)
    truncations: dict[str, dict[str, Any]] = {f"energy {energy}": {"energy": energy} for energy in (0.9, 0.99, 0.999)}
    truncations[f"budget of LoRA r = {BUDGET_RANK}"] = {"budget": parameters_of_rank(model, BUDGET_RANK)}
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.json"
        inputs.write_text(json.dumps({"texts": list(test["text"]), "max_tokens": 48}))
        original = answers(sys.executable, adapter, inputs, with_lrlora=True)

        def record(name: str, folder: Path, given: list[int], **more: Any) -> dict[str, Any]:
            right = sum(a == b for a, b in zip(given, test["label"], strict=True)) / len(given)
            changed = sum(a != b for a, b in zip(given, original, strict=True)) / len(given)
            size = (folder / "adapter_model.safetensors").stat().st_size
            return {"name": name, "accuracy": right, "changed": changed, "bytes": size, **more}

        records = [record("LR-LoRA, the demo's", adapter, original)]
        for name, truncation in truncations.items():
            folder = Path(scratch) / name
            factors = factorize(model, **truncation)
            save_as_lora(factors, adapter, folder)
            ranks = [part.rank for part in factors]
            records.append(
                record(
                    name,
                    folder,
                    answers(python, folder, inputs),
                    ranks=[min(ranks), sum(ranks) / len(ranks), max(ranks)],
                    parameters=sum(part.parameters for part in factors),
                    difference=output_difference(adapter, folder),
                )
            )
        records.append(
            record("LoRA, the demo's", demo / "reviews-lora", answers(python, demo / "reviews-lora", inputs))
        )
    return records


def render(records: list[dict[str, Any]]) -> str:
    """The table."""
    rows = []
    for r in records:
        least, mean, most = r.get("ranks", (None,) * 3)
        rows.append(
            [
                r["name"],
                "" if mean is None else f"{least} / {mean:.1f} / {most}",
                "" if mean is None else f"{r['parameters']:,}",
                f"{r['bytes'] / 2**20:.2f}",
                f"{100 * r['accuracy']:.2f}",
                f"{100 * r['changed']:.2f}",
                "" if mean is None else f"{100 * r['difference']:.1f}",
            ]
        )
    header = ["", "ranks: min / mean / max", "parameters", "MiB", "accuracy, %", "answers changed, %", "effect lost, %"]
    return table(header, rows)


def updated(page: str) -> str:
    """Page with the table of the stored results."""
    return with_section(page, "export", render(json.loads(RESULTS.read_text(encoding="utf-8"))))


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="?", help="output folder of `lrlora demo`")
    parser.add_argument("--python", default=sys.executable, help="interpreter that evaluates the exports")
    parser.add_argument("--report", action="store_true", help="only render docs/export.md from the stored results")
    arguments = parser.parse_args()
    if not arguments.report:
        if arguments.demo is None:
            parser.error("name the output folder of `lrlora demo`")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(arguments.demo, arguments.python), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
