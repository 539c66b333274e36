"""What LR-LoRA costs beside other methods: time of whole training steps and of single layers, and peak memory.

    python benchmarks/speed.py            # some 20 minutes on two cores; writes docs/speed/results.jsonl
    python benchmarks/speed.py --report   # docs/speed.md from the stored results
    python benchmarks/speed.py --forms    # only the published form, N = 50, and expansions, as ratios to LoRA's

Methods take turns in one process, so that a change of the machine's speed meets them all; ratios are of medians. Peak
memory is that of a process of its own. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import HiraConfig, LoHaConfig, LoraConfig, get_peft_model  # noqa: E402
from sections import table, with_section  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lrlora import LrLoraConfig, cached_weights  # noqa: E402
from lrlora.ops import delta_weight  # noqa: E402
from lrlora.transfer import Transfer, TransferSpec  # noqa: E402
from lrlora.tuner import LrLoraLayer  # noqa: E402

RESULTS = DOCS / "speed" / "results.jsonl"
PAGE = DOCS / "speed.md"
R = 8
TOKENS = 1024  # of a single layer

Record = dict[str, Any]
Step = Callable[[], None]


def _bert() -> tuple[nn.Module, tuple[int, int]]:
    config = transformers.BertConfig(num_hidden_layers=4, attn_implementation="sdpa")
    return transformers.BertForSequenceClassification(config), (8, 128)


def _llama() -> tuple[nn.Module, tuple[int, int]]:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=4096)), (2, 512)


MODELS = {"BERT-base shapes, 4 layers, 8 × 128": _bert, "Llama shapes, hidden 1024, 4 layers, 2 × 512": _llama}


def _targets(model: nn.Module) -> list[str]:
    """All linear layers of the blocks."""
    return sorted(
        {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in name}
    )


def adapt(model: nn.Module, method: str) -> nn.Module:
    """The model with a method's adapter on all linear layers of its blocks."""
    if method == "full fine-tuning":
        return model.train()
    model.requires_grad_(False)
    if method == "frozen base":
        return model.train()
    common = {"r": R, "target_modules": _targets(model)}
    configs: dict[str, Callable[[], Any]] = {
        "LoRA": lambda: LoraConfig(**common, lora_alpha=R),
        "DoRA": lambda: LoraConfig(**common, lora_alpha=R, use_dora=True),
        "HiRA": lambda: HiraConfig(**common),
        "LoHa": lambda: LoHaConfig(**common, alpha=R),
        "LR-LoRA": lambda: LrLoraConfig(**common, num_basis=50),
        "LR-LoRA, N = 8": lambda: LrLoraConfig(**common, num_basis=8),
        PAPER: lambda: LrLoraConfig.paper(**common),
        PAPER_FAR: lambda: LrLoraConfig.paper(**common),
        **{
            name: partial(LrLoraConfig, **common, form="expansion", num_terms=terms)
            for name, terms in EXPANSIONS.items()
        },
    }
    model = get_peft_model(model, configs[method]()).train()
    if method == PAPER_FAR:
        for module in model.modules():
            if isinstance(module, LrLoraLayer):
                _spread_entries(module.lrlora_A["default"].weight, module.lrlora_B["default"].weight)
    return model


@torch.no_grad()
def _spread_entries(A: Tensor, B: Tensor) -> None:
    """Random factors: most entries of BA are beyond I = 3, and the largest is 40."""
    A.normal_()
    B.normal_()
    B.mul_(40 / (B @ A).abs().max())


PAPER, PAPER_FAR = "published form, BA small", "published form, BA up to 40"
EXPANSIONS = {f"expansion, Q = {terms}": terms for terms in (4, 8, 16)}
LR_LORA = ("LR-LoRA", "LR-LoRA, N = 8")
METHODS = ("LoRA", "frozen base", *LR_LORA, "full fine-tuning", "DoRA", "HiRA", "LoHa")


def training_step(name: str, method: str, *, checkpointing: bool = False) -> Step:
    """One optimizer step of a method on a model."""
    torch.manual_seed(0)
    model, (batch, length) = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    vocabulary = model.config.vocab_size
    model = adapt(model, method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, vocabulary, (batch, length))
    embed = model.get_input_embeddings()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None
    is_causal = "Causal" in type(getattr(model, "base_model", model)).__name__ or "Llama" in name
    labels = tokens if is_causal else torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        # The gradient reaches the first block for all methods alike.
        embedded = embed(tokens).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=labels).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


FORMING = "LR-LoRA, cached_weights opened for each call"
_open_contexts = ExitStack()


def generation(method: str) -> Step:
    """64 new tokens for each of 2 prompts of 64, greedily, with the Llama shapes."""
    torch.manual_seed(0)
    model, _ = _llama()
    if "base model" not in method:
        model = adapt(model, "LR-LoRA")
    model = model.eval()
    prompt = torch.randint(0, 4096, (2, 64))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}

    def step() -> None:
        with torch.no_grad(), cached_weights(model) if method == FORMING else nullcontext():
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)

    if method == "LR-LoRA, cached_weights":
        _open_contexts.enter_context(cached_weights(model))
    return step


def layer_step(size: int, method: str) -> Step:
    """Forward and backward of one linear layer, size × size, on 1,024 tokens."""
    torch.manual_seed(0)
    layer = adapt(nn.Sequential(OrderedDict(layer=nn.Linear(size, size))), method)
    x = torch.randn(TOKENS, size, requires_grad=True)
    grad = torch.randn(TOKENS, size)

    def step() -> None:
        layer(x).backward(grad)

    return step


def own_work(size: int, method: str) -> Step:
    """Only what the adapter adds to the matmuls: ΔW forward, and its gradient backward."""
    torch.manual_seed(0)
    phi = Transfer(TransferSpec(num_basis=50))
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_(0, 0.1)
    A, B = torch.randn(R, size, requires_grad=True), (0.01 * torch.randn(size, R)).requires_grad_()
    G = torch.randn(size, size)

    def naive() -> Tensor:
        z = 300.0 * (B @ A)
        inside = z.clamp(-3, 3).unsqueeze(-1)
        amplitude, bandwidth = phi.spec.amplitudes(phi.amplitude).float(), phi.spec.bandwidths(phi.bandwidth).float()
        terms = torch.sinc((inside - phi.spec.centres(z)) * (bandwidth / torch.pi))
        return (z + (terms * amplitude).sum(-1)) / 300.0

    def step() -> None:
        delta = naive() if method == "naive formula" else delta_weight(A, B, phi, scaling=1.0, input_gain=300.0)
        (delta * G).sum().backward()

    return step


def matmul(size: int) -> Step:
    """The layer's own matmul."""
    x, weight = torch.randn(TOKENS, size), torch.randn(size, size)

    def step() -> None:
        nn.functional.linear(x, weight)

    return step


def elementwise(size: int) -> Step:
    """W + ΔW: BA, φ and the sum."""
    from lrlora.ops.linear import _Update, _write_weight
    from lrlora.ops.table import TransferTable

    torch.manual_seed(0)
    phi = Transfer(TransferSpec(num_basis=50))
    A, B, weight = torch.randn(R, size), 0.01 * torch.randn(size, R), torch.randn(size, size)
    out = torch.empty_like(weight)

    def step() -> None:
        with torch.no_grad():
            tabulated = TransferTable(phi.spec, phi.amplitude, phi.bandwidth, torch.float32)
            _write_weight(out, weight, A, B, tabulated, _Update(phi.spec, 1.0, 300.0))

    return step


def alternate(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns; the first turn of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def peak_memory(*arguments: str) -> float:
    """MiB that two steps add to what the process had before, in a process of their own."""
    command = [sys.executable, __file__, "--memory", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _memory_of(kind: str, name: str, method: str) -> float:
    makers: dict[str, Callable[[], Step]] = {
        "model": lambda: training_step(name, method),
        "checkpointing": lambda: training_step(name, method, checkpointing=True),
        "own work": lambda: own_work(int(name), method),
    }
    before = _peak_kib()
    step = makers[kind]()
    step()
    step()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """Peak resident memory of this program; `getrusage` would count what the parent process had, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise RuntimeError("Peak memory is read from /proc/self/status, which this system does not have: use Linux.")


def measure(rounds: int) -> list[Record]:
    """Everything, one record per method and setting."""
    records: list[Record] = []

    def add(kind: str, name: str, seconds: dict[str, float], with_memory: bool) -> None:
        for method, value in seconds.items():
            record: Record = {"kind": kind, "name": name, "method": method, "seconds": value}
            if with_memory:
                record["peak_mib"] = peak_memory(kind, name, method)
            records.append(record)
            print(json.dumps(record), flush=True)

    for name in MODELS:
        add("model", name, alternate({method: training_step(name, method) for method in METHODS}, rounds), True)
        some = ("LoRA", *LR_LORA, "full fine-tuning")
        steps = {method: training_step(name, method, checkpointing=True) for method in some}
        add("checkpointing", name, alternate(steps, rounds), True)
    for size in (1024, 2048, 4096, 8192):
        some = ("LoRA", "frozen base", *LR_LORA, "full fine-tuning")
        count = rounds if size < 4096 else max(3, rounds // 3)
        add("layer", str(size), alternate({method: layer_step(size, method) for method in some}, count), False)
        add("elementwise", str(size), alternate({"matmul": matmul(size), "W + ΔW": elementwise(size)}, count), False)
    # The base model again shows what two equal models differ by: decoding waits for memory, which varies.
    some = ("base model", "base model, a second one", "LR-LoRA, cached_weights", FORMING, "LR-LoRA")
    add("generate", "Llama shapes", alternate({method: generation(method) for method in some}, rounds), False)
    _open_contexts.close()
    some = ("naive formula", "LR-LoRA")
    add("own work", "768", alternate({method: own_work(768, method) for method in some}, 3), True)
    return records


KINDS = {
    "model": "Whole training steps",
    "checkpointing": "The same with gradient checkpointing",
    "layer": "One linear layer, size × size, forward and backward of 1,024 tokens",
    "elementwise": "Forming W + ΔW beside the layer's own matmul of 1,024 tokens",
    "generate": "64 new tokens for each of 2 prompts of 64",
    "own work": "ΔW and its gradient alone, beside the formula written naively",
}
REFERENCES = {"generate": "base model", "elementwise": "matmul", "own work": "LR-LoRA"}


def render(records: list[Record]) -> str:
    """The tables."""
    parts = []
    for kind, title in KINDS.items():
        chosen = [record for record in records if record["kind"] == kind]
        reference = REFERENCES.get(kind, "LoRA")
        rows = []
        for record in chosen:
            (base,) = (r for r in chosen if (r["name"], r["method"]) == (record["name"], reference))
            row = [record["name"], record["method"], f"{record['seconds'] / base['seconds']:.2f}"]
            if "peak_mib" in record:
                row += [f"{record['peak_mib'] / base['peak_mib']:.2f}", f"{record['peak_mib']:.0f}"]
            rows.append(row)
        header = ["", "method", f"time / {reference}"]
        header += [f"peak memory / {reference}", "MiB"] if any("peak_mib" in record for record in chosen) else []
        parts.append(f"### {title}\n\n{table(header, rows)}")
    return "\n".join(parts)


def updated(page: str) -> str:
    """The page with the tables of the stored results."""
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return with_section(page, "speed", render(records))


def _print_ratios(name: str, steps: dict[str, Step], rounds: int) -> None:
    seconds = alternate(steps, rounds)
    print(name, {method: round(value / seconds["LoRA"], 2) for method, value in seconds.items()})


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each method")
    parser.add_argument("--report", action="store_true", help="only render docs/speed.md from the stored results")
    parser.add_argument("--forms", action="store_true", help="only some forms beside LoRA; stores nothing")
    parser.add_argument("--memory", nargs=3, metavar=("KIND", "NAME", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(_memory_of(*arguments.memory))
        return
    if arguments.forms:
        methods = ("LoRA", PAPER, PAPER_FAR, *EXPANSIONS)
        for name in MODELS:
            _print_ratios(name, {method: training_step(name, method) for method in methods}, arguments.rounds)
            peaks = {method: peak_memory("model", name, method) for method in methods}
            print("peak memory", {method: round(peak / peaks["LoRA"], 2) for method, peak in peaks.items()})
        for size in (2048, 4096):
            steps = {method: layer_step(size, method) for method in ("LoRA", *EXPANSIONS)}
            _print_ratios(f"one layer, {size} × {size}, r = {R}", steps, arguments.rounds)
        return
    if not arguments.report:
        print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
        records = measure(arguments.rounds)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
