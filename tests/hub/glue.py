"""Two tasks of GLUE, with columns, splits and labels as on the hub, and labels that can be learned from the words."""

from __future__ import annotations

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from .words import ANIMALS, BAD, GOOD, VERBS, Writer

TRAIN, OTHER = 64, 32
_TASKS = {
    "sst2": (("sentence",), ("negative", "positive")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
}


def glue() -> dict[str, DatasetDict]:
    """The configurations of `nyu-mll/glue`."""
    return {
        name: DatasetDict({split: _split(name, split) for split in ("train", "validation", "test")}) for name in _TASKS
    }


def _sentences(task: str, writer: Writer, label: int) -> tuple[str, ...]:
    if task == "sst2":
        # The set's own sentences are in lower case, with a space at the end.
        return (f"a {writer.choice(GOOD if label else BAD)} film of a {writer.choice(ANIMALS)} ",)
    subject, place = writer.subject(), writer.place()
    said = f"{subject} is not {place}" if label else f"{subject} is {place}"
    return f"{subject} is {place} and it {writer.choice(VERBS)} the ball.", f"{said}."


def _split(task: str, split: str) -> Dataset:
    columns, names = _TASKS[task]
    writer = Writer(f"{task} {split}")
    rows = []
    for index in range(TRAIN if split == "train" else OTHER):
        label = writer.randrange(2)
        sentences = dict(zip(columns, _sentences(task, writer, label), strict=True))
        # The labels of the test sets are secret.
        rows.append({**sentences, "label": -1 if split == "test" else label, "idx": index})
    types = {column: Value("string") for column in columns}
    return Dataset.from_list(rows, Features({**types, "label": ClassLabel(names=list(names)), "idx": Value("int32")}))
