"""Cost of measuring and compressing a large LoRA: about 5 minutes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from ..pool import Record
from ..sections import table
from . import Job, Measurement

# Shapes (m, n) of a layer of Llama 2 7B, which has 32.
LARGE_LAYERS, LARGE_RANK = 32, 64
LARGE_SHAPES = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (4096, 4096)) | {
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def cost_of(*arguments: str) -> dict[str, float]:
    """Seconds and peak memory (GiB) of an lrlora command in a separate process."""
    watch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [str(Path(sys.executable).parent / "lrlora"), *arguments]
    start = time.perf_counter()
    peak = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True).stdout
    return {"seconds": time.perf_counter() - start, "gibibytes": int(peak) / 2**20}


def large(files: Path) -> Record:
    """Ranks and compression of a random bfloat16 LoRA of rank 64 on all linear layers of a 7B model."""
    folder = files / "large"
    if not (folder / "adapter_config.json").exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for layer in range(LARGE_LAYERS):
            for name, (m, n) in LARGE_SHAPES.items():
                key = f"base_model.model.model.layers.{layer}.{name}.lora_"
                # Decaying singular values, like those of a trained LoRA.
                fall = torch.arange(1, LARGE_RANK + 1).pow(-0.7)[:, None]
                weights[f"{key}A.weight"] = (torch.randn(LARGE_RANK, n, generator=generator) * fall).bfloat16()
                weights[f"{key}B.weight"] = torch.randn(m, LARGE_RANK, generator=generator).bfloat16()
        save_file(weights, folder / "adapter_model.safetensors")
        targets = [name.partition(".")[2] for name in LARGE_SHAPES]
        LoraConfig(r=LARGE_RANK, lora_alpha=LARGE_RANK, target_modules=targets).save_pretrained(str(folder))
    record: dict[str, Any] = {"ranks": cost_of("ranks", str(folder))}
    for name, how in (("energy", ["--energy", "0.9"]), ("budget", ["--size", "r16"])):
        output = files / f"large-{name}"
        shutil.rmtree(output, ignore_errors=True)
        record[name] = cost_of("export", str(folder), *how, "--no-check", "--output", str(output))
    seconds = []
    for shape in ((4096, 4096), (11008, 4096)):
        B, A = torch.randn(shape[0], LARGE_RANK), torch.randn(LARGE_RANK, shape[1])
        start = time.perf_counter()
        torch.linalg.svd(B @ A, full_matrices=False)
        seconds.append(time.perf_counter() - start)
    record["full_svd_seconds"] = seconds
    record["full_svd_hours"] = LARGE_LAYERS * (4 * seconds[0] + 3 * seconds[1]) / 3600
    return record


def sections(records: dict[str, Record]) -> dict[str, str]:
    """Table of a large LoRA."""
    record = records["large"]
    labels = {
        "ranks": "`lrlora ranks`",
        "energy": "`lrlora export --energy 0.9`",
        "budget": "`lrlora export --size r16`",
    }
    rows = [
        [label, f"{record[n]['seconds']:.0f} s", f"{record[n]['gibibytes']:.1f} GiB"] for n, label in labels.items()
    ]
    rows.append(["SVD of every m × n matrix, from one of each shape", f"{record['full_svd_hours']:.1f} hours", ""])
    return {"large": table(["", "time", "peak memory"], rows)}


MEASUREMENT = Measurement("docs/compress.md", {"large": Job(large, is_timed=True)}, sections)
