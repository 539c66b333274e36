"""LR-LoRA beside LoRA on models and machines that are not here: memory and time of a step, counted and modelled.

    python benchmarks/scale.py            # some 7 minutes on one core; writes docs/scale/results.json
    python benchmarks/scale.py --report   # docs/scale.md from the stored results

Memory is counted by running the real modules on tensors without memory, at full size. Time is a model of operations and
bytes with the numbers of data sheets. Both are checked against small models that run here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
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
from lrlora.rank.measures import spectrum  # noqa: E402
from lrlora.rank.walk import _measure  # noqa: E402
from lrlora.transfer import Transfer, TransferSpec  # noqa: E402
from lrlora.tuner import Linear, LrLoraLayer  # noqa: E402
from lrlora.tuner.parameter import ParamWrapper  # noqa: E402

RESULTS, PAGE = DOCS / "scale" / "results.json", DOCS / "scale.md"
R, N = 8, 8
METHODS = ("LoRA", "LR-LoRA")
CONFIGS = {"LoRA": LoraConfig, "LR-LoRA": LrLoraConfig}
BF16, FLOAT32 = 2, 4  # bytes
Record = dict[str, Any]
Step = Callable[[], Any]


def llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> Any:
    """A Llama of these sizes."""
    sizes: Record = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    attention: Record = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return transformers.LlamaConfig(vocab_size=vocabulary, **sizes, **attention)


def mixture(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, experts: int) -> Any:
    """A Qwen3 mixture of these sizes: 8 experts for each token, heads of 128."""
    sizes: Record = {"hidden_size": width, "moe_intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128}
    attention: Record = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    some: Record = {"num_experts": experts, "num_experts_per_tok": 8}
    return transformers.Qwen3MoeConfig(vocab_size=vocabulary, **sizes, **attention, **some)


MODELS: dict[str, Callable[[], Any]] = {
    "7B": lambda: llama(32000, 4096, 11008, 32, 32, 32),  # Llama 2
    "70B": lambda: llama(128256, 8192, 28672, 80, 64, 8),  # Llama 3
    "235B": lambda: mixture(151936, 4096, 1536, 94, 64, 4, 128),  # Qwen3, 22B of them active
}
# Spread over 8 GPUs, each has an eighth of the experts, and as many tokens for them as it would have for all.
SPREAD = {"235B, spread": lambda: mixture(151936, 4096, 1536, 94, 64, 4, 16)}
TOKENS = (512, 4096, 32768)  # of one GPU, in sequences of up to `LENGTH`
LENGTH = 4096
CAPACITY = 80e9


class Gpu(NamedTuple):
    """What data sheets state, a second: operations, bytes, and bytes that reach a GPU from its node or from all."""

    matmul: float  # bfloat16, dense
    vector: float  # float32, a fused multiply-add counted as two
    memory: float
    link: float
    network: float  # eight adapters of a node together, as a ring through all nodes uses them


GPUS = {"A100": Gpu(312e12, 19.5e12, 2.0e12, 300e9, 200e9), "H100": Gpu(989e12, 67e12, 3.35e12, 450e9, 400e9)}
EFFICIENCY = 0.6  # of all of these: an assumption
HOST = 8e-6  # seconds of Python and PyTorch for an operator: an assumption, half of what it takes here


# -- What a model multiplies with --------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """Weights (m, n), one or a stack of experts, of which each token visits `active`."""

    m: int
    n: int
    experts: int = 1
    active: int = 1
    is_adapted: bool = True

    @property
    def entries(self) -> int:
        return self.m * self.n * self.experts


def adapted(config: Any, method: str, dtype: torch.dtype, *, checkpoints: bool = False, **fields: Any) -> Any:
    """A model with an adapter on all linear layers of its blocks and all experts, on the device of the context."""
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
    """All that a model multiplies with, and how often, read off its modules on the meta device."""
    with torch.device("meta"):
        model = adapted(config, "LR-LoRA", torch.bfloat16)
    found: Counter[Matrix] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            experts, m, n = module.get_param().shape
            found[Matrix(m, n, experts, config.num_experts_per_tok)] += 1
        elif isinstance(module, LrLoraLayer):
            found[Matrix(module.out_features, module.in_features)] += 1
        elif name.endswith(("lm_head", "mlp.gate")):  # not adapted: the head, and the routers
            m, n = module.weight.shape
            found[Matrix(m, n, is_adapted=False)] += 1
    return found


def parameters(matrix: Matrix, method: str) -> int:
    """What an adapter trains."""
    return matrix.is_adapted * (R * (matrix.m + matrix.n) * matrix.experts + 2 * N * (method == "LR-LoRA"))


def passes(matrix: Matrix, method: str, half: bool) -> tuple[float, float]:
    """How many matmuls of 2·T·m·n operations forward and backward take."""
    if not matrix.is_adapted or (method != "LR-LoRA" and matrix.experts == 1):
        return 1, 1
    return (2, 3) if half and matrix.experts == 1 else (1, 2)


def flops(matrix: Matrix, method: str, tokens: int, half: bool) -> float:
    """Operations of all matmuls of a forward and backward; without those that make the table of φ."""
    m, n, E = matrix.m, matrix.n, matrix.experts
    large = 2 * tokens * m * n * matrix.active * sum(passes(matrix, method, half))
    if not matrix.is_adapted:
        return large
    if method == "LoRA":  # of experts, PEFT forms BA twice: PyTorch tries a parametrisation before it uses it
        return large + (6 * R * tokens * (m + n) if E == 1 else 8 * R * matrix.entries)
    # BA, again for its two gradients, and in a linear layer once more for the gradient of the input.
    return large + 2 * R * matrix.entries * (5 if E == 1 else 4)


def attention_flops(config: Any, tokens: int, length: int) -> float:
    """Scores and their products with the values, forward and backward, those of the future included."""
    return 12 * tokens * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers


# -- Counting: what a step allocates, moves and calls ------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes alive, the most at a time, the bytes that elementwise operators move, and all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.moved = self.calls = 0
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
        if outputs and not func.is_view and not any(word in name for word in ("empty", "view", "detach", "alias")):
            self.calls += 1
            # A product with a thin matrix, such as A, waits for memory. Large ones are modelled, not counted.
            is_large = all(size > 2 * R for t in inputs for size in t.shape[-2:])
            if not ("lrlora" in name or "attention" in name or ("mm." in name and is_large)):
                self.moved += sum(t.nbytes for t in (*inputs, *outputs))
        # The one buffer that the operator has for itself, which running it without memory does not show.
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
    """The model with fake tensors, which run operators by their shapes: LR-LoRA refuses to run on the meta device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype)
    return model


def run(model: Any, shape: tuple[int, int], x: Tensor | None = None) -> None:
    """Forward and backward of embedded tokens; in half precision as the Trainer runs it, under autocast."""
    half = model.dtype == torch.bfloat16
    x = torch.randn(*shape, model.config.hidden_size, dtype=model.dtype, requires_grad=True) if x is None else x
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(inputs_embeds=x, labels=torch.zeros(shape, dtype=torch.long), use_cache=False).loss
    loss.backward()


def count(config: Any, method: str, tokens: int, layers: int, dtype: torch.dtype = torch.bfloat16) -> Record:
    """A forward and backward with gradient checkpointing, without the weights, their gradients and the input."""
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
    return {"peak": traffic.peak, "moved": traffic.moved, "calls": traffic.calls}


def _kernels(choice: str) -> Any:
    return mock.patch.dict(os.environ, LRLORA_KERNELS=choice)


def calls_inside() -> Record:
    """Operators and kernels that LR-LoRA's own call on a GPU, forward and backward: in a layer, and for an expert."""
    from lrlora.ops import gpu

    launch = dict.fromkeys(("_weight_kernel", "_gradient_kernel"), mock.MagicMock())  # they need a GPU
    phi, x = Transfer(TransferSpec(num_basis=N)), torch.randn(4, 64, dtype=torch.bfloat16)
    needs = [True, False, False, True, True, True, True]
    settings = (phi.amplitude, phi.bandwidth, "residual", N, 3.0, 10.0, 1.0, 300.0)

    def counted(op: Any, *args: Any) -> int:
        for _ in range(2):  # the first makes constants, once
            with mock.patch.multiple(gpu, **launch), _kernels("triton"), torch.no_grad(), Traffic() as traffic:
                op._init_fn(*args, *settings)
        return traffic.calls

    A, B = torch.randn(R, 64), torch.randn(64, R)
    layer = [
        counted(ops._adapted_linear, x, None, None, A, B) + 1,  # the kernel itself, two in the backward
        counted(ops._adapted_linear_backward, x, needs, x, None, A, B) + 2,
    ]
    stacks = [(torch.randn(E, 64, 64), A.repeat(E, 1, 1), B.repeat(E, 1, 1)) for E in (1, 9)]
    formed = [counted(ops._delta_weight, A, B) for _, A, B in stacks]
    walked = [counted(ops._delta_weight_backward, G, [True] * 4, A, B) for G, A, B in stacks]
    return {"layer": layer, "expert": [(many - one) / 8 + 1 for one, many in (formed, walked)]}


def survey(make: Callable[[], Any]) -> Record:
    """All that the tables need to know of a model."""
    record: Record = {name: {} for name in ("trainable", "tensors", "counts")}
    config = make()
    for method in METHODS:
        with torch.device("meta"):
            model = adapted(config, method, torch.bfloat16)
        trained = [p for p in model.parameters() if p.requires_grad]
        record["trainable"][method], record["tensors"][method] = sum(p.numel() for p in trained), len(trained)
        record["counts"][method] = {str(T): [count(make(), method, T, layers) for layers in (1, 2)] for T in TOKENS}
    layers = model.base_model.model.model.layers
    base = [p for p in model.parameters() if not p.requires_grad]
    root = {id(p) for p in base} - {id(p) for p in layers.parameters()}
    return record | {
        "base": sum(p.numel() for p in base),
        "root_bytes": sum(p.nbytes for p in base if id(p) in root),
        "layer_bytes": sum(p.nbytes for p in layers[0].parameters()),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "attention": {str(T): attention_flops(config, T, min(T, LENGTH)) for T in TOKENS},
        "matrices": [[*matrix, number] for matrix, number in matrices(config).items()],
    }


# -- The model of memory and time --------------------------------------------------------------------------------------


class Design(NamedTuple):
    """How LR-LoRA works on a GPU: as it does now, unless said."""

    moments: float = 59  # of φ's gradient, at N = 8; half of them if every other tile is asked
    # Rate of the product G in our kernel beside the library's. An assumption: tiles of 64 × 64 read a byte for every 32
    # operations, and an L2 cache of 5.5 TB/s then keeps an H100 to 0.18 of its data sheet.
    product: float = 0.3
    matmuls: tuple[float, float] = (2, 3)  # forward and backward, of a linear layer
    is_stacked: bool = False  # experts: one launch for a stack, which writes W + ΔW in bfloat16 at once


NOW = Design()


def seconds(matrix: Matrix, method: str, tokens: int, gpu: Gpu, design: Design) -> float:
    """What a GPU works for one matrix and step: forward, forward again for the checkpoint, backward."""
    matmul, instructions, memory = (EFFICIENCY * rate for rate in (gpu.matmul, gpu.vector / 2, gpu.memory))
    one = 2 * tokens * matrix.m * matrix.n * matrix.active / matmul
    one = max(one, BF16 * matrix.entries / memory)
    forward, backward = passes(matrix, method, half=True)
    if not matrix.is_adapted or method == "LoRA":
        return one * ((1 + matrix.is_adapted) * forward + backward)
    # Instructions for an entry, as in ops/gpu.py: BA, its cell, the cubic; then the slope of φ, a product and a sum for
    # each factor of A and B, three instructions for each moment.
    form, walk = R + 19, 5 * R + 22 + 3 * design.moments
    if matrix.experts == 1:
        forward, backward = design.matmuls
        forms, written, read, slower = 3, BF16, 0, 1 / design.product - 1
    else:
        forms, written, read, slower = 2, 2 * BF16 if design.is_stacked else FLOAT32, FLOAT32, 0
    of_entry = forms * max(form / instructions, written / memory) + max(walk / instructions, read / memory)
    return one * (2 * forward + backward + slower) + matrix.entries * of_entry


def step(model: Record, method: str, tokens: int, gpu: Gpu, gpus: int, design: Design = NOW) -> dict[str, float]:
    """Seconds of a step in which the GPU works, Python calls it, and FSDP2 gathers weights: the longest counts."""

    def total(what: str, method: str) -> float:
        first, second = (counted[what] for counted in model["counts"][method][str(tokens)])
        return first + (model["layers"] - 1) * (second - first)

    moved, calls = total("moved", "LoRA" if design.is_stacked else method), total("calls", method)
    # Half of the scores are of the future, and left out; with the checkpoint 4 parts of 3.
    work = moved / (EFFICIENCY * gpu.memory) + model["attention"][str(tokens)] * 2 / 3 / (EFFICIENCY * gpu.matmul)
    for *sizes, number in model["matrices"]:
        matrix = Matrix(*sizes)
        work += number * seconds(matrix, method, tokens, gpu, design)
        if method == "LR-LoRA" and matrix.is_adapted:
            forward, backward = model["inside"]["layer" if matrix.experts == 1 else "expert"]
            calls += number * (2 * forward + backward) * (1 if design.is_stacked else matrix.experts)
    links = 2 * BF16 * model["base"] / (EFFICIENCY * (gpu.link if gpus <= 8 else gpu.network))
    return {"GPU": work, "host": HOST * calls, "links": links if gpus > 1 else 0.0}


def memory(model: Record, method: str, shards: int, tokens: int = LENGTH, *, buckets: bool = False) -> list[float]:
    """Bytes on a GPU at the peak of a step."""
    return [
        BF16 * model["base"] / shards,
        # Two layers, one in use and one on its way, and what belongs to no layer.
        2 * model["layer_bytes"] + model["root_bytes"] if shards > 1 else 0,
        # Parameters, gradients and two moments; DDP has the gradients in its buckets, too.
        (5 if buckets else 4) * FLOAT32 * model["trainable"][method] / shards,
        BF16 * tokens * model["width"] * model["layers"],
        model["counts"][method][str(tokens)][0]["peak"],
    ]


# -- Checks against what runs here -------------------------------------------------------------------------------------


def count_flops(model: Any, tokens: int) -> int:
    """Operations of a real forward and backward, also those inside LR-LoRA's operators."""

    def inside(op: Any) -> Callable[..., int]:
        def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
                op._init_fn(*args, **kwargs)
            return counter.get_total_flops()

        counted._get_raw = True  # type: ignore[attr-defined]  # the counter's mark: give tensors, not shapes
        return counted

    # Shapes are given; the counter knows no operator in place.
    in_place: dict[Any, Any] = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}
    own = (ops._adapted_linear, ops._adapted_linear_backward, ops._delta_weight, ops._delta_weight_backward)
    mapping = in_place | {getattr(torch.ops.lrlora, op._qualname.split("::")[1]): inside(op) for op in own}
    # Plain PyTorch, whose matmuls can be seen.
    with _kernels("0"), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run(model, (1, tokens))
    return counter.get_total_flops()


def check_counts(tokens: int = 24) -> list[Record]:
    """Trainable parameters and operations of tiny models, by formula and counted; φ without a table, which is extra."""
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
    """Counted and measured peaks of two steps of small models, weights and AdamW included, in MB."""
    records = []
    for name, (sizes, dtype, shape) in MEMORY_CASES.items():
        for method in METHODS:
            tokens = shape[0] * shape[1]
            with torch.device("meta"):
                model = adapted(llama(*sizes), method, dtype)
            counted = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
            counted += tokens * sizes[1] * sizes[3] * torch.empty(0, dtype=dtype).element_size()
            counted += count(llama(*sizes), method, tokens, 1, dtype)["peak"]
            # Memory that is freed must go back at once, or the peak is that of the allocator.
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

    two_steps(llama(64, 64, 64, 1, 2, 2), (1, 16))  # libraries and kernels are loaded now
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    two_steps(llama(*sizes), shape)
    return resident("VmHWM") - before


def alternate(steps: dict[Any, Step], rounds: int) -> dict[Any, float]:
    """Median seconds of the processor for each, taking turns; the first turn is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, work in steps.items():
            start = time.process_time()
            work()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: median(values) for name, values in times.items()}


def fit(work: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """The constants with which work · constants errs least, relative to the times."""
    rows, ones = torch.tensor(work, dtype=torch.float64) / torch.tensor(times)[:, None], torch.ones(len(times), 1)
    return torch.linalg.lstsq(rows, ones.double()).solution[:, 0].tolist()


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """The sum of products."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def layer_work(matrix: Matrix, method: str, tokens: int, forward: int, backward: int) -> list[float]:
    """What a float32 CPU does for a layer: matmul operations, thin ones, entries formed and walked over, calls."""
    large = 2 * tokens * matrix.m * matrix.n * dot(passes(matrix, method, half=False), (forward, backward))
    if method != "LR-LoRA":
        return [large, (method == "LoRA") * tokens * (matrix.m + matrix.n) * (forward + backward), 0, 0, 0]
    return [large, 0, matrix.entries * (forward + backward), matrix.entries * backward, forward + 2 * backward]


def layer_times(m: int, n: int, tokens: int) -> dict[tuple[str, int, int], float]:
    """Seconds of a layer by method, number of forwards, and of backwards."""
    steps: dict[Any, Step] = {}
    for method in ("frozen", *METHODS):
        layer: nn.Module = nn.Sequential(nn.Linear(n, m, bias=False)).requires_grad_(False)
        if method in CONFIGS:
            layer = get_peft_model(layer, CONFIGS[method](r=R, target_modules=["0"]))
        x, grad = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
        steps[method, 1, 0] = partial(layer, x)
        steps[method, 1, 1] = partial(lambda layer, x, grad: layer(x).backward(grad), layer, x, grad)
    return alternate(steps, 7)


def check_time() -> tuple[list[float], list[Record]]:
    """Constants of this processor from some layers, and what they predict of others and of whole models."""
    fitted = [(1024, 1024, 1024), (768, 1536, 512), (1536, 768, 256), (1536, 1536, 512), (64, 64, 16)]
    work, times, records = [], [], []
    for m, n, tokens in fitted:
        for case, seconds_ in layer_times(m, n, tokens).items():
            # The smallest layer says what a call of ours costs; of the others' calls the model knows nothing.
            if m > 64 or case[0] == "LR-LoRA":
                work.append(layer_work(Matrix(m, n), case[0], tokens, *case[1:]))
                times.append(seconds_)
    constants = fit(work, times)
    for m, n, tokens in [(2048, 2048, 512), (1024, 2816, 1024), (768, 768, 2048), (1536, 1536, 128)]:
        found = layer_times(m, n, tokens)
        lora, ours = (dot(layer_work(Matrix(m, n), method, tokens, 1, 1), constants) for method in METHODS)
        ratio = found["LR-LoRA", 1, 1] / found["LoRA", 1, 1]
        records.append({"what": f"time / LoRA: {m} × {n}, {tokens} tokens", "predicted": ours / lora, "found": ratio})
    config = llama(4096, 768, 2048, 4, 12, 12)
    linear = [(matrix, number) for matrix, number in matrices(config).items() if matrix.is_adapted]
    for shape in ((1, 256), (4, 256)):
        models = [adapted(config, method, torch.float32, checkpoints=True) for method in METHODS]
        x, tokens = torch.randn(*shape, 768, requires_grad=True), shape[0] * shape[1]
        lora, ours = alternate({i: partial(run, model, shape, x) for i, model in enumerate(models)}, 5).values()
        more = sum(
            sign * number * dot(layer_work(matrix, method, tokens, 2, 1), constants)
            for matrix, number in linear
            for sign, method in zip((-1, 1), METHODS, strict=True)
        )
        what = f"time / LoRA: Llama, 4 layers of 768, {shape[0]} × {shape[1]} tokens, checkpoints"
        records.append({"what": what, "predicted": 1 + more / lora, "found": ours / lora})
    return constants, records


def spectrum_work(m: int, n: int) -> list[float]:
    """Operations of the smaller of ΔW ΔWᵀ and ΔWᵀ ΔW, and powers of its size, for its eigenvalues."""
    size = float(min(m, n))
    return [2 * m * n * size, size**3, size**2]


def check_ranks() -> tuple[list[float], list[Record], Record]:
    """What the report of ranks needs: seconds by the size of a matrix, and bytes for an entry of ΔW."""
    torch.manual_seed(0)
    needed = {}
    for kind, config in ((Linear, llama(64, 512, 1024, 1, 4, 4)), (ParamWrapper, mixture(64, 64, 64, 1, 4, 4, 64))):
        model = adapted(config, "LR-LoRA", torch.float32, init_weights=False)
        layer: Any = next(module for module in model.modules() if isinstance(module, kind))
        with Traffic() as traffic:
            list(_measure("mlp", layer, "default"))
        needed[kind.__name__] = traffic.peak / layer.get_delta_weight("default").numel()
    fitted, held_out = [(512, 512), (768, 768), (1024, 1024), (1024, 3072), (1536, 1536)], [(2048, 2048), (1536, 4096)]
    times = alternate({s: partial(spectrum, torch.randn(*s)) for s in fitted + held_out}, 3)
    constants = fit([spectrum_work(*s) for s in fitted], [times[s] for s in fitted])
    records = [
        {"what": f"seconds: singular values, {m} × {n}", "found": times[m, n]}
        | {"predicted": dot(spectrum_work(m, n), constants)}
        for m, n in held_out
    ]
    return constants, records, needed


# -- The page ----------------------------------------------------------------------------------------------------------


def measure() -> Record:
    """All that is stored."""
    torch.set_num_threads(1)
    inside = calls_inside()
    models = {name: survey(make) | {"inside": inside} for name, make in (MODELS | SPREAD).items()}
    constants, times = check_time()
    rank_constants, ranks, needed = check_ranks()
    return {
        "models": models,
        "checks": [*check_counts(), *check_memory(), *times, *ranks],
        "constants": constants,
        "ranks": {"constants": rank_constants, "bytes": needed},
    }


CHANGES = {
    "as it is": NOW,
    "as it is, N = 50": NOW._replace(moments=215),
    "1. G multiplied at the library's rate": NOW._replace(product=1),
    "2. and φ's gradient from every 16th tile": NOW._replace(product=1, moments=59 / 16),
    "3. and the input's gradient through W + ΔW, rounded": Design(59 / 16, 1, (2, 2)),
    "4. and forward W + ΔW, rounded, with its rest in 8 bits": Design(59 / 16, 1, (1.5, 2)),
}
EXPERT_CHANGES = {
    "as it is": ("235B", NOW),
    "1. one launch for a stack, which writes W + ΔW in bfloat16": ("235B", NOW._replace(is_stacked=True)),
    "2. and experts spread over 8 GPUs": ("235B, spread", NOW._replace(is_stacked=True)),
}


def render(results: Record) -> dict[str, str]:
    """The tables by name."""
    rows: dict[str, list[list[str]]] = {name: [] for name in HEADERS}
    for name in MODELS:
        for kind, some in rows_of(name, results["models"][name], results["ranks"]).items():
            rows[kind] += some

    def times(name: str, tokens: int, design: Design) -> list[dict[str, float]]:
        return [step(results["models"][name], method, tokens, GPUS["H100"], 1, design) for method in METHODS]

    for change, design in CHANGES.items():
        pairs = [times(name, tokens, design) for name in ("7B", "70B") for tokens in TOKENS[1:]]
        rows["changes"].append([change, *(f"{ours['GPU'] / lora['GPU']:.2f}" for lora, ours in pairs)])
    for change, (name, design) in EXPERT_CHANGES.items():
        row = [change]
        for lora, ours in (times(name, tokens, design) for tokens in TOKENS[1:]):
            row += [f"{ours['GPU']:.1f}", f"{ours['host']:.1f}", f"{max(ours.values()) / max(lora.values()):.2f}"]
        rows["experts"].append(row)
    for record in results["checks"]:
        predicted, found = record["predicted"], record["found"]
        error = "0" if predicted == found else f"{100 * (predicted / found - 1):+.1f} %"
        numbers = [f"{value:,.0f}" if value > 20 else f"{value:.2f}" for value in (predicted, found)]
        rows["checks"].append([record["what"], *numbers, error])
    for name, gpu in GPUS.items():
        rows["data sheets"].append([name, *(f"{value / 1e12:.4g}" for value in gpu)])
    return {name: table(header, rows[name]) for name, header in HEADERS.items()}


def rows_of(name: str, model: Record, ranks: Record) -> dict[str, list[list[str]]]:
    """What the tables say of a model."""
    linear = [(Matrix(*sizes), number) for *sizes, number in model["matrices"] if Matrix(*sizes).is_adapted]
    largest = max((matrix for matrix, _ in linear), key=lambda matrix: matrix.entries)
    shape = f"{largest.m} × {largest.n}" + (f" × {largest.experts}" if largest.experts > 1 else "")
    trained = [f"{model['trainable'][m]:,} in {model['tensors'][m]:,}" for m in METHODS]
    counts = [name, f"{model['base'] / 1e9:.1f}", *trained, shape, f"{FLOAT32 * largest.entries / 1e9:.2f}"]
    peaks, times = [], []
    for way, shards in {"1": 1, "8 or 64, DDP": 1, "8, FSDP2": 8, "64, FSDP2": 64}.items():
        lora, ours = (memory(model, method, shards, buckets="DDP" in way) for method in METHODS)
        totals = [f"{sum(lora) / 1e9:.1f}", f"{sum(ours) / 1e9:.1f}", "yes" if sum(ours) < CAPACITY else "no"]
        peaks.append([name, way, *(f"{part / 1e9:.1f}" for part in ours), *totals])
    for gpus in (1, 8, 64) if BF16 * model["base"] < CAPACITY else (8, 64):
        for tokens in TOKENS:
            fits = sum(memory(model, "LR-LoRA", gpus, tokens)) < CAPACITY
            row = [name, str(gpus), f"{tokens:,}" + ("" if fits else " †")]
            for gpu in GPUS.values():
                parts = [step(model, method, tokens, gpu, gpus) for method in METHODS]
                seconds_lora, seconds_ours = (max(part.values()) for part in parts)
                waits = " / ".join(max(part, key=part.__getitem__) for part in parts)
                row += [f"{seconds_lora:.2f}", f"{seconds_ours / seconds_lora:.2f}", waits]
            times.append(row)
    each = [(dot(spectrum_work(m.m, m.n), ranks["constants"]), number * m.experts) for m, number in linear]
    peak = max(ranks["bytes"]["Linear" if m.experts == 1 else "ParamWrapper"] * m.entries for m, _ in linear)
    hours = sum(value * number for value, number in each) / 3600
    report = [f"{sum(number for _, number in each):,}", f"{peak / 1e9:.1f}", f"{max(each)[0]:.0f}", f"{hours:.1f}"]
    return {"counts": [counts], "memory": peaks, "time": times, "ranks": [[name, *report]]}


_TWICE = [f"{tokens:,} tokens" for tokens in TOKENS[1:]]
HEADERS = {
    "counts": ["", "base, 10⁹", *(f"{m} trains, in tensors" for m in METHODS), "largest ΔW", "in float32, GB"],
    "memory": ["", "GPUs", "weights", "gathered", "adapter", "checkpoints", "working", "LoRA", "LR-LoRA", "fits"],
    "time": ["", "GPUs", "tokens", *(f"{g}: {w}" for g in GPUS for w in ("LoRA, s", "LR-LoRA / LoRA", "waits for"))],
    "changes": ["", *(f"{name}, {tokens}" for name in ("7B", "70B") for tokens in _TWICE)],
    "experts": ["", *(f"{tokens}: {what}" for tokens in _TWICE for what in ("GPU, s", "host, s", "LR-LoRA / LoRA"))],
    "ranks": ["", "matrices", "peak, GB", "slowest, s", "all, hours"],
    "checks": ["", "predicted", "found", "error"],
    "data sheets": ["10¹² a second", "bfloat16", "float32", "bytes of memory", "from its node", "from all nodes"],
}


def updated(page: str) -> str:
    """The page with the tables of the stored results."""
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
