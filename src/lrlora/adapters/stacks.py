"""LoRA on parameters that hold the matrices of several experts, which PEFT adapts by name (`target_parameters`).

For E experts, A is (E·r, inputs) and B (outputs, r·E): of expert e, A_e has rows e·r to (e + 1)·r, and B_e each E-th
column from e. So ΔW_e = s·B_e A_e. A file names them by the position of their wrapper, and tells neither E nor the
parameter: both come from the base model's configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from peft import get_peft_model
from torch import Tensor

from ..lora.factors import Layout, Stack
from ..lora.host import tuner_layers
from ..ops.form import at_least_float32
from .full_model import model_on_meta
from .peft_folder import SavedAdapter
from .update import Pair, Update


def stack_of_layer(path: str, layer: Any) -> Stack:
    """The parameter that a wrapper adapts, from the wrapper's path."""
    # Wrappers of several parameters of one module are nested.
    return Stack(f"{path.replace('.base_layer', '')}.{layer.parameter_name}", path, layer.num_experts)


def stacks_of_adapter(saved: SavedAdapter, base: str | None) -> dict[Stack, tuple[int, int]]:
    """Parameters that a saved LoRA adapts, with the outputs and inputs of a matrix; no weights are loaded.

    Raises:
        ValueError: the base model's configuration is missing or unknown to transformers, or has none of the parameters.

    """
    names = ", ".join(saved.config.target_parameters)
    needed = f"{saved.name} adapts parameters ({names}), of which only the base model's configuration tells the experts"
    name = base or saved.base_model
    if not name:
        raise ValueError(f"{needed}, and it names no base model. Pass it (base=, --base).")
    model = model_on_meta(name)
    if model is None:
        raise ValueError(f"{needed}, and {name} has none that transformers knows. Pass another path (base=, --base).")
    config = copy.copy(saved.config)
    config.target_modules, config.modules_to_save, config.trainable_token_indices = [], None, None
    config.rank_pattern, config.alpha_pattern = {}, {}  # PEFT would miss the modules in them
    try:
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(f"{saved.name} does not fit its base model {name}: {error}") from None
    layers = [(path, layer) for path, layer in tuner_layers(wrapped) if hasattr(layer, "parameter_name")]
    return {stack_of_layer(path, layer): (layer.out_features, layer.in_features) for path, layer in layers}


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


def require_shapes(stack: Stack, A: Tensor, B: Tensor, r: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless stored factors fit a parameter, whose matrices have this shape (m, n)."""
    (m, n), stacked = shape, stack.experts * r
    if (tuple(A.shape), tuple(B.shape)) == ((stacked, n), (m, stacked)):
        return
    message = (
        f"{stack.parameter} has {stack.experts} matrices of {m} × {n}, so that r = {r} needs A of {stacked} × {n} and "
        f"B of {m} × {stacked}, but the file has {' × '.join(map(str, A.shape))} and {' × '.join(map(str, B.shape))}."
    )
    if (A.shape[1], len(B)) == (m, n):
        message += " Inputs and outputs are exchanged, as PEFT up to 0.18 wrote them."
    raise ValueError(message)
