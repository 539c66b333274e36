"""Record of what φ is worth: the loss of an LR-LoRA whose φ is replaced by its best line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .files import read_json

STRAIGHTENED_FILE = "straightened.json"


@dataclass(frozen=True)
class Straightened:
    """An LR-LoRA with a line in place of φ, which is a LoRA of the same factors.

    Attributes:
        r: rank of BA.
        bent: share of ‖ΔW‖²_F, all modules together, that no multiple of BA explains.
        beyond: share of ‖ΔW‖²_F beyond the r leading singular values of each module.
        loss, straight: mean loss on held-out data, with φ and with the line.
        low, high: 5 % and 95 % quantiles of the bootstrap of the difference.
        units: number of held-out examples.

    """

    r: int
    bent: float
    beyond: float
    loss: float
    straight: float
    low: float
    high: float
    units: int

    def __str__(self) -> str:
        shape = (
            f"φ: {self.bent:.2g} of the update's energy is no multiple of BA, and {self.beyond:.2g} lies beyond r = "
            f"{self.r}."
        )
        cost = (
            f"With φ replaced by its best line, the loss on {self.units} held-out examples is {self.straight:.4g} "
            f"instead of {self.loss:.4g}: {self.straight - self.loss:+.2g} ({self.low:+.2g} to {self.high:+.2g})."
        )
        advice = (
            "A line costs nothing that they could show: LoRA may do."
            if self.low <= 0
            else "A LoRA may learn part of it: compare with --method lora."
        )
        return f"{shape} {cost} {advice}"


def read_straightened(folder: Path) -> Straightened | None:
    """Record in a run's folder; None without one.

    Raises:
        ValueError: the file is damaged.

    """
    path = folder / STRAIGHTENED_FILE
    if not path.exists():
        return None
    record: Straightened = read_json(path, Straightened, "Remove it to continue without the record of φ.")
    return record
