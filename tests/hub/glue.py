"""GLUE: columns, splits and labels as on the hub, and labels that can be learned from the words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from .words import ANIMALS, BAD, GOOD, PLACES, VERBS, Writer, paraphrase

Row = dict[str, Any]
TRAIN, OTHER = 64, 32
_NLI = ("entailment", "neutral", "contradiction")
_TWO = ("entailment", "not_entailment")


def _cola(writer: Writer, label: int) -> Row:
    words = writer.sentence().rstrip(".").split()
    if not label:
        writer.shuffle(words)
    return {"sentence": " ".join(words) + "."}


def _sst2(writer: Writer, label: int) -> Row:
    # The set's own sentences are in lower case, with a space at the end.
    return {"sentence": f"a {writer.choice(GOOD if label else BAD)} film of a {writer.choice(ANIMALS)} "}


def _same(first: str, second: str) -> Callable[[Writer, int], Row]:
    def write(writer: Writer, label: int) -> Row:
        sentence = writer.sentence()
        return {first: sentence, second: paraphrase(sentence) if label else writer.sentence()}

    return write


def _stsb(writer: Writer, label: float) -> Row:
    words = writer.sentence().split()
    others = writer.sentence().split()
    kept = round(label / 5 * len(words))
    return {"sentence1": " ".join(words), "sentence2": " ".join(words[:kept] + others[kept:])}


def _nli(first: str, second: str) -> Callable[[Writer, int], Row]:
    def write(writer: Writer, label: int) -> Row:
        subject, place = writer.subject(), writer.place()
        said = (f"{subject} is {place}", f"{subject} {writer.action()}", f"{subject} is not {place}")[label]
        return {first: f"{subject} is {place} and it {writer.choice(VERBS)} the ball.", second: f"{said}."}

    return write


def _qnli(writer: Writer, label: int) -> Row:
    asked = writer.choice(ANIMALS)
    told = asked if label == 0 else writer.others(ANIMALS, asked, 1)[0]
    return {"question": f"Where is the {asked}?", "sentence": f"The {told} is in the {writer.choice(PLACES)}."}


def _rte(writer: Writer, label: int) -> Row:
    return _nli("sentence1", "sentence2")(writer, 2 * label)


_PAIR = ("sentence1", "sentence2")
_THREE = ("train", "validation", "test")
_BOTH = ("matched", "mismatched")
_MNLI = ("train", *(f"{split}_{match}" for split in ("validation", "test") for match in _BOTH))
_TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], Callable[[Writer, Any], Row]]] = {
    # columns, names of the labels, splits, and what writes an example
    "ax": (("premise", "hypothesis"), _NLI, ("test",), _nli("premise", "hypothesis")),
    "cola": (("sentence",), ("unacceptable", "acceptable"), _THREE, _cola),
    "mnli": (("premise", "hypothesis"), _NLI, _MNLI, _nli("premise", "hypothesis")),
    "mrpc": (_PAIR, ("not_equivalent", "equivalent"), _THREE, _same("sentence1", "sentence2")),
    "qnli": (("question", "sentence"), _TWO, _THREE, _qnli),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), _THREE, _same("question1", "question2")),
    "rte": (_PAIR, _TWO, _THREE, _rte),
    "sst2": (("sentence",), ("negative", "positive"), _THREE, _sst2),
    "stsb": (_PAIR, (), _THREE, _stsb),
    "wnli": (_PAIR, ("not_entailment", "entailment"), _THREE, lambda writer, label: _rte(writer, 1 - label)),
}


def glue() -> dict[str, DatasetDict]:
    """The configurations of `nyu-mll/glue`."""
    made = {name: DatasetDict({split: _split(name, split) for split in task[2]}) for name, task in _TASKS.items()}
    for match in _BOTH:  # parts of MNLI under names of their own
        parts = {split: made["mnli"][f"{split}_{match}"] for split in ("validation", "test")}
        made[f"mnli_{match}"] = DatasetDict(parts)
    return dict(sorted(made.items()))


def _split(task: str, split: str) -> Dataset:
    columns, names, _, write = _TASKS[task]
    writer = Writer(f"{task} {split}")
    # The labels of the test sets are secret, but for MRPC's, which was published with them.
    hidden = split.startswith("test") and task != "mrpc"
    rows = []
    for index in range(TRAIN if split == "train" else OTHER):
        label = writer.randrange(len(names)) if names else round(writer.uniform(0, 5), 2)
        rows.append({**write(writer, label), "label": -1 if hidden else label, "idx": index})
    types = {column: Value("string") for column in columns}
    label_type = ClassLabel(names=list(names)) if names else Value("float32")
    return Dataset.from_list(rows, Features({**types, "label": label_type, "idx": Value("int32")}))
