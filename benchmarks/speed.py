"""Cost of LR-LoRA and other methods: time and memory of training steps, generation time, and user-facing latency.

    python benchmarks/speed.py            # some 30 minutes on two cores; writes docs/speed/results.jsonl
    python benchmarks/speed.py --only growth waiting
    python benchmarks/speed.py --device cuda
    python benchmarks/speed.py --report   # docs/speed.md from the stored results

Methods alternate in one process, so that speed changes of the machine affect all of them; ratios are of medians. Peak
memory is measured in a separate process. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path[:0] = [str(DOCS), str(Path(__file__).parent)]

import gpu  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import HiraConfig, LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from sections import table, with_section  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lrlora import LrLoraConfig, cached_weights  # noqa: E402
from lrlora.adapters import merge_adapter  # noqa: E402
from lrlora.train.packages import SMOLLM2, checkpoint  # noqa: E402

RESULTS = DOCS / "speed" / "results.jsonl"
PAGE = DOCS / "speed.md"
R, TERMS = 8, 4

Record = dict[str, Any]
Step = Callable[[], None]


def _bert() -> tuple[nn.Module, tuple[int, int]]:
    config = transformers.BertConfig(num_hidden_layers=4, attn_implementation="sdpa")
    return transformers.BertForSequenceClassification(config), (8, 128)


def _llama(layers: int = 4) -> tuple[nn.Module, tuple[int, int]]:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "num_attention_heads": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=4096)), (2, 512)


def _smollm2(dtype: torch.dtype) -> tuple[nn.Module, tuple[int, int]]:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint(SMOLLM2), dtype=dtype), (8, 64)


MODELS = {
    "BERT-base shapes, 4 layers, 8 × 128": _bert,
    "Llama shapes, hidden 1024, 4 layers, 2 × 512": _llama,
    "SmolLM2-135M, 8 × 64": partial(_smollm2, torch.float32),
    "SmolLM2-135M in bfloat16, 8 × 64": partial(_smollm2, torch.bfloat16),
}
WITH_MEMORY = tuple(MODELS)[:2]
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


def adapt(model: nn.Module, method: str, r: int = R, terms: int = TERMS) -> nn.Module:
    """Add a method's adapter to all linear layers of the model's blocks."""
    if method == "full fine-tuning":
        return model.train()
    model.requires_grad_(False)
    if method == "frozen base":
        return model.train()
    linear = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in name)
    common = {"r": r, "target_modules": sorted({name.rpartition(".")[2] for name in linear})}
    configs: dict[str, Callable[[], Any]] = {
        "LoRA": lambda: LoraConfig(**common, lora_alpha=r),
        METHODS[1]: lambda: LoraConfig(**common | {"r": r * terms}, lora_alpha=r * terms),
        "DoRA": lambda: LoraConfig(**common, lora_alpha=r, use_dora=True),
        "HiRA": lambda: HiraConfig(**common),
        "LR-LoRA": lambda: LrLoraConfig(**common),
        "LR-LoRA, N = 50": lambda: LrLoraConfig(**common, num_basis=50),
        "the paper's form": lambda: LrLoraConfig.paper(**common),
        EXPANSION: lambda: LrLoraConfig(**common, form="expansion", num_terms=terms),
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
    embed = model.get_input_embeddings()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    labels = tokens if is_causal else torch.zeros(shape[0], dtype=torch.long)

    def step() -> None:
        # The gradient reaches the first block in all methods.
        embedded = embed(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=labels).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def layer_step(method: str, size: int = 2048, tokens: int = 1024, r: int = R, terms: int = TERMS) -> Step:
    """Forward and backward of one linear layer, size × size."""
    torch.manual_seed(0)
    layer = adapt(nn.Sequential(OrderedDict(layer=nn.Linear(size, size))), method, r, terms)
    x = torch.randn(tokens, size, requires_grad=True)
    grad = torch.randn(tokens, size)
    return lambda: layer(x).backward(grad)


def saved_bytes(method: str, size: int = 2048, tokens: int = 1024, r: int = R, terms: int = TERMS) -> int:
    """Bytes that this layer's forward saves for backward, besides parameters and input."""
    torch.manual_seed(0)
    layer = adapt(nn.Sequential(OrderedDict(layer=nn.Linear(size, size))), method, r, terms)
    x = torch.randn(tokens, size, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


# Axis → its values, and the setting of each.
GROWTH: dict[str, tuple[tuple[int, ...], Callable[[int], dict[str, int]]]] = {
    "width m = n, of 1,024 tokens": ((512, 1024, 2048, 4096, 8192), lambda v: {"size": v}),
    "tokens, width 2048": ((32, 128, 512, 2048, 8192), lambda v: {"tokens": v}),
    "r, width 2048": ((1, 8, 32, 128), lambda v: {"r": v}),
    "Q at r = 4, width 2048": ((1, 4, 16, 64), lambda v: {"r": 4, "terms": v}),
}
GROWING = ("LoRA", EXPANSION, "LR-LoRA")


def generation(method: str) -> Step:
    """64 new tokens for each of 2 prompts of 64, greedy, with the Llama shapes."""
    torch.manual_seed(0)
    model, _ = _llama()
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
    command = [sys.executable, __file__, "--memory", name, method]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _memory_of(name: str, method: str) -> float:
    before = _status("VmHWM")
    step = training_step(name, method)
    step()
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """Memory of this program in MiB; `getrusage` would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError("Memory is read from /proc/self/status, which this system does not have: use Linux.")


def _run(*command: str) -> Step:
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) and None


def _large_adapter(folder: Path) -> None:
    """LoRA of rank 16 on all linear layers with Llama 70B's shapes."""
    hidden, mlp, heads = 8192, 28672, 1024
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    sizes |= {f"self_attn.{name}_proj": (heads, hidden) for name in "kv"}
    sizes |= {f"mlp.{name}_proj": (mlp, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, mlp)}
    weights = {}
    for layer in range(80):
        for name, (m, n) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{path}.lora_A.weight"] = torch.randn(16, n, dtype=torch.bfloat16)
            weights[f"{path}.lora_B.weight"] = torch.randn(m, 16, dtype=torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    LoraConfig(r=16, target_modules=[name.partition(".")[2] for name in sizes]).save_pretrained(folder)


def _merge_ratio(folder: Path) -> float:
    """Peak of merging an LR-LoRA adapter into SmolLM2, in model sizes, relative to a prior tiny merge."""
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny, vocab_size=64)).save_pretrained(folder / "tiny")
    for name, base in (("small", str(folder / "tiny")), ("large", str(checkpoint(SMOLLM2)))):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LrLoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(folder / name)
        del model
    transformers.AutoTokenizer.from_pretrained(checkpoint(SMOLLM2)).save_pretrained(folder / "tiny")
    script = f"import speed; speed._merge_both({str(folder)!r})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return float(done.stdout.split()[-1])


def _merge_both(folder: str) -> None:
    merge_adapter(Path(folder, "small"), Path(folder, "out", "small"), dtype=torch.float32)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    merge_adapter(Path(folder, "large"), Path(folder, "out", "large"), dtype=torch.float32)
    size = sum(file.stat().st_size for file in Path(folder, "out", "large").glob("*.safetensors")) / 2**20
    print((_status("VmHWM") - before) / size)


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
    for axis, (values, settings) in GROWTH.items():
        for value in values:
            chosen = settings(value)
            large = chosen.get("size", 2048) > 4096 or chosen.get("tokens", 0) > 4096
            steps = {method: layer_step(method, **chosen) for method in GROWING}
            seconds = alternate(steps, 3 if large else 2 * rounds)
            for method in GROWING:
                kept = saved_bytes(method, **chosen)
                records.append(
                    {"name": axis, "value": value, "method": method, "seconds": seconds[method], "kept": kept}
                )
    for layers in (1, 4, 12):
        steps = {method: _step(*_llama(layers), method) for method in GROWING}
        for method, value in alternate(steps, rounds).items():
            records.append(
                {"name": "layers, Llama shapes, whole steps", "value": layers, "method": method, "seconds": value}
            )
    return records


def measure_generation(rounds: int) -> list[Record]:
    """Generation; two identical base models show the noise."""
    seconds = alternate({method: generation(method) for method in GENERATORS}, rounds)
    return [{"method": method, "seconds": value} for method, value in seconds.items()]


def measure_waiting(rounds: int) -> list[Record]:
    """User-facing latency outside of training."""
    lrlora = str(Path(sys.executable).with_name("lrlora"))
    commands = {
        "import typer, rich": _run(sys.executable, "-c", "import typer, rich"),
        "lrlora --help": _run(lrlora, "--help"),
        "an unknown task": _run("sh", "-c", f"! {lrlora} train --task clasify --model m --data d"),
        "import lrlora": _run(sys.executable, "-c", "import lrlora"),
    }
    records: list[Record] = [{"what": what, "value": v} for what, v in alternate(commands, rounds).items()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _large_adapter(folder)
        start = time.perf_counter()
        _run(lrlora, "ranks", scratch)()
        records.append({"what": "ranks of 70B", "value": time.perf_counter() - start})
    with tempfile.TemporaryDirectory() as scratch:
        records.append({"what": "merge", "value": _merge_ratio(Path(scratch))})
    return records


MEASURES = {
    "steps": measure_steps,
    "growth": measure_growth,
    "generation": measure_generation,
    "waiting": measure_waiting,
}


def render(records: list[Record]) -> str:
    """The tables."""
    by_kind = {kind: [record for record in records if record["kind"] == kind] for kind in MEASURES}
    steps = {(r["name"], r["method"]): r for r in by_kind["steps"]}
    rows = []
    for method in METHODS:
        row = [method]
        for name in MODELS:
            ours, lora = steps[name, method], steps[name, "LoRA"]
            parts_there = (part for part in ("seconds", "peak_mib") if part in ours)
            row.append(" · ".join(f"{ours[part] / lora[part]:.2f}" for part in parts_there))
        rows.append(row)
    parts = ["### A training step: time · peak memory, as multiples of LoRA's\n", table(["", *MODELS], rows)]
    rows = []
    for axis in dict.fromkeys(r["name"] for r in by_kind["growth"]):
        values = dict.fromkeys(r["value"] for r in by_kind["growth"] if r["name"] == axis)
        for value in values:
            found = {r["method"]: r for r in by_kind["growth"] if (r["name"], r["value"]) == (axis, value)}
            cells = [f"{found[method]['seconds'] / found['LoRA']['seconds']:.2f}" for method in GROWING[1:]]
            # LR-LoRA saves only the input and its parameters, and has no column.
            kept = [
                f"{found[method]['kept'] / 2**10:,.0f}" if "kept" in found[method] else "" for method in GROWING[:2]
            ]
            rows.append([axis, f"{value:,}", *cells, *kept])
    heads = ["", "", *(f"{method}: time / LoRA" for method in GROWING[1:]), *(f"{m}: KiB kept" for m in GROWING[:2])]
    parts += ["\n### How it grows: forward and backward of one linear layer\n", table(heads, rows)]
    base = by_kind["generation"][0]["seconds"]
    rows = [[r["method"], f"{r['seconds'] / base:.2f}"] for r in by_kind["generation"]]
    parts += ["\n### 64 new tokens for each of 2 prompts of 64, Llama shapes\n", table(["", "time / base model"], rows)]
    waits = {r["what"]: r["value"] for r in by_kind["waiting"]}
    reference = waits["import typer, rich"]
    rows = [[what, f"{waits[what] / reference:.1f} × importing typer and rich"] for what in list(waits)[1:4]]
    rows.append(["`lrlora ranks` of a LoRA of rank 16 on all layers of 70B", f"{waits['ranks of 70B']:.0f} s"])
    rows.append(["`lrlora merge`, peak memory", f"{waits['merge']:.2f} × the model's size"])
    parts += ["\n### Outside of training\n", table(["", ""], rows)]
    return "\n".join(parts)


def updated(page: str) -> str:
    """Page with tables of the stored results."""
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return with_section(with_section(page, "speed", render(records)), "gpu", gpu.render(RESULTS.parent))


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each method")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="measure a part anew")
    parser.add_argument("--report", action="store_true", help="only render docs/speed.md from the stored results")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help="cuda: measure the layers of a 7B model on a GPU, and no more")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        print(gpu.run(arguments.device, RESULTS.parent))
        arguments.report = True
    if arguments.memory:
        print(_memory_of(*arguments.memory))
        return
    if not arguments.report:
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        for kind in arguments.only:
            found = [{"kind": kind, **record} for record in MEASURES[kind](arguments.rounds)]
            kept = [record for record in kept if record["kind"] in MEASURES and record["kind"] != kind] + found
            RESULTS.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            for record in found:
                print(json.dumps(record), flush=True)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
