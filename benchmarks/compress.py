"""Cost of measuring and compressing a large LoRA.

python benchmarks/compress.py            # about 5 minutes
python benchmarks/compress.py --report   # only render docs/compress.md from the stored results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

PAGE, RESULTS = DOCS / "compress.md", DOCS / "compress" / "large.json"
SCRATCH = Path("lrlora-compress")
# Shapes (m, n) of a layer of Llama 2 7B, which has 32.
LARGE_LAYERS, LARGE_RANK = 32, 64
LARGE_SHAPES = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (4096, 4096)) | {
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def run(*arguments: str) -> dict[str, float]:
    """Seconds and peak memory (GiB) of an lrlora command in a separate process."""
    watch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [str(Path(sys.executable).parent / "lrlora"), *arguments]
    start = time.perf_counter()
    peak = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True).stdout
    return {"seconds": time.perf_counter() - start, "gibibytes": int(peak) / 2**20}


def large() -> dict[str, Any]:
    """Ranks and compression of a random bfloat16 LoRA of rank 64 on all linear layers of a 7B model."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder = SCRATCH / "large"
    if not folder.exists():
        folder.mkdir(parents=True)
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
    found: dict[str, Any] = {"ranks": run("ranks", str(folder))}
    for name, how in (("energy", ["--energy", "0.9"]), ("budget", ["--size", "r16"])):
        output = SCRATCH / f"large-{name}"
        subprocess.run(["rm", "-rf", str(output)], check=True)
        found[name] = run("export", str(folder), *how, "--no-check", "--output", str(output))
    seconds = []
    for shape in ((4096, 4096), (11008, 4096)):
        B, A = torch.randn(shape[0], LARGE_RANK), torch.randn(LARGE_RANK, shape[1])
        start = time.perf_counter()
        torch.linalg.svd(B @ A, full_matrices=False)
        seconds.append(time.perf_counter() - start)
    found["full_svd_seconds"] = seconds
    found["full_svd_hours"] = LARGE_LAYERS * (4 * seconds[0] + 3 * seconds[1]) / 3600
    return found


def render_large(found: dict[str, Any]) -> str:
    """Table of a large LoRA."""
    labels = {
        "ranks": "`lrlora ranks`",
        "energy": "`lrlora export --energy 0.9`",
        "budget": "`lrlora export --size r16`",
    }
    rows = [[label, f"{found[n]['seconds']:.0f} s", f"{found[n]['gibibytes']:.1f} GiB"] for n, label in labels.items()]
    rows.append(["SVD of every m × n matrix, from one of each shape", f"{found['full_svd_hours']:.1f} hours", ""])
    return table(["", "time", "peak memory"], rows)


def updated(page: str) -> str:
    """Page with the table of the stored results."""
    return with_section(page, "large", render_large(json.loads(RESULTS.read_text())))


def main() -> None:
    """Measure and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="render what is stored")
    if not parser.parse_args().report:
        SCRATCH.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(large(), indent=1) + "\n")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
