"""Where the time of φ(BA) goes: the parts of forward and backward of one linear layer, width 2,048, r = 8.

python -m lrlora_lab.parts
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrlora.ops import cpu
from lrlora.ops.phi import TransferSpec
from lrlora.ops.table import PhiGradient, TransferTable

from .sections import table

WIDTH, RANK, ROUNDS = 2_048, 8, 15
TOKENS = (32, 128, 512)


def least(call: Callable[[], Any]) -> float:
    """Least processor time of a call, in seconds."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def parts(tokens: int) -> list[str]:
    """Row: each part as a multiple of forward and backward of the frozen layer and plain LoRA."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W, A, B = random(WIDTH, WIDTH), random(RANK, WIDTH), random(WIDTH, RANK)
    x, grad = random(tokens, WIDTH), random(tokens, WIDTH)
    buffer, gain = torch.empty_like(W), torch.tensor(0.1)
    spec = TransferSpec()
    phi = torch.zeros(len(spec.phi_form.parameters), spec.num_basis)
    transfer = TransferTable(spec, phi, torch.float32)

    def lora() -> None:
        grad @ W
        x @ W.T + (x @ A.T) @ B.T
        h = grad @ B
        (grad.T @ (x @ A.T), h.T @ x, h @ A)

    unit = least(lora)

    def weights() -> None:
        for _ in range(2):
            cpu.write_weight(buffer, W, A, B, transfer, 1.0, gain)

    calls: list[Callable[[], Any]] = [
        lambda: (x @ buffer.T, grad @ buffer),
        weights,
        lambda: torch.mm(grad.T, x, out=buffer),
        lambda: cpu.factor_gradients(buffer, A, B, PhiGradient(transfer), 1.0, gain),
    ]
    ratios = [least(call) / unit for call in calls]
    return [f"{tokens}", *(f"{ratio:.2f}" for ratio in ratios), f"{sum(ratios):.2f}"]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    head = ["tokens", "y and ∂L/∂x", "W + ΔW, twice", "∂L/∂(W + ΔW)", "gradients of A, B and φ", "sum"]
    print(table(head, [parts(tokens) for tokens in TOKENS]))


if __name__ == "__main__":
    main()
