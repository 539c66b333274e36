"""Updates from a module's stored tensors: LoRA, LoHa, LoKr, and full differences.

    LoRA    ΔW = s·B A                                               arXiv:2106.09685
    LoHa    ΔW = s·(B₁A₁) ∘ (B₂A₂)                                   arXiv:2108.06098
    LoKr    ΔW = s·W₁ ⊗ W₂, each full or a product                   arXiv:2309.14859

For a convolution, ΔW is flattened to (m, inputs · kernel). A Hadamard product of two products of rank r is itself a
product, of rank r², and so is a Kronecker product with a product: if thin, neither is materialized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..lora.factors import PLAIN, Layout
from ..naming import pattern_key
from ..ops.form import at_least_float32
from .update import Pair, Update

Parts = Mapping[str, Tensor]
# From this share of the smaller side on, a product costs as much as the matrix.
_THIN = 0.5


def rank_of(parts: Parts) -> int | None:
    """The rank r that divides α; None if the module has no product."""
    names = ("lora_A", "lora_embedding_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((len(parts[name]) for name in names if name in parts), None)


def scaling_of(config: Mapping[str, Any], module: str, r: int) -> float:
    """Scaling s of a module: α/r, or α/√r."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    usual: float = config["alpha" if "alpha" in config else "lora_alpha"]
    alpha = patterns.get(pattern_key(patterns, module), usual)
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def update_from_parts(module: str, parts: Parts, scaling: float, *, of_peft: bool = False) -> Update:
    """Build the update of one module.

    Args:
        module: its name.
        parts: by PEFT's names, without prefix and suffix: lora_A, hada_w1_a, lokr_w2; or `diff`, ΔW itself.
        scaling: s.
        of_peft: read LoKr on Conv1d as PEFT multiplies it, which is not as LyCORIS does.

    Raises:
        ValueError: parts are missing or do not match.

    """
    try:
        # On the meta device, which computes nothing: an update forms its matrix only when used.
        made = _computation({name: part.to("meta") for name, part in parts.items()}, of_peft)[0]()
        compute, layout = _computation(parts, of_peft)
        left, right = made if isinstance(made, tuple) else 2 * (made.flatten(1),)
        (m, k), n = left.shape, right.shape[1]
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"has incompatible tensors: {error}"
        raise ValueError(f"{module} {reason}. Tensors found: {', '.join(sorted(parts))}.") from None
    if isinstance(made, tuple):

        def scaled() -> Pair:
            U, V = compute()
            return scaling * at_least_float32(U), at_least_float32(V)

        return Update(module, (m, n), scaled, True, rank_of(parts), min(k, m, n), scaling, layout)
    kernel = tuple(made.shape[2:])
    layout = Layout(kernel, is_known=bool(kernel))
    r, limit = rank_of(parts), min(m, n)
    return Update(module, (m, n), lambda: scaling * compute().flatten(1), False, r, limit, scaling, layout)


# Computes ΔW, or its factors, without s; and the layout of the factors.
_Computation = tuple[Callable[[], Any], Layout]


def _computation(parts: Parts, of_peft: bool) -> _Computation:
    if {"lora_A", "lora_B", "lora_mid"} & set(parts):
        return _lora(parts)
    if "lora_embedding_A" in parts:
        A, B = parts["lora_embedding_A"], parts["lora_embedding_B"]
        return (lambda: (A.T, B.T)), Layout(is_embedding=True)
    if "hada_w1_a" in parts:
        return _loha(parts)
    if any(name.startswith("lokr_") for name in parts):
        return _lokr(parts, of_peft)
    return parts["diff"].float, PLAIN


def _lora(parts: Parts) -> _Computation:
    A, B = parts["lora_A"], parts["lora_B"]
    if (middle := parts.get("lora_mid")) is not None:  # LyCORIS's Tucker form: a convolution between two of 1 × 1
        A = torch.einsum("kr...,ri->ki...", middle.float(), A.flatten(1).float())
    if B[0].numel() != len(A):
        why = " (grouped convolutions are not supported)" if A.dim() > 2 else ""
        raise ValueError(f"lora_B has {B[0].numel()} columns, but lora_A has {len(A)} rows{why}")
    return (lambda: (B.flatten(1), A.flatten(1))), Layout(tuple(A.shape[2:]))


def _loha(parts: Parts) -> _Computation:
    (a1, b1), (a2, b2) = ((parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
    if "hada_t1" in parts:
        cores = parts["hada_t1"], parts["hada_t2"]
        return (lambda: _tucker(cores[0], a1, b1) * _tucker(cores[1], a2, b2)), PLAIN
    if not _is_thin(len(b1) ** 2, len(a1), b1.shape[1]):
        return (lambda: (a1.float() @ b1.float()) * (a2.float() @ b2.float())), PLAIN

    def factors() -> Pair:
        U = (a1[:, :, None].float() * a2[:, None, :].float()).flatten(1)
        return U, (b1[:, None, :].float() * b2[None, :, :].float()).flatten(0, 1)

    return factors, Layout(is_known=False)


def _lokr(parts: Parts, of_peft: bool) -> _Computation:
    def left() -> Tensor:
        whole = parts.get("lokr_w1")
        return parts["lokr_w1_a"].float() @ parts["lokr_w1_b"].float() if whole is None else whole.float()

    rows, columns = left().shape
    if "lokr_w2" in parts or "lokr_t2" in parts:

        def matrix() -> Tensor:
            whole = parts.get("lokr_w2")
            right = whole if whole is not None else _tucker(*(parts[f"lokr_{x}"] for x in ("t2", "w2_a", "w2_b")))
            if right.dim() < 2:
                raise ValueError(f"lokr_w2 has {right.dim()} dimensions")
            if of_peft and right.dim() == 3:
                p, q, *kernel = right.shape
                return torch.kron(left(), right.float()).reshape(rows * p, columns * q, *kernel)
            return torch.kron(left().reshape(rows, columns, *[1] * (right.dim() - 2)), right.float())

        return matrix, PLAIN
    a, b = parts["lokr_w2_a"], parts["lokr_w2_b"].flatten(1)
    if not _is_thin(columns * len(b), rows * len(a), columns * b.shape[1]):
        return (lambda: torch.kron(left(), a.float() @ b.float())), PLAIN

    def factors() -> Pair:
        return torch.kron(left(), a.float()), torch.kron(torch.eye(columns, device=b.device), b.float())

    return factors, Layout(is_known=False)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Core (i, j, …), factors (i, p) and (j, q) → (p, q, …)."""
    return torch.einsum("ij...,ip,jq->pq...", core.float(), a.float(), b.float())


def _is_thin(k: int, m: int, n: int) -> bool:
    return k <= _THIN * min(m, n)
