"""`Update`: ΔW of one module, of any method; `Updates`: those of one adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..lora.factors import Layout, require_finite
from ..ops.form import at_least_float32
from ..ops.transfer import Transfer

Pair = tuple[Tensor, Tensor]

MAGNITUDES_NOTE = (
    "DoRA: the ranks are those of s·BA, the update of the direction. They do not include the trained magnitude of "
    "each output, which rescales a row of W0 + s·BA."
)


class Learned(NamedTuple):
    """LR-LoRA data for reports, besides ΔW.

    Attributes:
        linear: s·B and A, the plain-LoRA update of the same factors.
        phi: φ; None for an expansion.
        transfer_input: inputs of φ.

    """

    linear: Callable[[], Pair]
    phi: Transfer | None
    transfer_input: Callable[[], Tensor]


@dataclass(frozen=True)
class Update:
    """ΔW of one module, read or computed lazily.

    Attributes:
        module: path in the base model, or name in the file.
        shape: (m, n), outputs and inputs.
        compute: returns ΔW (m, n), or its factors U (m, k) and V (k, n) with ΔW = U V.
        is_product: whether `compute` returns factors.
        r: trained rank; None if the method has none.
        limit: maximum rank of an update of this form.
        scaling: s used in training, already applied by `compute`.
        layout: meaning of the matrix in the module.
        weight: returns W0 (m, n), or None if unavailable.
        learned: only for LR-LoRA.

    """

    module: str
    shape: tuple[int, int]
    compute: Callable[[], Tensor | Pair]
    is_product: bool
    r: int | None
    limit: int
    scaling: float
    layout: Layout
    weight: Callable[[], Tensor | None] = lambda: None
    learned: Learned | None = None

    @property
    def expert(self) -> int | None:
        """Index among the experts of one parameter, which ends `module`; None elsewhere."""
        stack = self.layout.stack
        return None if stack is None or stack.experts == 1 else int(self.module.rpartition(".")[2])

    def factors(self) -> Pair | None:
        """U (m, k) and V (k, n), of any dtype and finite; None if ΔW is not a product of thin factors."""
        if not self.is_product:
            return None
        U, V = self.compute()
        require_finite(self.module, U, V)
        return U, V

    def matrix(self) -> Tensor:
        """ΔW (m, n), finite, at least float32."""
        delta = self.compute()
        if isinstance(delta, tuple):
            U, V = map(at_least_float32, delta)
            delta = U @ V
        require_finite(self.module, delta)
        return delta

    def weight_norm(self) -> float | None:
        """‖W0‖_F; None if W0 is zero or unavailable."""
        weight = self.weight()
        norm = 0.0 if weight is None else weight.double().norm().item()
        return norm if norm > 0 else None


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The widest floating-point dtype of matrices, or of all tensors if none is a matrix; bfloat16 for 8 bits."""
    floats = [tensor for tensor in tensors if tensor.dtype.is_floating_point]
    matrices = [tensor for tensor in floats if tensor.dim() > 1] or floats
    dtypes = {tensor.dtype if tensor.dtype.itemsize > 1 else torch.bfloat16 for tensor in matrices}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def as_stored(module: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in the dtype of its file, contiguous.

    Raises:
        ValueError: a value is outside of the range of the dtype.

    """
    cast = matrix.to(dtype).contiguous()
    if matrix.isfinite().all() and not cast.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"A factor of {module} exceeds the range of {name}. Use --dtype bfloat16 or float32.")
    return cast


class Origin(Protocol):
    """Source of updates, as far as an export needs it."""

    @property
    def name(self) -> str:
        """Folder, file, or hub name."""

    @property
    def config(self) -> Any:
        """PEFT configuration: base model, task, and fully trained parts."""

    @property
    def parameters(self) -> int | None:
        """Parameters trained for the updates; None if these are not counted."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the factors, or of the weights."""

    def other_weights(self, *, with_magnitudes: bool) -> dict[str, Tensor]:
        """Trained weights besides the updates, by file key; `with_magnitudes` includes those of DoRA."""


@dataclass(frozen=True)
class Updates:
    """Updates of all modules of one adapter, or between two checkpoints.

    Attributes:
        name: origin: a folder, a file, or a hub name.
        method: common name of the method: "LoRA".
        updates: updates in model order.
        origin: source object.
        notes: sentences on what the updates do not show.

    """

    name: str
    method: str
    updates: list[Update]
    origin: Origin
    notes: tuple[str, ...] = ()

    @property
    def are_products(self) -> bool:
        """Whether all are products of thin factors."""
        return all(update.is_product for update in self.updates)

    @property
    def have_magnitudes(self) -> bool:
        """Whether these are the directions of DoRA, whose magnitudes are written beside them."""
        return MAGNITUDES_NOTE in self.notes

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)
