"""LoRA on parameters that hold the matrices of several experts, which PEFT adapts by name (`target_parameters`).

For E experts, A is (E·r, inputs) and B (outputs, r·E): of expert e, A_e has rows e·r to (e + 1)·r, and B_e each E-th
column from e. So ΔW_e = s·B_e A_e. A file names them by the position of their wrapper, and tells neither E nor the
parameter: both come from the base model's configuration.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ..lora.factors import Layout, Stack
from ..lora.host import tuner_layers
from ..naming import PEFT_PREFIX
from ..ops.form import at_least_float32
from .full_model import model_on_meta
from .peft_folder import SavedAdapter
from .update import Pair, Update

_FACTOR = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.lora_A\.weight$")


def stack_of_layer(path: str, layer: Any) -> Stack:
    """The parameter that a wrapper adapts, from the wrapper's path."""
    # Wrappers of several parameters of one module are nested.
    return Stack(f"{path.replace('.base_layer', '')}.{layer.parameter_name}", path, layer.num_experts)


def stacks_of_adapter(saved: SavedAdapter, base: str | None) -> dict[Stack, tuple[int, int]]:
    """Parameters that a saved LoRA adapts, with the outputs and inputs of a matrix; no weights are loaded.

    Raises:
        ValueError: no base model is named, or transformers knows none that has the parameters in these places.

    """
    names = ", ".join(saved.config.target_parameters)
    needed = f"{saved.name} adapts parameters ({names}), of which only the base model's configuration tells the experts"
    name = saved.base_model if base is None or Path(base).is_file() else base  # a file has no configuration
    if not name:
        raise ValueError(f"{needed}, and it names no base model. Pass it (base=, --base).")
    stored = {match[1] for key in saved.weights if (match := _FACTOR.match(key))}
    # As it was loaded, whose class is not stored: a model of several inputs has other paths without them.
    for task_type in (saved.config.task_type, "", None):
        model = model_on_meta(name, task_type)
        stacks = {} if model is None else _wrap(model, saved)
        modules = {stack.module for stack in stacks}
        if modules and {module for module in stored if module.endswith(".base_layer")} <= modules <= stored:
            return stacks
    raise ValueError(
        f"{needed}, and no model of {name} that transformers knows has them where the file does. Pass "
        "another base model (base=, --base), or load the adapter on it and call `rank_report(model)`."
    )


def _wrap(model: PreTrainedModel, saved: SavedAdapter) -> dict[Stack, tuple[int, int]]:
    """Parameters of a model that the adapter's configuration matches; none if it lacks one of them."""
    config = copy.copy(saved.config)
    config.target_modules, config.rank_pattern, config.alpha_pattern = [], {}, {}
    config.task_type = config.base_model_name_or_path = None
    config.modules_to_save = config.trainable_token_indices = None
    try:
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError:  # no parameter matches
        return {}
    layers = [(path, layer) for path, layer in tuner_layers(wrapped) if hasattr(layer, "parameter_name")]
    stacks = {stack_of_layer(path, layer): (layer.out_features, layer.in_features) for path, layer in layers}
    paths = [f".{stack.parameter}" for stack in stacks]
    has_all = all(any(path.endswith(f".{name}") for path in paths) for name in saved.config.target_parameters)
    return stacks if has_all else {}


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
