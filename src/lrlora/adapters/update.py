"""`Update`: ΔW of one module, whatever it is made of; `Updates`: those of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops import at_least_float32
from ..ops.transfer import Transfer

Factors = tuple[Tensor, Tensor]

MAGNITUDES_NOTE = (
    "DoRA: the ranks are those of s·BA, its update of the direction. The trained magnitude of each output, which "
    "rescales the row of W0 + s·BA, is not in them."
)


class Layout(NamedTuple):
    """What the matrix ΔW (m, n) is in its module.

    Attributes:
        kernel: of a convolution: n holds the inputs and its sizes; empty for other layers.
        is_embedding: m counts tokens and n the width.
        is_known: whether a file can tell; else the module may be a linear layer, a convolution or an embedding.

    """

    kernel: tuple[int, ...] = ()
    is_embedding: bool = False
    is_known: bool = True


PLAIN = Layout()


class Learned(NamedTuple):
    """What of an LR-LoRA update a report shows besides ΔW.

    Attributes:
        linear: s·B and A, of what plain LoRA would make of the same factors.
        phi: φ; None for an expansion.
        transfer_input: the entries that φ acts on.

    """

    linear: Callable[[], Factors]
    phi: Transfer | None
    transfer_input: Callable[[], Tensor]


@dataclass(frozen=True)
class Update:
    """ΔW of one module: read, or formed, when it is asked for.

    Attributes:
        module: its path in the base model, or its name in the file.
        shape: (m, n), outputs and inputs.
        form: gives ΔW (m, n), or its factors U (m, k) and V (k, n) with ΔW = U V.
        is_product: whether `form` gives factors.
        r: rank that it was trained with; None where the method has none.
        limit: the largest rank that an update of this form can have.
        scaling: s that it was trained with, which `form` has applied.
        layout: what the matrix is in the module.
        weight: gives W0 (m, n); None where it is not at hand.
        learned: of LR-LoRA alone.

    """

    module: str
    shape: tuple[int, int]
    form: Callable[[], Tensor | Factors]
    is_product: bool
    r: int | None
    limit: int
    scaling: float = 1.0
    layout: Layout = PLAIN
    weight: Callable[[], Tensor | None] = lambda: None
    learned: Learned | None = None

    def factors(self) -> Factors | None:
        """U (m, k) and V (k, n), of any dtype and finite; None where ΔW is no product of thin factors."""
        if not self.is_product:
            return None
        U, V = self.form()
        require_finite(self.module, U, V)
        return U, V

    def matrix(self) -> Tensor:
        """ΔW (m, n), finite, at least float32."""
        formed = self.form()
        if isinstance(formed, tuple):
            U, V = map(at_least_float32, formed)
            formed = U @ V
        require_finite(self.module, formed)
        return formed

    def weight_norm(self) -> float | None:
        """‖W0‖_F; None where W0 is zero or not at hand."""
        weight = self.weight()
        norm = 0.0 if weight is None else weight.double().norm().item()
        return norm if norm > 0 else None


class Source(Protocol):
    """What updates are read from: a PEFT folder, a LoRA in a single file, or two checkpoints."""

    @property
    def name(self) -> str:
        """Folder, file, or name on the hub."""

    @property
    def config(self) -> Any:
        """The PEFT configuration that an adapter made of it takes its base model, task and heads from.

        Raises:
            ValueError: it is a single file, which has none.

        """

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the factors, or the fine-tuned checkpoint; bfloat16 for 8 bits."""

    @property
    def parameters(self) -> int | None:
        """Trained for the updates, without heads and biases; None where there is no adapter."""

    def other_weights(self, *, with_magnitudes: bool) -> dict[str, Tensor]:
        """All else that was trained, as it is written: heads, biases, embeddings, and DoRA's magnitudes if asked."""


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """That of the first floating-point tensor; bfloat16 for 8 bits."""
    dtype = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)
    return dtype if dtype.itemsize > 1 else torch.bfloat16


@dataclass(frozen=True)
class Updates:
    """The updates of all modules of one adapter, or between two checkpoints.

    Attributes:
        name: where they come from: a folder, a file, or a name on the hub.
        method: of the adapter, as people call it: "LoRA".
        updates: in the order of the model.
        origin: what was read.
        notes: sentences on what the updates do not show.

    """

    name: str
    method: str
    updates: list[Update]
    origin: Source
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


def require_finite(name: str, *parts: Tensor) -> None:
    """Raise a ValueError unless the update of a module, or all factors of it, are finite."""
    if not all(torch.isfinite(part).all() for part in parts):
        raise ValueError(
            f"The update of {name} holds NaN or infinite values. Training has diverged: go back to an earlier "
            "checkpoint."
        )
