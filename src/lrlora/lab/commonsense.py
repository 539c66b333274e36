"""The eight commonsense sets of the hub, as questions with choices: `commonsense:piqa` and its kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

Example = dict[str, Any]


@dataclass(frozen=True)
class ChoiceSet:
    """A set of the hub.

    Args:
        repository, configuration: on the hub.
        convert: gives `question`, `choices` and `label` of one of its examples.
        choices: how many; the few examples with more or fewer are left out.
        test: the split whose labels are public.
        revision: of the repository, where its main one is a script, which `datasets` no longer runs.

    """

    repository: str
    configuration: str | None
    convert: Callable[[Example], Example]
    choices: int
    test: str = "validation"
    revision: str | None = None


def _boolq(row: Example) -> Example:
    return _example(f"{row['passage']}\n{row['question'].capitalize()}?", ["no", "yes"], int(row["answer"]))


def _piqa(row: Example) -> Example:
    return _example(row["goal"], [row["sol1"], row["sol2"]], row["label"])


def _social_iqa(row: Example) -> Example:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return _example(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _hellaswag(row: Example) -> Example:
    return _example(f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))


def _winogrande(row: Example) -> Example:
    before, _, after = row["sentence"].partition("_")
    choices = [f"{row[name]}{after}" for name in ("option1", "option2")]
    return _example(before.strip() or "Who or what is it?", choices, int(row["answer"]) - 1)


def _lettered(question: str) -> Callable[[Example], Example]:
    def convert(row: Example) -> Example:
        choices = row["choices"]
        return _example(row[question], choices["text"], choices["label"].index(row["answerKey"]))

    return convert


def _example(question: str, choices: list[str], label: int) -> Example:
    return {"question": question, "choices": choices, "label": label}


_PARQUET = "refs/convert/parquet"  # made by the hub of what a script would give
COMMONSENSE = {
    "boolq": ChoiceSet("google/boolq", None, _boolq, 2),
    "piqa": ChoiceSet("ybisk/piqa", None, _piqa, 2, revision=_PARQUET),
    "social-iqa": ChoiceSet("allenai/social_i_qa", None, _social_iqa, 3, revision=_PARQUET),
    "hellaswag": ChoiceSet("Rowan/hellaswag", None, _hellaswag, 4),
    "winogrande": ChoiceSet("allenai/winogrande", "winogrande_xl", _winogrande, 2),
    "arc-easy": ChoiceSet("allenai/ai2_arc", "ARC-Easy", _lettered("question"), 4, "test"),
    "arc-challenge": ChoiceSet("allenai/ai2_arc", "ARC-Challenge", _lettered("question"), 4, "test"),
    "openbookqa": ChoiceSet("allenai/openbookqa", "main", _lettered("question_stem"), 4, "test"),
}


def load_commonsense(name: str) -> DatasetDict:
    """`train` and `test` of a set of `COMMONSENSE`, with the columns `question`, `choices` and `label`."""
    known = COMMONSENSE[name]
    splits = load_dataset(known.repository, known.configuration, revision=known.revision)
    return DatasetDict(train=as_choices(splits["train"], known), test=as_choices(splits[known.test], known))


def as_choices(data: Dataset, known: ChoiceSet) -> Dataset:
    """The examples of a split as questions with choices."""
    converted = data.map(known.convert, remove_columns=data.column_names)
    return converted.filter(lambda example: len(example["choices"]) == known.choices)
