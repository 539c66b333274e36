"""How much loss an adapter loses when it is cut: by loss, by other rules, and beside LoRA trained at that size.

python benchmarks/loss_cut.py                      # about 3 hours on two cores; goes on where it stopped
python benchmarks/loss_cut.py --only news,german   # some of the tasks
python benchmarks/loss_cut.py --stage train        # or tune, cut: a part of the work, also beside another
python benchmarks/loss_cut.py --report             # only render docs/loss.md from the stored results
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

PAGE, RESULTS = DOCS / "loss.md", DOCS / "loss" / "results.jsonl"
SCRATCH = Path("lrlora-compress") / "loss"
SEEDS = (0, 1, 2)
SHARES = {0.5: 4, 0.25: 2}  # of the size of r = 8 → the r of LoRA trained at that size
RISE = 0.01


@dataclass(frozen=True)
class Task:
    """A run of `lrlora train`, and what it is tested on.

    Args:
        settings: of the run, without rank, rate, seed and output.
        test: data with a split `test`, or a file.
        rate: peak learning rate; of a task that is tuned here, that of the first seed's best.
        method, like: of the adapter that is cut, and the task whose LoRAs it is compared with.
        healing: steps.
        tests: examples.

    """

    settings: dict[str, Any]
    test: str
    rate: float
    method: str = "lora"
    like: str | None = None
    healing: int = 40
    tests: int = 512


_MINILM = {
    "model": "embedded:minilm", "task": "classify", "max_length": 48, "validation_examples": 512,
    "head_learning_rate": 1e-3, "training": {"eval_strategy": "no"},
}  # fmt: skip
_SMOLLM2 = {"model": "embedded:smollm2", "task": "causal-lm", "batch_size": 8, "max_length": 64, "steps": 50}
_SMOLLM2 |= {"training": {"eval_strategy": "no"}, "validation_examples": 128}
TASKS = {
    "news": Task(_MINILM | {"data": "embedded:20-newsgroups", "steps": 150}, "embedded:20-newsgroups", 4e-3),
    "r8": Task(_MINILM | {"data": "embedded:r8", "steps": 100}, "embedded:r8", 2e-3),
    "animals": Task(
        {
            "model": "embedded:vit", "task": "image-classify", "data": "embedded:animals", "steps": 150,
            "validation_examples": 512, "training": {"eval_strategy": "no"},
        },
        "embedded:animals",
        1e-3,
    ),
    "german": Task(_SMOLLM2 | {"data": str(SCRATCH / "german")}, str(SCRATCH / "german"), 2e-3, healing=12, tests=96),
    "chat": Task(_SMOLLM2 | {"data": str(SCRATCH / "chat")}, str(SCRATCH / "chat"), 2e-3, healing=12, tests=128),
}  # fmt: skip
TASKS["news, φ(BA)"] = replace(TASKS["news"], method="lr-lora", like="news")
TASKS["news, full"] = replace(TASKS["news"], method="full", like="news", rate=1e-4)
BYTES = "byte model"
TUNED = {"german": (1e-3, 2e-3, 4e-3), "chat": (1e-3, 2e-3, 4e-3), "news, full": (5e-5, 1e-4, 2e-4)}


def german() -> None:
    """Speeches, in pieces of some 64 tokens, without a common speech."""
    from datasets import Dataset, DatasetDict

    from lrlora.lab.compare.corpora import load_corpus

    parts = {}
    for name, data, count in zip(("train", "validation", "test"), load_corpus("german"), (800, 128, 200), strict=True):
        text, piece = data.numpy().tobytes().decode(errors="replace"), 200
        starts = [len(text) * i // count for i in range(count)]
        parts[name] = Dataset.from_dict({"text": [text[start : start + piece].strip() for start in starts]})
    DatasetDict(parts).save_to_disk(str(SCRATCH / "german"))


def chat() -> None:
    """Questions on functions of numpy, scipy and scikit-learn, answered by the first lines of what they say."""
    import hashlib
    import importlib
    import warnings

    from datasets import Dataset, DatasetDict

    warnings.simplefilter("ignore")
    names = ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "scipy.linalg", "scipy.stats", "scipy.signal")
    names += ("scipy.special", "scipy.ndimage", "scipy.optimize", "scipy.sparse", "scipy.spatial", "sklearn.metrics")
    names += ("sklearn.linear_model", "sklearn.preprocessing", "sklearn.ensemble", "sklearn.model_selection")
    rows: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    known: set[str] = set()
    for name in names:
        module = importlib.import_module(name)
        for each in sorted(dir(module)):
            said = inspect.getdoc(getattr(module, each)) or ""
            answer = " ".join(said.split("\n\n")[0].split())
            if each.startswith("_") or not 20 < len(answer) < 200 or answer in known or "(" in answer[:40]:
                continue
            known.add(answer)
            place = hashlib.sha256(answer.encode()).digest()[0] % 8
            part = "test" if place == 0 else "validation" if place == 1 else "train"
            question = {"role": "user", "content": f"What does {name}.{each} do?"}
            rows[part].append([question, {"role": "assistant", "content": answer}])
    DatasetDict({n: Dataset.from_dict({"messages": r}) for n, r in rows.items()}).save_to_disk(str(SCRATCH / "chat"))


def run_folder(name: str, method: str, rank: int, rate: float, seed: int) -> Path:
    """Train a run, unless it is there."""
    from lrlora.lab.config import TrainConfig
    from lrlora.lab.train import train

    for make in (german, chat):
        if not (SCRATCH / make.__name__).exists():
            make()
    rank = 0 if method == "full" else rank
    folder = SCRATCH / f"{name}-{method}-{rank}-{rate:g}-{seed}".replace(", φ(BA)", "").replace(", full", "")
    if not (folder / "metrics.json").exists():
        start = time.perf_counter()
        settings = TASKS[name].settings | ({"rank": rank} if rank else {})
        config = TrainConfig(**settings, method=method, learning_rate=rate, seed=seed, output=str(folder))
        found = train(config, overwrite=folder.exists(), announce=lambda line: None)
        print(f"{folder.name}: {found.metrics} in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def validation_loss(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text())["loss"])


def rate_of(name: str) -> float:
    """The peak learning rate of a task: the best of those tried with the first seed, on validation data."""
    task = TASKS[name]
    rates = TUNED.get(name, (task.rate,))
    if len(rates) == 1:
        return rates[0]
    return min(rates, key=lambda rate: validation_loss(run_folder(name, task.method, 8, rate, 0)))


def runs_of(name: str) -> Iterator[Path]:
    """All runs of a task."""
    task, rate = TASKS[name], rate_of(name)
    for seed in SEEDS:
        for rank in (8,) if task.like else (8, *SHARES.values()):
            yield run_folder(name, task.method, rank, rate, seed)
