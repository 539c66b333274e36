"""Updates from a module's stored tensors: LoRA, LoHa, LoKr, and full differences.

    LoRA    ΔW = s·B A                                               arXiv:2106.09685
    LoHa    ΔW = s·(B₁A₁) ∘ (B₂A₂)                                   arXiv:2108.06098
    LoKr    ΔW = s·W₁ ⊗ W₂, each full or a product                   arXiv:2309.14859
    LoRA of E experts in one parameter (`target_parameters`): A is (E·r, inputs), B (outputs, r·E); of expert e, A_e has
            rows e·r to (e + 1)·r, B_e each E-th column from e, and ΔW_e = s·B_e A_e

For a convolution, ΔW is flattened to (m, inputs · kernel). A Hadamard product of two products of rank r is itself a
product, of rank r², and so is a Kronecker product with a product: if thin, neither is materialized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..lora.factors import PLAIN, Layout, Stack
from ..naming import pattern_key
from ..ops.form import at_least_float32
from .update import Pair, Update

ModuleTensors = Mapping[str, Tensor]
# From this share of the smaller side on, a product costs as much as the matrix.
_THIN = 0.5


def rank_of(tensors: ModuleTensors) -> int | None:
    """The rank r that divides α; None if the module has no product."""
    names = ("lora_A", "lora_embedding_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((len(tensors[name]) for name in names if name in tensors), None)


def scaling_of(config: Mapping[str, Any], module: str, r: int) -> float:
    """Scaling s of a module: α/r, or α/√r."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    default: float = config["alpha" if "alpha" in config else "lora_alpha"]
    alpha = patterns.get(pattern_key(patterns, module), default)
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def update_from_tensors(module: str, tensors: ModuleTensors, scaling: float, *, from_peft: bool = False) -> Update:
    """Build the update of one module.

    Args:
        module: its name.
        tensors: by PEFT's names, without prefix and suffix: lora_A, hada_w1_a, lokr_w2; or `diff`, ΔW itself.
        scaling: s.
        from_peft: read LoKr on Conv1d as PEFT multiplies it, which is not as LyCORIS does.

    Raises:
        ValueError: tensors are missing or do not match.

    """
    try:
        # On the meta device, which computes nothing: an update forms its matrix only when used.
        meta_update = _computation({name: tensor.to("meta") for name, tensor in tensors.items()}, from_peft)[0]()
        compute, layout = _computation(tensors, from_peft)
        left, right = meta_update if isinstance(meta_update, tuple) else 2 * (meta_update.flatten(1),)
        (m, k), n = left.shape, right.shape[1]
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"has incompatible tensors: {error}"
        raise ValueError(f"{module} {reason}. Tensors found: {', '.join(sorted(tensors))}.") from None
    if isinstance(meta_update, tuple):

        def scaled() -> Pair:
            U, V = compute()
            return scaling * at_least_float32(U), at_least_float32(V)

        return Update(module, (m, n), scaled, True, rank_of(tensors), min(k, m, n), scaling, layout)
    kernel = tuple(meta_update.shape[2:])
    layout = Layout(kernel, is_known=bool(kernel))
    r, limit = rank_of(tensors), min(m, n)
    return Update(module, (m, n), lambda: scaling * compute().flatten(1), False, r, limit, scaling, layout)


# Computes ΔW, or its factors, without s; and the layout of the factors.
_Computation = tuple[Callable[[], Any], Layout]


def _computation(tensors: ModuleTensors, from_peft: bool) -> _Computation:
    if {"lora_A", "lora_B", "lora_mid"} & set(tensors):
        return _lora(tensors)
    if "lora_embedding_A" in tensors:
        A, B = tensors["lora_embedding_A"], tensors["lora_embedding_B"]
        return (lambda: (A.T, B.T)), Layout(is_embedding=True)
    if "hada_w1_a" in tensors:
        return _loha(tensors)
    if any(name.startswith("lokr_") for name in tensors):
        return _lokr(tensors, from_peft)
    return tensors["diff"].float, PLAIN


def _lora(tensors: ModuleTensors) -> _Computation:
    A, B = tensors["lora_A"], tensors["lora_B"]
    if (middle := tensors.get("lora_mid")) is not None:  # LyCORIS's Tucker form: a convolution between two of 1 × 1
        A = torch.einsum("kr...,ri->ki...", middle.float(), A.flatten(1).float())
    if B[0].numel() != len(A):
        hint = " (grouped convolutions are not supported)" if A.dim() > 2 else ""
        raise ValueError(f"lora_B has {B[0].numel()} columns, but lora_A has {len(A)} rows{hint}")
    return (lambda: (B.flatten(1), A.flatten(1))), Layout(tuple(A.shape[2:]))


def _loha(tensors: ModuleTensors) -> _Computation:
    (a1, b1), (a2, b2) = ((tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]) for i in (1, 2))
    if "hada_t1" in tensors:
        cores = tensors["hada_t1"], tensors["hada_t2"]
        return (lambda: _tucker(cores[0], a1, b1) * _tucker(cores[1], a2, b2)), PLAIN
    if not _is_thin(len(b1) ** 2, len(a1), b1.shape[1]):
        return (lambda: (a1.float() @ b1.float()) * (a2.float() @ b2.float())), PLAIN

    def factors() -> Pair:
        U = (a1[:, :, None].float() * a2[:, None, :].float()).flatten(1)
        return U, (b1[:, None, :].float() * b2[None, :, :].float()).flatten(0, 1)

    return factors, Layout(is_known=False)


def _lokr(tensors: ModuleTensors, from_peft: bool) -> _Computation:
    def W1() -> Tensor:
        weight = tensors.get("lokr_w1")
        return tensors["lokr_w1_a"].float() @ tensors["lokr_w1_b"].float() if weight is None else weight.float()

    rows, columns = W1().shape
    if "lokr_w2" in tensors or "lokr_t2" in tensors:

        def matrix() -> Tensor:
            if "lokr_w2" in tensors:
                W2 = tensors["lokr_w2"]
            else:
                W2 = _tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
            if W2.dim() < 2:
                raise ValueError(f"lokr_w2 has {W2.dim()} dimensions")
            if from_peft and W2.dim() == 3:
                p, q, *kernel = W2.shape
                return torch.kron(W1(), W2.float()).reshape(rows * p, columns * q, *kernel)
            return torch.kron(W1().reshape(rows, columns, *[1] * (W2.dim() - 2)), W2.float())

        return matrix, PLAIN
    a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"].flatten(1)
    if not _is_thin(columns * len(b), rows * len(a), columns * b.shape[1]):
        return (lambda: torch.kron(W1(), a.float() @ b.float())), PLAIN

    def factors() -> Pair:
        return torch.kron(W1(), a.float()), torch.kron(torch.eye(columns, device=b.device), b.float())

    return factors, Layout(is_known=False)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Core (i, j, …), factors (i, p) and (j, q) → (p, q, …)."""
    return torch.einsum("ij...,ip,jq->pq...", core.float(), a.float(), b.float())


def _is_thin(k: int, m: int, n: int) -> bool:
    return k <= _THIN * min(m, n)


def expert_updates(
    stack: Stack,
    factors: tuple[Tensor, Tensor],
    scaling: float,
    weight: Callable[[int], Tensor | None] = lambda expert: None,
) -> Iterator[Update]:
    """Updates of the matrices of a parameter.

    Args:
        stack: the parameter.
        factors: A (E·r, n) and B (m, r·E).
        scaling: s.
        weight: expert → its matrix in the base model.

    """
    A, B = factors[0].unflatten(0, (stack.experts, -1)), factors[1].unflatten(1, (-1, stack.experts))
    r, m, n = A.shape[1], len(B), A.shape[2]

    def expert_update(expert: int) -> Update:
        def compute() -> Pair:
            return scaling * at_least_float32(B[:, :, expert]), A[expert]

        path = stack.parameter if stack.experts == 1 else f"{stack.parameter}.{expert}"
        return Update(
            path, (m, n), compute, True, r, min(r, m, n), scaling, Layout(stack=stack), lambda: weight(expert)
        )

    yield from map(expert_update, range(stack.experts))


def require_shapes(name: str, stack: Stack, factors: tuple[Tensor, Tensor], r: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless stored factors (A, B) of an adapter fit a parameter, whose matrices have this shape."""
    A, B = factors
    (m, n), stacked = shape, stack.experts * r
    if (tuple(A.shape), tuple(B.shape)) == ((stacked, n), (m, stacked)):
        return
    message = (
        f"{name} does not fit its base model: {stack.parameter} has {stack.experts} matrices of {m} × {n}, so that "
        f"r = {r} needs A of {stacked} × {n} and "
        f"B of {m} × {stacked}, but the file has {' × '.join(map(str, A.shape))} and {' × '.join(map(str, B.shape))}."
    )
    if (A.shape[1], len(B)) == (m, n):
        message += " Inputs and outputs are exchanged, as PEFT up to 0.18 wrote them."
    raise ValueError(message)
