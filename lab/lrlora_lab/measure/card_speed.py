"""Cost on a GPU, with and without the Triton kernels: a layer of a 7B model, steps and generation of a 1B model."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lrlora import LrLoraConfig, cached_weights
from lrlora.ops.reference import reference_delta_weight
from lrlora.ops.transfer import Transfer

from ..sections import table

# Llama 2 7B: attention, and both MLP shapes.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = 2048
R = 16
# Llama 3.2 1B.
MODEL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
MODEL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
Record = dict[str, Any]
METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **targets: LoraConfig(r=R, **targets),
    "LoRA, r = 64": lambda **targets: LoraConfig(r=4 * R, **targets),  # fitted ranks at r = 16, before the cut
    "expansion, Q = 4": lambda **targets: LrLoraConfig(r=R, form="expansion", num_terms=4, **targets),
    "LR-LoRA": lambda **targets: LrLoraConfig(r=R, **targets),
    "LR-LoRA, plain PyTorch": lambda **targets: LrLoraConfig(r=R, **targets),
}


@contextmanager
def _kernels(method: str) -> Any:
    """Disable the kernels for methods named "plain"."""
    before = os.environ.get("LRLORA_KERNELS")
    if "plain" in method:
        os.environ["LRLORA_KERNELS"] = "0"
    try:
        yield
    finally:
        os.environ.pop("LRLORA_KERNELS", None)
        if before is not None:
            os.environ["LRLORA_KERNELS"] = before


def _layer(method: str, m: int, n: int, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(layer=nn.Linear(n, m))).to(device, dtype).requires_grad_(False)
    model = get_peft_model(model, METHODS[method](target_modules=["layer"]))
    for name, weight in model.named_parameters():
        if "_B." in name:
            nn.init.normal_(weight, std=0.02)  # as if slightly trained: the initial update is zero
    return model.train()


def _error(model: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """Relative error of the outputs' update compared to float64; LoRA's is due to rounding alone."""
    layer = model.base_model.model.layer
    base = layer.get_base_layer()
    phi = layer.lrlora_phi["default"] if hasattr(layer, "lrlora_phi") else None
    with torch.no_grad():
        if isinstance(phi, Transfer):  # by the formula, not the code under test
            A, B = (part["default"].weight for part in (layer.lrlora_A, layer.lrlora_B))
            scales = {"scaling": layer.scaling["default"], "input_gain": layer.input_gain["default"]}
            delta = reference_delta_weight(A, B, phi, **scales)
        else:
            delta = layer.get_delta_weight("default").double()
        wanted = x.double() @ delta.T
        return float((y.double() - base(x).double() - wanted).norm() / wanted.norm())


def measure(device: str, shapes: Any = SHAPES, tokens: int = TOKENS, rounds: int = 20) -> list[Record]:
    """Forward and backward of each layer in bfloat16, alternating methods; medians."""
    is_gpu = device.startswith("cuda")
    records = []
    for m, n in shapes:
        models, peaks, errors = {}, {}, {}
        times: dict[str, list[float]] = {method: [] for method in METHODS}
        x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16, requires_grad=True)
        for method in METHODS:
            models[method] = _layer(method, m, n, device, torch.bfloat16)
        for turn in range(rounds + 1):  # the first one compiles
            for method, model in models.items():
                with _kernels(method):
                    if is_gpu:
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    start = time.perf_counter()
                    y = model(x)
                    y.backward(torch.ones_like(y))
                    if is_gpu:
                        torch.cuda.synchronize()
                        peaks[method] = (torch.cuda.max_memory_allocated() - before) / 2**20
                    if turn:
                        times[method].append(time.perf_counter() - start)
                    else:
                        errors[method] = _error(model, x, y.detach())
                model.zero_grad()
                x.grad = None
        records += [
            {
                "shape": [m, n],
                "tokens": tokens,
                "method": method,
                "seconds": median(times[method]),
                "peak_mib": peaks.get(method),
                "error": errors[method],
            }
            for method in METHODS
        ]
    return records


def measure_model(
    device: str, sizes: Any = MODEL, shape: tuple[int, int] = (4, 1024), new_tokens: int = 64, rounds: int = 5
) -> list[Record]:
    """Optimizer steps and greedy generation of a random language model in bfloat16; medians, one method at a time."""
    is_gpu = device.startswith("cuda")
    records = []
    for method, config in METHODS.items():
        torch.manual_seed(0)
        base: Any = LlamaForCausalLM(LlamaConfig(**sizes))
        base = base.to(device, torch.bfloat16)
        model: Any = get_peft_model(base, config(target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        tokens = torch.randint(3, sizes["vocab_size"], shape, device=device)

        def step(model: Any = model, optimizer: Any = optimizer, tokens: Any = tokens) -> None:
            model.train()(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def generate(model: Any = model, tokens: Any = tokens) -> None:
            options = {
                "max_new_tokens": new_tokens,
                "min_new_tokens": new_tokens,
                "do_sample": False,
                "pad_token_id": 0,
            }
            with torch.no_grad(), cached_weights(model.eval()):
                model.generate(input_ids=tokens[:, :64], **options)

        with _kernels(method):
            for what, act in (("a step", step), (f"{new_tokens} new tokens", generate)):
                if is_gpu:
                    torch.cuda.reset_peak_memory_stats()
                times = []
                for _ in range(rounds + 1):  # the first one compiles
                    start = time.perf_counter()
                    act()
                    if is_gpu:
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                peak = torch.cuda.max_memory_allocated() / 2**20 if is_gpu else None
                count = sum(p.numel() for p in base.parameters() if not p.requires_grad)
                records.append(
                    {
                        "shape": f"model of {count / 1e9:.1f}B, {' × '.join(map(str, shape))}: {what}",
                        "method": method,
                        "seconds": median(times[1:]),
                        "peak_mib": peak,
                        "error": None,
                    }
                )
        del base, model, optimizer, step, generate
        if is_gpu:
            torch.cuda.empty_cache()
    return records


def render(records: list[Record]) -> str:
    """Table of a card."""
    rows = []
    for record in records:
        lora = next(each for each in records if each["shape"] == record["shape"] and each["method"] == "LoRA")
        shape = record["shape"] if isinstance(record["shape"], str) else " × ".join(map(str, record["shape"]))
        rows.append(
            [
                shape,
                record["method"],
                f"{record['seconds'] / lora['seconds']:.2f}",
                "" if record["peak_mib"] is None else f"{record['peak_mib']:,.0f}",
                "" if record["error"] is None else f"{record['error']:.1e}",
            ]
        )
    return table(["layer or model", "method", "time / LoRA", "peak, MiB", "error of the update"], rows)
