"""Cost of LR-LoRA and other methods: time and memory of training steps, generation time, and user-facing latency.

Some 30 minutes on two cores; a GPU is measured by `gpu`. Methods alternate in one
process, so that speed changes of the machine affect all of them; ratios are of medians. Peak memory is measured in a
separate process. Run it on an idle machine.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn

from lrlora import FittedRanks, LrLoraConfig, cached_weights
from lrlora.train.embedded import SMOLLM2, checkpoint

from ..sections import table
from . import Job, Measurement
from .card_speed import Record

ROUNDS = 5  # timed turns of each method
Step = Callable[[], None]
R, TERMS = 8, 4


def _bert() -> tuple[nn.Module, tuple[int, int]]:
    config: Any = transformers.BertConfig(num_hidden_layers=4)
    return transformers.BertForSequenceClassification(config), (8, 128)


def _llama(layers: int = 4) -> tuple[nn.Module, tuple[int, int]]:
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=4096)), (2, 512)


def _smollm2(dtype: torch.dtype) -> tuple[nn.Module, tuple[int, int]]:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint(SMOLLM2), dtype=dtype), (8, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, int]]]] = {
    "BERT-base shapes, 4 layers, 8 × 128": _bert,
    "Llama shapes, hidden 1024, 4 layers, 2 × 512": _llama,
    "SmolLM2-135M, 8 × 64": partial(_smollm2, torch.float32),
    "SmolLM2-135M in bfloat16, 8 × 64": partial(_smollm2, torch.bfloat16),
}
WITH_MEMORY = tuple(MODELS)[:2]
TRAINED = {
    "SmolLM2-135M, 4 × 64": lambda: (_smollm2(torch.float32)[0], (4, 64)),
    "Llama shapes, hidden 1024, 4 layers, 2 × 128": lambda: (_llama()[0], (2, 128)),
}
TRAINED_STEPS = 20
LEARNED = "learned ranks"  # in the stored rows
EXPANSION = f"expansion, Q = {TERMS}"
METHODS = (
    "LoRA",
    f"LoRA, r = {R * TERMS}",
    EXPANSION,
    "LR-LoRA",
    "LR-LoRA, N = 50",
    "the paper's form",
    "DoRA",
    "HiRA",
    "full fine-tuning",
    "frozen base",
)


def adapt(model: Any, method: str) -> Any:
    """Add a method's adapter to all linear layers of the model's blocks."""
    if method == "full fine-tuning":
        return model.train()
    model.requires_grad_(False)
    if method == "frozen base":
        return model.train()
    linear = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in name)
    common: dict[str, Any] = {"r": R, "target_modules": sorted({name.rpartition(".")[2] for name in linear})}
    configs: dict[str, Callable[[], Any]] = {
        "LoRA": lambda: LoraConfig(**common, lora_alpha=R),
        LEARNED: lambda: LoraConfig(**common | {"r": 4 * R}, lora_alpha=4 * R),
        METHODS[1]: lambda: LoraConfig(**common | {"r": R * TERMS}, lora_alpha=R * TERMS),
        "DoRA": lambda: LoraConfig(**common, lora_alpha=R, use_dora=True),
        "HiRA": lambda: HiraConfig(**common),
        "LR-LoRA": lambda: LrLoraConfig(**common),
        "LR-LoRA, N = 50": lambda: LrLoraConfig(**common, num_basis=50),
        "the paper's form": lambda: LrLoraConfig.paper(**common),
        EXPANSION: lambda: LrLoraConfig(**common, form="expansion", num_terms=TERMS),
    }
    return get_peft_model(model, configs[method]()).train()


def training_step(name: str, method: str) -> Step:
    """One optimizer step of a method on a model."""
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    return _step(model, shape, method)


def _step(model: Any, shape: tuple[int, int], method: str) -> Step:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    vocabulary, is_causal = model.config.vocab_size, "CausalLM" in type(model).__name__
    model = adapt(model, method)
    tokens = torch.randint(0, vocabulary, shape)
    embed: Any = model.get_input_embeddings()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    if method == LEARNED:
        FittedRanks(model, optimizer, size=f"r{R}", steps=TRAINED_STEPS)
    labels = tokens if is_causal else torch.zeros(shape[0], dtype=torch.long)

    def step() -> None:
        # The gradient reaches the first block in all methods.
        embedded = embed(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=labels).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def layer_step(method: str, size: int = 2048, tokens: int = 1024) -> Step:
    """Forward and backward of one linear layer, size × size."""
    torch.manual_seed(0)
    layer = adapt(nn.Sequential(OrderedDict(layer=nn.Linear(size, size))), method)
    x = torch.randn(tokens, size, requires_grad=True)
    grad = torch.randn(tokens, size)
    return lambda: layer(x).backward(grad)


# Axis → the argument of `layer_step`, and its values.
GROWTH = {
    "width m = n, of 1,024 tokens": ("size", (512, 1024, 2048, 4096, 8192)),
    "tokens, width 2048": ("tokens", (32, 128, 512, 2048, 8192)),
}
LAYERS = "layers, Llama shapes, whole steps"
GROWING = ("LoRA", EXPANSION, "LR-LoRA")


def generation(method: str) -> Step:
    """64 new tokens for each of 2 prompts of 64, greedy, with the Llama shapes."""
    torch.manual_seed(0)
    model: Any = _llama()[0]
    name, _, cached = method.partition(", ")
    if "base model" not in method:
        model = adapt(model, EXPANSION if name == "expansion" else name)
    model = model.eval()
    prompt = torch.randint(0, 4096, (2, 64))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}

    def step() -> None:
        with torch.no_grad(), cached_weights(model) if cached == "cached_weights" else nullcontext():
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)

    return step


GENERATORS = ("base model", "base model, a second one", "LoRA", "expansion", "LR-LoRA", "LR-LoRA, cached_weights")


def alternate(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each, alternating; excludes the first turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def peak_memory(name: str, method: str) -> float:
    """MiB added by two steps, in a separate process."""
    command = [sys.executable, "-m", __name__, "memory", name, method]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _memory_of(name: str, method: str) -> float:
    before = _status("VmHWM")
    step = training_step(name, method)
    step()
    step()
    return _status("VmHWM") - before


def measure_learned(rounds: int) -> list[Record]:
    """Whole trainings with fitted ranks and with LoRA of their size, each in a process, alternating."""
    records = []
    for name in TRAINED:
        for turn in range(rounds):
            for method in ("LoRA", LEARNED):
                command = [sys.executable, "-m", __name__, "train", name, method]
                words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                seconds, mib = map(float, words[-2:])
                records.append({"name": name, "method": method, "turn": turn, "seconds": seconds, "mib": mib})
    return records


def _train(name: str, method: str) -> tuple[float, float]:
    """Seconds of processor time of a training, and peak memory of this process in MiB."""
    torch.manual_seed(0)
    step = _step(*TRAINED[name](), method)
    start = time.process_time()
    for _ in range(TRAINED_STEPS):
        step()
    return time.process_time() - start, _status("VmHWM")


def _status(name: str) -> float:
    """Memory of this program in MiB; `getrusage` would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError("Memory is read from /proc/self/status, which this system does not have: use Linux.")


def _run(*command: str) -> Step:
    def run() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return run


def measure_steps(rounds: int) -> list[Record]:
    """Full training steps."""
    records = []
    for name in MODELS:
        seconds = alternate({method: training_step(name, method) for method in METHODS}, rounds)
        gc.collect()
        for method, value in seconds.items():
            record = {"name": name, "method": method, "seconds": value}
            if name in WITH_MEMORY:
                record["peak_mib"] = peak_memory(name, method)
            records.append(record)
    return records


def measure_growth(rounds: int) -> list[Record]:
    """One layer of growing size, then models with more and more layers."""
    records = []
    for axis, (argument, values) in GROWTH.items():
        for value in values:
            steps = {method: layer_step(method, **{argument: value}) for method in GROWING}
            seconds = alternate(steps, 3 if value > 4096 else 2 * rounds)
            records += [{"name": axis, "value": value, "method": m, "seconds": seconds[m]} for m in GROWING]
    for layers in (1, 4, 12):
        steps = {method: _step(*_llama(layers), method) for method in GROWING}
        seconds = alternate(steps, rounds)
        records += [{"name": LAYERS, "value": layers, "method": m, "seconds": seconds[m]} for m in GROWING]
    return records


def measure_generation(rounds: int) -> list[Record]:
    """Generation; two identical base models show the noise."""
    seconds = alternate({method: generation(method) for method in GENERATORS}, rounds)
    return [{"method": method, "seconds": value} for method, value in seconds.items()]


def measure_waiting(rounds: int) -> list[Record]:
    """User-facing latency outside of training."""
    commands = {
        "import typer, rich": _run(sys.executable, "-c", "import typer, rich"),
        "lrlora --help": _run(str(Path(sys.executable).with_name("lrlora")), "--help"),
        "import lrlora": _run(sys.executable, "-c", "import lrlora"),
    }
    return [{"what": what, "value": value} for what, value in alternate(commands, rounds).items()]


MEASURES = {
    "steps": measure_steps,
    "learned": measure_learned,
    "growth": measure_growth,
    "generation": measure_generation,
    "waiting": measure_waiting,
}


def sections(records: dict[str, Record]) -> dict[str, str]:
    """The tables."""
    by_kind = {kind: records[kind]["rows"] for kind in MEASURES}
    steps = {(r["name"], r["method"]): r for r in by_kind["steps"]}
    rows = []
    for method in METHODS:
        row = [method]
        for name in MODELS:
            ours, lora = steps[name, method], steps[name, "LoRA"]
            measured = (unit for unit in ("seconds", "peak_mib") if unit in ours)
            row.append(" · ".join(f"{ours[unit] / lora[unit]:.2f}" for unit in measured))
        rows.append(row)
    parts = ["### A training step: time · peak memory, as multiples of LoRA's\n", table(["", *MODELS], rows)]
    rows = [_learned_row(name, [r for r in by_kind["learned"] if r["name"] == name]) for name in TRAINED]
    title = f"\n### Fitted ranks at the size of r = {R}: {TRAINED_STEPS} steps, as multiples of LoRA's\n"
    parts += [title, table(["", "processor time", "range", "peak memory of the process"], rows)]
    rows = []
    for axis in (*GROWTH, LAYERS):
        values = dict.fromkeys(r["value"] for r in by_kind["growth"] if r["name"] == axis)
        for value in values:
            by_method = {r["method"]: r for r in by_kind["growth"] if (r["name"], r["value"]) == (axis, value)}
            cells = [f"{by_method[method]['seconds'] / by_method['LoRA']['seconds']:.2f}" for method in GROWING[1:]]
            rows.append([axis, f"{value:,}", *cells])
    heads = ["", "", *(f"{method}: time / LoRA" for method in GROWING[1:])]
    parts += ["\n### How it grows: forward and backward of one linear layer\n", table(heads, rows)]
    base = by_kind["generation"][0]["seconds"]
    rows = [[r["method"], f"{r['seconds'] / base:.2f}"] for r in by_kind["generation"]]
    parts += ["\n### 64 new tokens for each of 2 prompts of 64, Llama shapes\n", table(["", "time / base model"], rows)]
    waits = {r["what"]: r["value"] for r in by_kind["waiting"]}
    reference = waits["import typer, rich"]
    rows = [[what, f"{waits[what] / reference:.1f}"] for what in ("lrlora --help", "import lrlora")]
    parts += ["\n### Starting, as multiples of importing typer and rich\n", table(["", "time"], rows)]
    return {"speed": "\n".join(parts)}


def _learned_row(name: str, records: list[Record]) -> list[str]:
    """Medians of the ratios within each turn."""
    by_turn = {(r["method"], r["turn"]): r for r in records}
    turns = sorted({r["turn"] for r in records})
    times, memory = (
        [by_turn[LEARNED, turn][unit] / by_turn["LoRA", turn][unit] for turn in turns] for unit in ("seconds", "mib")
    )
    return [name, f"{median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}", f"{median(memory):.2f}"]


def _measured(kind: str, _: Path) -> Record:
    return {"rows": MEASURES[kind](ROUNDS)}


MEASUREMENT = Measurement(
    "docs/speed.md", {kind: Job(partial(_measured, kind), is_timed=True) for kind in MEASURES}, sections
)

if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(_memory_of(*arguments) if what == "memory" else " ".join(map(str, _train(*arguments))))
