"""Worth of a small adapter where it is used: files, loading, switching and speed in PEFT and llama.cpp, on a CPU.

    pip install xllamacpp gguf
    python -m lrlora_lab.smallness

SmolLM2-135M with a LoRA r = 16 on all linear layers, one with the ranks and size of a cut (0 to 6, r = 1.5 on average),
and one of r = 2 in every module; random weights, since times depend on shapes alone. All are measured in turns; times
are medians, relative to the whole adapter.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import xllamacpp
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrlora.train.embedded import SMOLLM2, fetch
from lrlora.train.models import model_source

from .llama_cpp import write_gguf
from .sections import table

REPEATS, TOKENS, FLEET = 3, 48, 20
# Share of the modules with each rank.
RANKS = {
    "whole, r = 16": {16: 1.0},
    "cut, r = 0 to 6": {0: 0.2, 1: 0.4, 2: 0.25, 3: 0.1, 6: 0.05},
    "r = 2 in every module": {2: 1.0},
}


def save_adapter(ranks: dict[int, float], folder: Path) -> None:
    """Save a LoRA of SmolLM2 whose modules have ranks in these shares."""
    source = model_source("embedded:smollm2")
    base: Any = AutoModelForCausalLM.from_pretrained(source)
    paths = [path for path, module in base.named_modules() if path.endswith("_proj")]
    drawn = np.random.default_rng(0).choice(list(ranks), size=len(paths), p=list(ranks.values()))
    pattern = {path: int(rank) for path, rank in zip(paths, drawn, strict=True) if rank}
    config = LoraConfig(
        r=max(ranks),
        lora_alpha=16,
        target_modules=list(pattern),
        rank_pattern=pattern,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(str(folder))


def peft_times(folder: Path) -> dict[str, Callable[[], float]]:
    """Measure → function that measures it once, in seconds."""
    source = model_source("embedded:smollm2")
    tokens = AutoTokenizer.from_pretrained(source)("The capital of France is", return_tensors="pt")
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder).eval()
    for index in range(1, FLEET):
        model.load_adapter(folder, f"adapter-{index}")
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}

    def load() -> None:
        model.load_adapter(folder, "again")
        model.delete_adapter("again")

    def switch() -> None:
        for index in range(1, FLEET):
            model.set_adapter(f"adapter-{index}")
        model.set_adapter("default")

    def generate() -> None:
        with torch.no_grad():
            model.generate(**tokens, **options)

    return {"PEFT: load": _timed(load), f"PEFT: {FLEET} switches": _timed(switch), "PEFT: generate": _timed(generate)}


def llama_cpp_times(folder: Path, file: Path) -> dict[str, Callable[[], float]]:
    """The same, of llama.cpp with one adapter, and with a fleet of which one is used."""
    write_gguf(folder, file)

    def serve(count: int) -> xllamacpp.Server:
        params = xllamacpp.CommonParams()
        params.model.path = str(fetch(SMOLLM2))
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, torch.get_num_threads()
        loras = []
        for index in range(count):
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(file), float(index == 0)
            loras.append(lora)
        params.lora_adapters = loras
        return xllamacpp.Server(params)

    def answer(server: xllamacpp.Server, tokens: int = TOKENS) -> float:
        asked = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": tokens, "temperature": 0}
        return float(server.handle_chat_completions(asked)["timings"]["predicted_per_token_ms"])

    one, fleet = serve(1), serve(FLEET)
    return {
        "llama.cpp: first token": _timed(lambda: answer(serve(1), 1)),
        f"llama.cpp: first token with {FLEET}": _timed(lambda: answer(serve(FLEET), 1)),
        "llama.cpp: token": lambda: answer(one),
        f"llama.cpp: token, {FLEET} loaded": lambda: answer(fleet),
    }


def _timed(action: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    return seconds


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as scratch:
        measures: dict[str, dict[str, Callable[[], float]]] = {}
        sizes = {}
        for index, (name, ranks) in enumerate(RANKS.items()):
            folder = Path(scratch) / str(index)
            save_adapter(ranks, folder)
            sizes[name] = (folder / "adapter_model.safetensors").stat().st_size / 2**20
            measures[name] = peft_times(folder) | llama_cpp_times(folder, folder / "adapter.gguf")
        lines = [["file, MiB", *(f"{size:.2f}" for size in sizes.values())]]
        for measure in measures[next(iter(measures))]:
            times: dict[str, list[float]] = {name: [] for name in measures}
            for _ in range(REPEATS):
                for name, functions in measures.items():
                    times[name].append(functions[measure]())
            medians = {name: median(values) for name, values in times.items()}
            whole = medians[next(iter(medians))]
            lines.append([measure, *(f"{value / whole:.2f}" for value in medians.values())])
        print(table(["", *RANKS], lines))


if __name__ == "__main__":
    main()
