"""The sets of the hub, on examples with their features; the sets themselves are not fetched."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from lrlora_lab.commonsense import COMMONSENSE, as_choices

ARC = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}
# The columns of each set, and what is read before the right choice, and the choice, as in lm-evaluation-harness.
EXAMPLES: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    (
        "boolq",
        {"question": "is ice cold", "passage": "Ice is cold.", "answer": True},
        ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", "yes"),
    ),
    (
        "piqa",
        {"goal": "Boil it", "sol1": "heat", "sol2": "freeze", "label": 0},
        ("Question: Boil it\nAnswer:", "heat"),
    ),
    (
        "social-iqa",
        {"context": "Kim ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        ("Q: Kim ran. Why?\nA:", "c"),
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
        "winogrande",
        {"sentence": "Al hit Bo as _ was mad.", "option1": "Al", "option2": "Bo", "answer": "1"},
        ("Al hit Bo as Al", "was mad."),
    ),
    ("arc-easy", {"question": "Q?", "choices": ARC, "answerKey": "D"}, ("Question: Q?\nAnswer:", "d")),
    (
        "arc-challenge",
        {"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        ("Question: Q?\nAnswer:", "y"),
    ),
    ("openbookqa", {"question_stem": "Q", "choices": ARC, "answerKey": " B"}, ("Q", "b")),
]


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_examples_become_questions_with_choices(name: str, row: dict[str, Any], expected: tuple[str, str]) -> None:
    (example,) = as_choices(Dataset.from_list([row]), COMMONSENSE[name])
    assert example["prompts"][example["label"]] == expected[0]
    assert example["choices"][example["label"]] == expected[1]
    assert len(example["choices"]) == len(example["prompts"])


def test_every_set_is_covered() -> None:
    assert [name for name, *_ in EXAMPLES] == list(COMMONSENSE)
