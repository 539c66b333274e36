"""Data sets of the field, on rows with their columns; from the hub nothing is fetched."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lrlora_lab.hub_data import COMMONSENSE, FOLDER, SOURCES, as_examples, load_hub_data

from ..train.small import WORDS

ARC = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}
# The columns of each set, and what is read before the right choice, and the choice, as in lm-evaluation-harness.
EXAMPLES: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    (
        "boolq",
        {"question": "is ice cold", "passage": "Ice is cold.", "answer": True},
        ("Question: is ice cold?\nAnswer:", "yes"),
    ),
    (
        "boolq",
        {"question": "is ice warm", "passage": "Ice is cold.", "answer": False},
        ("Question: is ice warm?\nAnswer:", "no"),
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
    (example,) = as_examples(Dataset.from_list([row]), COMMONSENSE[name])
    assert example["prompts"][example["label"]] == expected[0]
    assert example["choices"][example["label"]] == expected[1]
    assert len(example["choices"]) == len(example["prompts"])


def test_every_set_is_covered() -> None:
    assert list(dict.fromkeys(name for name, *_ in EXAMPLES)) == list(COMMONSENSE)


def filled(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A folder of data with one file more, and its hash."""
    path = folder / f"{name}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}.jsonl.gz\n")
    return path


RTE = [
    {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    {"sentence1": "a", "sentence2": "b", "label": 1},
]
QUESTIONS = [{"question": "Ice is", "choices": ["warm", "cold"], "answer": 1}]


def test_a_folder_takes_the_place_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    filled(tmp_path, "glue/rte_train", RTE)
    filled(tmp_path, "glue/rte_validation", RTE[:1])
    filled(tmp_path, "glue/stsb_train", [{**RTE[0], "label": 3.8}])
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        filled(tmp_path, f"commonsense/{name}_train", QUESTIONS)
    rte = load_hub_data("glue:rte")
    assert rte["train"][:] == {key: [row[key] for row in RTE] for key in RTE[0]}
    assert rte["test"].features["label"].names == ["entailment", "not_entailment"]
    assert rte["test"].num_rows == 1
    assert load_hub_data("glue:stsb")["train"]["label"][:] == [pytest.approx(3.8)]
    mixture = load_hub_data("commonsense:science")["train"]
    assert mixture["prompts"][:] == [["Question: Ice is\nAnswer:"] * 2] * 2 + [["Ice is"] * 2]
    assert mixture["label"][:] == [1, 1, 1]


@pytest.mark.refused
def test_a_file_that_is_not_the_named_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    path = filled(tmp_path, "glue/rte_train", RTE)
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=r"rte_train\.jsonl\.gz .*SHA256SUMS"):
        load_hub_data("glue:rte")


@pytest.mark.refused
def test_neither_hub_nor_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"glue:rte .*nyu-mll/glue.*LRLORA_DATA.*glue/rte_train\.jsonl\.gz"):
        load_hub_data("glue:rte")


@pytest.mark.refused
def test_a_name_that_is_nearly_one() -> None:
    with pytest.raises(ValueError, match=r"glue:rtt.*glue:rte"):
        load_hub_data("glue:rtt")


@pytest.mark.real
@pytest.mark.skipif(FOLDER not in os.environ, reason=f"needs {FOLDER}, a folder with the data sets")
@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.file])
def test_the_real_sets(name: str) -> None:
    splits = load_hub_data(name)
    assert splits["test"].num_rows > 250
    for split in splits.values():
        labels = split.to_pandas()["label"]
        assert labels.nunique() > 1
        assert labels.value_counts(normalize=True).max() < 0.75


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
