"""φ at unit input where rates are low: c, rate and steps, beside LoRA and φ with g = 300, all at r = 4 and s = 4.

python -m lrlora_lab.low_rates FILE {labels,german} SEED ...

Rates are a quarter and an eighth of LoRA's tuned rate. Rows that the file has already are not computed again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from .capacity import CapacityTask, train_capacity
from .front import read_rows
from .methods import METHODS

TASKS = {"labels": (CapacityTask("labels", 800, 64), 0.005), "german": (CapacityTask("transfer", 500, 8), 0.01)}
SETTINGS = ((0.125, 1.0), (0.25, 1.0), (0.125, 0.25))  # factors of the rate, and of the number of steps
LORA, FIXED = "LoRA", "φ, g = 300"
ARMS: dict[str, float | None] = {LORA: None, FIXED: None, "φ, c = 0.5": 0.5, "φ, c = 2": 2.0}  # c at unit input


def run(path: Path, name: str, seed: int) -> None:
    """Train every arm at every setting."""
    task, tuned = TASKS[name]
    for of_rate, of_steps in SETTINGS:
        for arm, c in ARMS.items():
            steps, rate = round(of_steps * task.steps), of_rate * tuned
            key = {"task": name, "rate": rate, "steps": steps, "arm": arm, "seed": seed}
            if any(key.items() <= row.items() for row in read_rows(path)):
                continue
            method = METHODS["lora"] if arm == LORA else METHODS["lr-lora"]
            if arm == FIXED:
                method = replace(method, options={"input_gain": 300.0})
            with patch("lrlora.ops.transfer.INPUT_RMS", c or 0.5):
                found = train_capacity(replace(task, steps=steps), method, 4, 4.0, learning_rate=rate, seed=seed)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**key, "test": found["test"]["loss"]}) + "\n")


if __name__ == "__main__":
    output, name, *seeds = sys.argv[1:]
    for seed in seeds:
        run(Path(output), name, int(seed))
