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

from ..naming import pattern_key
from ..ops.form import at_least_float32
from .update import Factors, Layout, Update

Parts = Mapping[str, Tensor]
# From this share of the smaller side on, a product costs as much as the matrix.
_THIN = 0.5


def rank_of(parts: Parts) -> int | None:
    """The rank r that divides α; None if the module has no product."""
    for name in ("lora_A", "lora_embedding_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in parts:
            return len(parts[name])
    return None


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
        # Shapes are checked on the meta device, which computes nothing: an update forms its matrix only when used.
        _update(module, {name: part.to("meta") for name, part in parts.items()}, scaling, of_peft).form()
        return _update(module, parts, scaling, of_peft)
    except (IndexError, KeyError, RuntimeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"has incompatible tensors: {error}"
        raise ValueError(f"{module} {reason}. Tensors found: {', '.join(sorted(parts))}.") from None


def _update(module: str, parts: Parts, scaling: float, of_peft: bool) -> Update:
    if {"lora_A", "lora_B", "lora_mid"} & set(parts):
        return _lora(module, parts, scaling)
    if "lora_embedding_A" in parts:
        A, B = parts["lora_embedding_A"], parts["lora_embedding_B"]
        shape, layout = (A.shape[1], len(B)), Layout(is_embedding=True)
        return _product(module, shape, lambda: (A.T, B.T), scaling, len(A), len(A), layout)
    if "hada_w1_a" in parts:
        return _loha(module, parts, scaling)
    if any(name.startswith("lokr_") for name in parts):
        return _lokr(module, parts, scaling, of_peft)
    difference = parts["diff"]
    return _matrix(module, tuple(difference.shape), difference.float, 1.0, None)


def _lora(module: str, parts: Parts, scaling: float) -> Update:
    A, B = parts["lora_A"], parts["lora_B"]
    if (middle := parts.get("lora_mid")) is not None:  # LyCORIS's Tucker form: a convolution between two of 1 × 1
        A = torch.einsum("kr...,ri->ki...", middle.float(), A.flatten(1).float())
    if B[0].numel() != len(A):
        why = " Grouped convolutions are not supported." if A.dim() > 2 else ""
        raise ValueError(f"{module}: lora_B has {B[0].numel()} columns, but lora_A has {len(A)} rows.{why}")
    U, V, layout = B.flatten(1), A.flatten(1), Layout(tuple(A.shape[2:]))
    return _product(module, (len(U), V.shape[1]), lambda: (U, V), scaling, len(A), len(A), layout)


def _loha(module: str, parts: Parts, scaling: float) -> Update:
    (a1, b1), (a2, b2) = ((parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
    r = len(b1)
    if "hada_t1" in parts:
        cores = parts["hada_t1"], parts["hada_t2"]
        shape = (a1.shape[1], b1.shape[1], *cores[0].shape[2:])
        return _matrix(module, shape, lambda: _tucker(cores[0], a1, b1) * _tucker(cores[1], a2, b2), scaling, r)
    m, n = len(a1), b1.shape[1]
    if not _is_thin(r * r, m, n):
        return _matrix(module, (m, n), lambda: (a1.float() @ b1.float()) * (a2.float() @ b2.float()), scaling, r)

    def factors() -> Factors:
        U = (a1[:, :, None].float() * a2[:, None, :].float()).flatten(1)
        return U, (b1[:, None, :].float() * b2[None, :, :].float()).flatten(0, 1)

    return _product(module, (m, n), factors, scaling, r, r * r, Layout(is_known=False))


def _lokr(module: str, parts: Parts, scaling: float, of_peft: bool) -> Update:
    r = rank_of(parts)

    def left() -> Tensor:
        whole = parts.get("lokr_w1")
        return parts["lokr_w1_a"].float() @ parts["lokr_w1_b"].float() if whole is None else whole.float()

    rows, columns = left().shape
    if "lokr_w2" in parts or "lokr_t2" in parts:

        def matrix() -> Tensor:
            whole = parts.get("lokr_w2")
            right = whole if whole is not None else _tucker(*(parts[f"lokr_{x}"] for x in ("t2", "w2_a", "w2_b")))
            if of_peft and right.dim() == 3:
                return torch.kron(left(), right.float()).reshape(rows * p, columns * q, *kernel)
            return torch.kron(left().reshape(rows, columns, *[1] * (right.dim() - 2)), right.float())

        (p, q), kernel = _right_shape(parts)
        return _matrix(module, (rows * p, columns * q, *kernel), matrix, scaling, r)
    a, b = parts["lokr_w2_a"], parts["lokr_w2_b"].flatten(1)
    m, n, k = rows * len(a), columns * b.shape[1], columns * len(b)
    if not _is_thin(k, m, n):
        return _matrix(module, (m, n), lambda: torch.kron(left(), a.float() @ b.float()), scaling, r)

    def factors() -> Factors:
        return torch.kron(left(), a.float()), torch.kron(torch.eye(columns, device=b.device), b.float())

    return _product(module, (m, n), factors, scaling, r, k, Layout(is_known=False))


def _right_shape(parts: Parts) -> tuple[tuple[int, int], tuple[int, ...]]:
    if "lokr_w2" in parts:
        shape = parts["lokr_w2"].shape
        return (shape[0], shape[1]), tuple(shape[2:])
    return (parts["lokr_w2_a"].shape[1], parts["lokr_w2_b"].shape[1]), tuple(parts["lokr_t2"].shape[2:])


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Core (i, j, …), factors (i, p) and (j, q) → (p, q, …)."""
    return torch.einsum("ij...,ip,jq->pq...", core.float(), a.float(), b.float())


def _is_thin(k: int, m: int, n: int) -> bool:
    return k <= _THIN * min(m, n)


def _product(
    module: str,
    shape: tuple[int, int],
    factors: Callable[[], Factors],
    scaling: float,
    r: int | None,
    k: int,
    layout: Layout,
) -> Update:
    def form() -> Factors:
        U, V = factors()
        return scaling * at_least_float32(U), at_least_float32(V)

    return Update(module, shape, form, True, r, min(k, *shape), scaling, layout)


def _matrix(module: str, shape: tuple[int, ...], matrix: Callable[[], Tensor], scaling: float, r: int | None) -> Update:
    kernel = shape[2:]
    m, n = shape[0], math.prod(shape[1:])
    return Update(
        module,
        (m, n),
        lambda: scaling * matrix().flatten(1),
        False,
        r,
        min(m, n),
        scaling,
        Layout(kernel, is_known=bool(kernel)),
    )
