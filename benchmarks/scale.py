"""LR-LoRA and LoRA on models too large to run here: trained parameters, and memory of a step.

    python benchmarks/scale.py            # 3 minutes on one core; writes docs/scale/results.json
    python benchmarks/scale.py --report   # docs/scale.md from the stored results

Both are counted by running the real modules at full size on tensors without memory, and validated on small models.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from sections import table, with_section  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from lrlora import LrLoraConfig  # noqa: E402
from lrlora.ops import linear as ops  # noqa: E402
from lrlora.tuner import LrLoraLayer  # noqa: E402
from lrlora.tuner.parameter import ParamWrapper  # noqa: E402

RESULTS, PAGE = DOCS / "scale" / "results.json", DOCS / "scale.md"
R, N = 8, 8
METHODS = ("LoRA", "LR-LoRA")
CONFIGS = {"LoRA": LoraConfig, "LR-LoRA": LrLoraConfig}
BF16, FLOAT32 = 2, 4  # bytes
Record = dict[str, Any]


def llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> Any:
    """Llama of these sizes."""
    sizes: Record = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    attention: Record = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return transformers.LlamaConfig(vocab_size=vocabulary, **sizes, **attention)


def mixture(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, experts: int) -> Any:
    """Qwen3 mixture of these sizes: 8 experts per token, heads of 128."""
    sizes: Record = {"hidden_size": width, "moe_intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128}
    attention: Record = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    some: Record = {"num_experts": experts, "num_experts_per_tok": 8}
    return transformers.Qwen3MoeConfig(vocab_size=vocabulary, **sizes, **attention, **some)


MODELS: dict[str, Callable[[], Any]] = {
    "7B": lambda: llama(32000, 4096, 11008, 32, 32, 32),  # Llama 2
    "70B": lambda: llama(128256, 8192, 28672, 80, 64, 8),  # Llama 3
    "235B": lambda: mixture(151936, 4096, 1536, 94, 64, 4, 128),  # Qwen3, 22B of them active
}
LENGTH = 4096  # tokens of a step
CAPACITY = 80e9


# -- Matrices of a model -----------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """Weights (m, n), single or stacked experts, of which each token uses `active`."""

    m: int
    n: int
    experts: int = 1
    active: int = 1
    is_adapted: bool = True

    @property
    def entries(self) -> int:
        return self.m * self.n * self.experts


def adapted(config: Any, method: str, dtype: torch.dtype, *, checkpoints: bool = False, **fields: Any) -> Any:
    """Model with an adapter on all linear layers of its blocks and all experts, on the current device."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if hasattr(config, "num_experts_per_tok"):
        fields["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    else:
        targets += ["gate_proj", "up_proj", "down_proj"]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = get_peft_model(model, CONFIGS[method](r=R, target_modules=targets, **fields)).train()
    if checkpoints:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def matrices(config: Any) -> Counter[Matrix]:
    """All weight matrices of a model with counts, from its modules on the meta device."""
    with torch.device("meta"):
        model = adapted(config, "LR-LoRA", torch.bfloat16)
    found: Counter[Matrix] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            experts, m, n = module.get_param().shape
            found[Matrix(m, n, experts, config.num_experts_per_tok)] += 1
        elif isinstance(module, LrLoraLayer):
            found[Matrix(module.out_features, module.in_features)] += 1
        elif name.endswith(("lm_head", "mlp.gate")):  # not adapted: head and routers
            m, n = module.weight.shape
            found[Matrix(m, n, is_adapted=False)] += 1
    return found


def parameters(matrix: Matrix, method: str) -> int:
    """Trained parameters."""
    return matrix.is_adapted * (R * (matrix.m + matrix.n) * matrix.experts + 2 * N * (method == "LR-LoRA"))


def passes(matrix: Matrix, method: str, half: bool) -> tuple[float, float]:
    """Number of matmuls of 2·T·m·n operations in forward and backward."""
    if not matrix.is_adapted or (method != "LR-LoRA" and matrix.experts == 1):
        return 1, 1
    return (2, 2) if half and matrix.experts == 1 else (1, 2)


def flops(matrix: Matrix, method: str, tokens: int, half: bool) -> float:
    """Matmul operations of a forward and backward, excluding the table of φ."""
    m, n, E = matrix.m, matrix.n, matrix.experts
    large = 2 * tokens * m * n * matrix.active * sum(passes(matrix, method, half))
    if not matrix.is_adapted:
        return large
    if method == "LoRA":  # for experts, PEFT forms BA twice: PyTorch calls a parametrization once to validate it
        return large + (6 * R * tokens * (m + n) if E == 1 else 8 * R * matrix.entries)
    # BA, again for its two gradients, and in a linear layer once more for the gradient of the input.
    return large + 2 * R * matrix.entries * (5 if E == 1 else 4)


def attention_flops(config: Any, tokens: int, length: int) -> float:
    """Scores and their products with the values, forward and backward, including masked ones."""
    return 12 * tokens * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers


# -- Counting allocations, transfers and calls of a step ---------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the live bytes and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in inputs:
            self._known.setdefault(t.untyped_storage()._cdata, None)
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for storage in (t.untyped_storage() for t in outputs):
            if (key := storage._cdata) not in self._known:
                self.alive += storage.nbytes()
                self._known[key] = weakref.finalize(storage, self._free, key, storage.nbytes())
        name = str(func)
        # The operator's internal buffer, which a run without memory does not show.
        buffer = 0
        if "lrlora.adapted_linear" in name:
            x, _, *rest = args[2:] if "backward" in name else args
            A, B = [t for t in rest if isinstance(t, Tensor) and t.dim() == 2][:2]
            buffer = A.shape[1] * B.shape[0] * x.element_size()
        self.peak = max(self.peak, self.alive + buffer)
        return out

    def _free(self, key: int, size: int) -> None:
        self.alive -= size
        self._known.pop(key, None)


def without_memory(model: nn.Module) -> nn.Module:
    """Convert to fake tensors, which run operators by shape: LR-LoRA does not run on the meta device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype)
    return model


def run(model: Any, shape: tuple[int, int], x: Tensor | None = None) -> None:
    """Forward and backward of embedded tokens; in half precision under autocast, like the Trainer."""
    half = model.dtype == torch.bfloat16
    x = torch.randn(*shape, model.config.hidden_size, dtype=model.dtype, requires_grad=True) if x is None else x
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(inputs_embeds=x, labels=torch.zeros(shape, dtype=torch.long), use_cache=False).loss
    loss.backward()


def count(config: Any, method: str, tokens: int, layers: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Peak bytes of a forward and backward with checkpointing, excluding weights, their gradients and the input."""
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model = adapted(config, method, dtype, checkpoints=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_memory(model)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        shape = (-(-tokens // LENGTH), min(tokens, LENGTH))
        x = torch.empty(*shape, config.hidden_size, dtype=dtype, requires_grad=True)
        x.grad = torch.empty_like(x)
        with Traffic() as traffic:
            run(model, shape, x)
    return traffic.peak


def survey(make: Callable[[], Any]) -> Record:
    """All data on a model for the tables."""
    record: Record = {name: {} for name in ("trainable", "tensors", "working")}
    config = make()
    for method in METHODS:
        with torch.device("meta"):
            model = adapted(config, method, torch.bfloat16)
        trained = [p for p in model.parameters() if p.requires_grad]
        record["trainable"][method], record["tensors"][method] = sum(p.numel() for p in trained), len(trained)
        record["working"][method] = count(make(), method, LENGTH, 1)
    layers = model.base_model.model.model.layers
    base = [p for p in model.parameters() if not p.requires_grad]
    root = {id(p) for p in base} - {id(p) for p in layers.parameters()}
    return record | {
        "base": sum(p.numel() for p in base),
        "root_bytes": sum(p.nbytes for p in base if id(p) in root),
        "layer_bytes": sum(p.nbytes for p in layers[0].parameters()),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "matrices": [[*matrix, number] for matrix, number in matrices(config).items()],
    }


def memory(model: Record, method: str, shards: int, *, buckets: bool = False) -> list[float]:
    """Peak bytes on a GPU during a step."""
    return [
        BF16 * model["base"] / shards,
        # Two layers, one in use and one being gathered, and everything outside of layers.
        2 * model["layer_bytes"] + model["root_bytes"] if shards > 1 else 0,
        # Parameters, gradients and two moments; DDP also stores the gradients in buckets.
        (5 if buckets else 4) * FLOAT32 * model["trainable"][method] / shards,
        BF16 * LENGTH * model["width"] * model["layers"],
        model["working"][method],
    ]


# -- Validation on models that run here --------------------------------------------------------------------------------


def count_flops(model: Any, tokens: int) -> int:
    """Operations of a real forward and backward, including inside LR-LoRA's operators."""

    def inside(op: Any) -> Callable[..., int]:
        def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
                op._init_fn(*args, **kwargs)
            return counter.get_total_flops()

        counted._get_raw = True  # type: ignore[attr-defined]  # the counter's mark: give tensors, not shapes
        return counted

    # Arguments are shapes; the counter does not know in-place operators.
    in_place: dict[Any, Any] = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}
    own = (ops._adapted_linear, ops._adapted_linear_backward, ops._delta_weight, ops._delta_weight_backward)
    mapping = in_place | {getattr(torch.ops.lrlora, op._qualname.split("::")[1]): inside(op) for op in own}
    # Plain PyTorch, whose matmuls are visible.
    with (
        mock.patch.dict(os.environ, LRLORA_KERNELS="0"),
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
    ):
        run(model, (1, tokens))
    return counter.get_total_flops()


def check_counts(tokens: int = 24) -> list[Record]:
    """Trainable parameters and operations of tiny models, by formula and counted; φ without its table."""
    records = []
    for name, config in (("Llama", llama(128, 64, 160, 2, 4, 2)), ("mixture", mixture(128, 64, 32, 2, 4, 2, 8))):
        config._attn_implementation = config._experts_implementation = "eager"
        found = matrices(config).items()
        for method in METHODS:
            model = adapted(config, method, torch.float32)
            predicted = sum(number * parameters(matrix, method) for matrix, number in found)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            records.append({"what": f"parameters: {name}, {method}", "predicted": predicted, "found": trained})
            form: Record = {"form": "sine"} if method == "LR-LoRA" else {}
            for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                operations = attention_flops(config, tokens, tokens)
                operations += sum(
                    number * flops(matrix, method, tokens, kind == "bfloat16") for matrix, number in found
                )
                counted = count_flops(adapted(config, method, dtype, **form), tokens)
                what = f"operations: {name}, {method}, {kind}"
                records.append({"what": what, "predicted": operations, "found": counted})
    return records


MEMORY_CASES = {  # vocabulary, width, inner width, layers, heads, heads of keys; dtype; sequences × tokens
    "float32, 6 layers of 512, 2 × 512 tokens": ((4096, 512, 1376, 6, 8, 8), torch.float32, (2, 512)),
    "bfloat16, the same": ((4096, 512, 1376, 6, 8, 8), torch.bfloat16, (2, 512)),
    "float32, 2 layers of 1024, 1 × 128 tokens": ((1024, 1024, 4096, 2, 8, 8), torch.float32, (1, 128)),
}


def check_memory() -> list[Record]:
    """Counted and measured peaks of two steps of small models, including weights and AdamW, in MB."""
    records = []
    for name, (sizes, dtype, shape) in MEMORY_CASES.items():
        for method in METHODS:
            tokens = shape[0] * shape[1]
            with torch.device("meta"):
                model = adapted(llama(*sizes), method, dtype)
            counted = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
            counted += tokens * sizes[1] * sizes[3] * torch.empty(0, dtype=dtype).element_size()
            counted += count(llama(*sizes), method, tokens, 1, dtype)
            # Freed memory must be returned immediately, or the peak is the allocator's.
            options = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--memory", name, method]
            said = subprocess.run(command, env=os.environ | options, check=True, stdout=subprocess.PIPE).stdout
            found = int(said.split()[-1]) / 1e6
            records.append({"what": f"MB: {name}, {method}", "predicted": counted / 1e6, "found": found})
    return records


def measured_peak(name: str, method: str) -> int:
    """Bytes that a model and two steps add to this process."""
    sizes, dtype, shape = MEMORY_CASES[name]

    def two_steps(config: Any, shape: tuple[int, int]) -> None:
        model = adapted(config, method, dtype, checkpoints=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        for _ in range(2):
            run(model, shape)
            optimizer.step()
            optimizer.zero_grad()

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    two_steps(llama(64, 64, 64, 1, 2, 2), (1, 16))  # load libraries and kernels first
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    two_steps(llama(*sizes), shape)
    return resident("VmHWM") - before


# -- The page ----------------------------------------------------------------------------------------------------------


def measure() -> Record:
    """All results."""
    torch.set_num_threads(1)
    models = {name: survey(make) for name, make in MODELS.items()}
    return {"models": models, "checks": [*check_counts(), *check_memory()]}


def render(results: Record) -> dict[str, str]:
    """Tables by name."""
    rows: dict[str, list[list[str]]] = {name: [] for name in HEADERS}
    for name in MODELS:
        for kind, some in rows_of(name, results["models"][name]).items():
            rows[kind] += some
    return {name: table(header, rows[name]) for name, header in HEADERS.items()}


def rows_of(name: str, model: Record) -> dict[str, list[list[str]]]:
    """Table rows of a model."""
    linear = [Matrix(*sizes) for *sizes, _ in model["matrices"] if Matrix(*sizes).is_adapted]
    largest = max(linear, key=lambda matrix: matrix.entries)
    shape = f"{largest.m} × {largest.n}" + (f" × {largest.experts}" if largest.experts > 1 else "")
    trained = [f"{model['trainable'][m]:,} in {model['tensors'][m]:,}" for m in METHODS]
    counts = [name, f"{model['base'] / 1e9:.1f}", *trained, shape, f"{FLOAT32 * largest.entries / 1e9:.2f}"]
    peaks = []
    for way, shards in {"1": 1, "8 or 64, DDP": 1, "8, FSDP2": 8, "64, FSDP2": 64}.items():
        lora, ours = (memory(model, method, shards, buckets="DDP" in way) for method in METHODS)
        totals = [f"{sum(lora) / 1e9:.1f}", f"{sum(ours) / 1e9:.1f}", "yes" if sum(ours) < CAPACITY else "no"]
        peaks.append([name, way, *(f"{part / 1e9:.1f}" for part in ours), *totals])
    return {"counts": [counts], "memory": peaks}


HEADERS = {
    "counts": ["", "base, 10⁹", *(f"{m} trains, in tensors" for m in METHODS), "largest ΔW", "in float32, GB"],
    "memory": ["", "GPUs", "weights", "gathered", "adapter", "checkpoints", "working", "LoRA", "LR-LoRA", "fits"],
}


def updated(page: str) -> str:
    """Page with tables of the stored results."""
    for name, content in render(json.loads(RESULTS.read_text(encoding="utf-8"))).items():
        page = with_section(page, name, content)
    return page


def main() -> None:
    """Count, measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only render docs/scale.md from the stored results")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(measured_peak(*arguments.memory))
        return
    if not arguments.report:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
