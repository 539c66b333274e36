"""Record of a classifier's scores by class, and of which classes it takes for which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from .files import read_json

CLASSES_FILE = "classes.json"


class Scores(TypedDict):
    """Scores of a class: 0 where they are undefined, and its number of examples."""

    precision: float
    recall: float
    f1: float
    support: int


class Confusion(NamedTuple):
    """Examples of a class that were taken for another one, and their share of the class."""

    label: str
    answer: str
    examples: int
    share: float

    def __str__(self) -> str:
        return f"{self.label!r} taken for {self.answer!r}: {self.examples:,} ({self.share:.0%})"


@dataclass(frozen=True)
class ByClass:
    """Scores by class, and the confusion matrix.

    Attributes:
        classes: class → its scores.
        confusion: class → predicted class → number of examples, without zeros.

    """

    classes: dict[str, Scores]
    confusion: dict[str, dict[str, int]]

    @property
    def worst(self) -> list[str]:
        """Classes with examples, by F1, the lowest first; of equal ones, the larger first."""
        names = [name for name, scores in self.classes.items() if scores["support"]]
        return sorted(names, key=lambda name: (self.classes[name]["f1"], -self.classes[name]["support"]))

    @property
    def confused(self) -> list[Confusion]:
        """Pairs of different classes that were confused, the most frequent first."""
        pairs = [
            Confusion(label, answer, count, count / self.classes[label]["support"])
            for label, row in self.confusion.items()
            for answer, count in row.items()
            if answer != label
        ]
        return sorted(pairs, key=lambda pair: (-pair.examples, -pair.share))


def read_by_class(folder: Path) -> ByClass | None:
    """Record in the folder of a run; None without one.

    Raises:
        ValueError: the file is damaged.

    """
    path = folder / CLASSES_FILE
    if not path.exists():
        return None
    record: ByClass = read_json(path, ByClass, "Remove it to continue without the scores by class.")
    return record
