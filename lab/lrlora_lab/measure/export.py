"""Export quality: an LR-LoRA as plain LoRA at several sizes, evaluated with PEFT alone on held-out films."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lrlora.adapters import factorize, output_difference, read_updates, save_as_lora
from lrlora.adapters.factorize import parameters_of_rank
from lrlora.train.embedded import load_movie_reviews

from ..pool import Record
from ..sections import table
from . import Job, Measurement

METHODS = ("lr-lora", "lora")
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


def answers(folder: Path, inputs: Path, *, with_lrlora: bool = False) -> list[int]:
    """Classes predicted in a separate process."""
    command = [sys.executable, "-c", EVALUATE, str(folder), str(inputs), "lrlora" if with_lrlora else "peft"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def train(files: Path) -> Record:
    """Train LR-LoRA and LoRA on film reviews."""
    options = "--model embedded:minilm --data embedded:movie-reviews --task classify --rank 8 --learning-rate 2e-3"
    options += " --steps 50 --batch-size 16 --max-length 48"
    for method in METHODS:
        command = [str(Path(sys.executable).parent / "lrlora"), "train", "--method", method, *options.split()]
        subprocess.run([*command, "--output", str(files / method)], check=True)
    return {}


def measure(files: Path) -> Record:
    """Records of the two adapters and of each export of the first."""
    test = load_movie_reviews()["test"]
    adapter, plain = (files / method for method in METHODS)
    model = read_updates(adapter)
    truncations: dict[str, dict[str, Any]] = {f"energy {energy}": {"energy": energy} for energy in (0.9, 0.99, 0.999)}
    truncations[f"budget of LoRA r = {BUDGET_RANK}"] = {"budget": parameters_of_rank(model, BUDGET_RANK)}
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.json"
        inputs.write_text(json.dumps({"texts": list(test["text"]), "max_tokens": 48}))
        original = answers(adapter, inputs, with_lrlora=True)

        def record(name: str, folder: Path, answered: list[int], **more: Any) -> dict[str, Any]:
            right = sum(a == b for a, b in zip(answered, test["label"], strict=True)) / len(answered)
            changed = sum(a != b for a, b in zip(answered, original, strict=True)) / len(answered)
            size = (folder / "adapter_model.safetensors").stat().st_size
            return {"name": name, "accuracy": right, "changed": changed, "bytes": size, **more}

        records = [record("LR-LoRA", adapter, original)]
        for name, truncation in truncations.items():
            folder = Path(scratch) / name
            factors = factorize(model, **truncation)
            save_as_lora(factors, adapter, folder)
            ranks = [part.rank for part in factors]
            records.append(
                record(
                    name,
                    folder,
                    answers(folder, inputs),
                    ranks=[min(ranks), sum(ranks) / len(ranks), max(ranks)],
                    parameters=sum(part.parameters for part in factors),
                    difference=output_difference(adapter, folder),
                )
            )
        records.append(record("LoRA", plain, answers(plain, inputs)))
    return {"adapters": records}


def sections(records: dict[str, Record]) -> dict[str, str]:
    """The table."""
    rows = []
    for r in records["exports"]["adapters"]:
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
    return {"export": table(header, rows)}


MEASUREMENT = Measurement("docs/export.md", {"training": Job(train), "exports": Job(measure, ("training",))}, sections)
