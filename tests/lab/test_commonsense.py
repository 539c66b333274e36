"""The sets of the hub, on examples with their features; the sets themselves are not fetched."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lrlora_lab.commonsense import COMMONSENSE, as_choices

from ..train.small import WORDS

ARC = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}
# The columns of each set, and what is read before the right choice, and the choice, as in lm-evaluation-harness.
EXAMPLES: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    (
        "boolq",
        {"question": "is ice cold", "passage": "Ice is cold.", "answer": True},
        ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", "yes"),
    ),
    (
        "boolq",
        {"question": "is ice warm", "passage": "Ice is cold.", "answer": False},
        ("Ice is cold.\nQuestion: is ice warm?\nAnswer:", "no"),
    ),
    (
        "piqa",
        {"goal": "Boil it", "sol1": "heat", "sol2": "freeze", "label": 0},
        ("Question: Boil it\nAnswer:", "heat"),
    ),
    (
        "piqa",
        {"goal": "Freeze it", "sol1": "put it above a flame", "sol2": "ice", "label": 1},
        ("Question: Freeze it\nAnswer:", "ice"),
    ),
    (
        "social-iqa",
        {"context": "Kim ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        ("Q: Kim ran. Why?\nA:", "c"),
    ),
    (
        "social-iqa",
        {"context": "Kim won.", "question": "How?", "answerA": "ran", "answerB": "b", "answerC": "c", "label": "1"},
        ("Q: Kim won. How?\nA:", "ran"),
    ),
    (
        "hellaswag",
        {
            "activity_label": "Ski",
            "ctx_a": "[header] He stands [title] Wax.",
            "ctx_b": "he",
            "endings": ["a", " [step] b  c", "d", "e"],
            "label": "1",
        },
        ("Ski: He stands. Wax. He", " b c"),
    ),
    (
        "hellaswag",
        {
            "activity_label": "How to ski",
            "ctx_a": "[header] How to ski [step]",
            "ctx_b": "",
            "endings": ["Wax.", "b", "c", "Go down the hill. [substeps] Turn."],
            "label": "3",
        },
        ("How to ski: How to ski ", "Go down the hill. Turn."),
    ),
    (
        "winogrande",
        {"sentence": "Al hit Bo as _ was mad.", "option1": "Al", "option2": "Bo", "answer": "1"},
        ("Al hit Bo as Al", "was mad."),
    ),
    (
        "winogrande",
        {"sentence": "_ was mad, and Al saw it.", "option1": "Al", "option2": "Bo", "answer": "2"},
        ("Bo", "was mad, and Al saw it."),
    ),
    ("arc-easy", {"question": "Q?", "choices": ARC, "answerKey": "D"}, ("Question: Q?\nAnswer:", "d")),
    (
        "arc-easy",
        {"question": "Where?", "choices": {"text": ["x", "the sea"], "label": ["1", "2"]}, "answerKey": "1"},
        ("Question: Where?\nAnswer:", "x"),
    ),
    (
        "arc-easy",
        {"question": "Five?", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
        ("Question: Five?\nAnswer:", "z"),
    ),
    (
        "arc-challenge",
        {"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        ("Question: Q?\nAnswer:", "y"),
    ),
    ("openbookqa", {"question_stem": "Q", "choices": ARC, "answerKey": " B"}, ("Q", "b")),
    ("openbookqa", {"question_stem": "Ice is", "choices": ARC, "answerKey": "A"}, ("Ice is", "a")),
]


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_examples_become_questions_with_choices(name: str, row: dict[str, Any], expected: tuple[str, str]) -> None:
    (example,) = as_choices(Dataset.from_list([row]), COMMONSENSE[name])
    assert example["prompts"][example["label"]] == expected[0]
    assert example["choices"][example["label"]] == expected[1]
    assert len(example["choices"]) == len(example["prompts"])


def test_every_set_is_covered() -> None:
    assert list(dict.fromkeys(name for name, *_ in EXAMPLES)) == list(COMMONSENSE)


# Their main branch is a script, which `datasets` no longer runs.
SCRIPTS = ("ybisk/piqa", "allenai/social_i_qa")
# lm-evaluation-harness reads copies of those two.
ON_THE_HUB = {("baber/piqa", None): "piqa", ("lighteval/siqa", None): "social-iqa"}
ON_THE_HUB |= {(known.repository, known.configuration): name for name, known in COMMONSENSE.items()}


def load_dataset(path: str, name: str | None = None, revision: str | None = None) -> DatasetDict:
    """In place of that of `datasets`: the splits with labels, of 32 rows each, made from the examples."""
    if path in SCRIPTS and revision is None:
        raise RuntimeError("Dataset scripts are no longer supported")
    known = ON_THE_HUB[path, name]
    examples = [row for each, row, _ in EXAMPLES if each == known]
    splits = ("train", "validation", "test") if "answerKey" in examples[0] else ("train", "validation")
    chance = Random(known)
    rows = {split: [varied(examples[i % len(examples)], chance) for i in range(32)] for split in splits}
    return DatasetDict({split: Dataset.from_list(rows[split]) for split in splits})


def varied(value: Any, chance: Random) -> Any:
    """An example with another second word in each of its texts."""
    if isinstance(value, dict):
        labels = ("label", "answer", "answerKey")
        return {key: each if key in labels else varied(each, chance) for key, each in value.items()}
    if isinstance(value, list):
        return [varied(each, chance) for each in value]
    return re.sub(r"(?<=\S)(?=\s|$)", f" {chance.choice(WORDS)}", value, count=1)
