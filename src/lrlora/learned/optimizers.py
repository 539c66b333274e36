"""Optimizers whose steps fitted ranks can take part in: they leave zeros without a gradient at zero."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import full_state, in_deepspeed, write_state

_PROBE = 64  # rows and columns of matrices on which an optimizer is tested: 8-bit ones keep small states in 32 bits
_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}  # of the gradients in a moment
_CARRIED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD)
_MUTABLE = (dict, list, set)  # attributes that a step may change in place


def require_suitable(optimizer: Any, inner: Any, factors: list[nn.Parameter]) -> None:
    """Raise ValueError for an optimizer whose steps the cut cannot take part in."""
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(f"Fitted ranks need a torch.optim.Optimizer, which {type(inner).__name__} is not. Use AdamW.")
    stepped = {id(p) for group in inner.param_groups for p in group["params"]}
    if optimizer is inner and not stepped >= {id(weight) for weight in factors}:
        raise ValueError("The optimizer must have all LoRA parameters of the model. Create it from this model.")
    name = type(inner).__name__
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError("Fitted ranks do not support LBFGS, whose state spans all parameters. Use AdamW.")
    if any(group.get("lr") is None for group in inner.param_groups):
        raise ValueError(f"Fitted ranks need a learning rate, but {name} has lr=None. Set it.")
    try:
        keeps_zeros = _keeps_zeros(inner, factors[0])
    except Exception as error:  # of any type: the optimizer is not ours
        raise ValueError(
            f"Fitted ranks need an optimizer that leaves zeros without a gradient at zero. {name} could not be tested "
            f"({type(error).__name__}: {error}). Use AdamW."
        ) from None
    if not keeps_zeros:
        raise ValueError(
            f"Fitted ranks need an optimizer that leaves zeros without a gradient at zero, but {name} with these "
            "settings does not. Use AdamW, without gradient centralization or noise, and with eps > 0."
        )


def _keeps_zeros(optimizer: torch.optim.Optimizer, like: Tensor) -> bool:
    """Step a copy of the optimizer on matrices with zero rows or columns; raises as its step does."""
    like = next((parameter for group in optimizer.param_groups for parameter in group["params"]), like)
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype  # there, eps may be 0
    rows = torch.zeros(_PROBE, _PROBE, dtype=dtype, device=like.device)
    rows[: _PROBE // 2] = 1
    for mask in (rows, rows.T.contiguous()):
        parameter = nn.Parameter(mask.clone())
        twin = _twin(optimizer, parameter)
        for _ in range(2):
            parameter.grad = mask.clone()
            step = type(twin).step
            step(twin, *[lambda: torch.zeros(())] * ("closure" in inspect.signature(step).parameters))
        if bool((parameter.detach()[mask == 0] != 0).any()):
            return False
    return True


def _twin(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Any:
    """Optimizer with copies of attributes and options, of another parameter; in training mode, where it has modes."""

    def copy_values(values: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
        kept = {name: value for name, value in values.items() if name not in without}
        return {
            name: value.clone() if isinstance(value, Tensor) else copy.copy(value) if type(value) in _MUTABLE else value
            for name, value in kept.items()
        }

    # `copy.copy` leaves out what subclasses add; and DeepSpeed's destroy what they share with the original.
    cls = type(type(optimizer).__name__, (type(optimizer),), {"__del__": lambda self: None})
    twin: Any = object.__new__(cls)
    hooks = [name for name in vars(optimizer) if name.endswith("_hooks")]
    vars(twin).update(copy_values(vars(optimizer), (*hooks, "state", "param_groups")))
    vars(twin).update({name: OrderedDict() for name in hooks})
    options = copy_values(optimizer.param_groups[0], ("params",))
    options["lr"] = torch.full_like(options["lr"], 1e-3) if isinstance(options["lr"], Tensor) else 1e-3
    twin.state, twin.param_groups = defaultdict(dict), [options | {"params": [parameter]}]
    if hasattr(twin, "train"):
        twin.train()
    return twin


def loss_scale_of(optimizers: list[Any], scaler: torch.amp.GradScaler | None) -> Callable[[], float] | None:
    """Function that returns the factor of the loss in the next backward; None without a loss scaler."""
    for optimizer in optimizers:
        if is_deepspeed(optimizer):
            return partial(getattr, optimizer, "loss_scale", 1.0)
        scaler = scaler or getattr(optimizer, "scaler", None)  # accelerate's wrapper has one
    return None if scaler is None else scaler.get_scale


class StepHook:
    """Calls a function after every step of an optimizer without hooks of its own, such as ZeRO's."""

    def __init__(self, optimizer: Any, function: Callable[[], None]) -> None:
        self._is_removed, step = False, optimizer.step

        def step_and_call(*args: Any, **options: Any) -> Any:
            result = step(*args, **options)
            if not self._is_removed:
                function()
            return result

        optimizer.step = step_and_call

    def remove(self) -> None:
        """Call it no more. The method stays, since others, such as schedulers, may have wrapped it."""
        self._is_removed = True


def is_deepspeed(optimizer: Any) -> bool:
    """Whether DeepSpeed's ZeRO steps: its optimizer holds flat partitions of float32 copies."""
    return type(optimizer).__module__.startswith("deepspeed.")


def unwrapped(optimizer: Any) -> list[Any]:
    """The optimizer and those inside of it, such as that inside of accelerate's wrapper."""
    chain = [optimizer]
    while (wrapped := getattr(chain[-1], "optimizer", None) or getattr(chain[-1], "base_optimizer", None)) is not None:
        chain.append(wrapped)
    return chain


@torch.no_grad()
def carry_over(optimizer: Any, factor: nn.Parameter, dim: int, change: Tensor) -> bool:
    """Carry the moments of a factor over to other factors of the same update, or let the optimizer begin anew with it.

    With A′ = T A and B′ = B S, the gradients are ∂A′ = Sᵀ ∂A and ∂B′ = ∂B Tᵀ. First moments change by the same
    matrices; second ones by their squares, element by element, which is exact for gradients without correlation, and
    too little where those of the rows are alike.

    Args:
        optimizer: that of the factor.
        factor: A (r, in) or B (out, r), or that of a convolution.
        dim: its dimension of size r.
        change: Sᵀ for A, T for B, (r, r), float64, on the CPU.

    Returns:
        Whether the optimizer goes on. Others than PyTorch's and DeepSpeed's begin anew, since moments of the same names
        may be of weights or of normalized gradients; in ZeRO's partitions, with all of their parameters.

    """
    is_partitioned = in_deepspeed(factor)
    states = [*optimizer.state.values()] if is_partitioned else [optimizer.state.get(factor, {})]
    tensors = [(name, value) for state in states for name, value in state.items() if isinstance(value, Tensor)]
    moments = dict.fromkeys(name for name, value in tensors if value.numel() > 1)  # in this order on every process
    is_known = type(optimizer) in _CARRIED or is_deepspeed(optimizer)
    if not (is_known and moments.keys() <= _POWERS.keys()):
        for name, value in tensors if is_partitioned else ():
            if not name.startswith("qmap"):  # of bitsandbytes, no state but the values of its 8 bits
                value.zero_()
        for state in states if is_partitioned else ():
            state.update({name: 0 for name, value in state.items() if isinstance(value, int)})
        optimizer.state.pop(factor, None)
        return False
    for name in moments:
        moment = full_state(optimizer, factor, name).cpu().double()
        moved = torch.tensordot(change ** _POWERS[name], moment, ([1], [dim])).movedim(0, dim)
        write_state(optimizer, factor, name, moved)
    return True
