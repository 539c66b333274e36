"""The tasks on their real data."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from datasets import Dataset, load_from_disk

from lrlora.train.embedded import EMBEDDED_DATA, _near_duplicates
from lrlora_lab.inputs import DATA, located

LOADERS = {**{name: data.load for name, data in EMBEDDED_DATA.items()}, **DATA}

pytestmark = pytest.mark.real

SIZES = {"movie-reviews": 12_500, "20-newsgroups": 18_000, "r8": 7_600}


@pytest.mark.integration
@pytest.mark.parametrize("name", SIZES)
def test_splits_share_no_group_and_hold_every_label(name: str) -> None:
    data = LOADERS[name]()
    train, test = data["train"].to_pandas(), data["test"].to_pandas()
    assert len(train) + len(test) > SIZES[name]
    assert set(train["label"]) == set(test["label"]) == set(range(data["train"].features["label"].num_classes))
    assert not train.isna().any().any()
    assert set(train["group"]).isdisjoint(test["group"])
    assert set(train["text"]).isdisjoint(test["text"])


def test_near_duplicates_are_found() -> None:
    words = [f"word{i}" for i in range(100)]
    test = pd.Series([" ".join(words), "a short text", "quite another text that has eight words or more"])
    train = pd.Series(
        [
            " ".join(words[:91]),
            " ".join(words[:89]),
            "a short text",  # too short to tell anything
            " ".join(words[:95] + [f"new{i}" for i in range(5)]),  # 95 of 105
            " ".join(words[:95] + [f"new{i}" for i in range(15)]),  # 95 of 115
            "Quite another text, that has eight words or more!",
        ]
    )
    assert _near_duplicates(train, test).tolist() == [True, False, False, True, False, True]


@pytest.mark.parametrize(
    "name",
    [
        *("movie-reviews", "ratings", "r8"),
        pytest.param("20-newsgroups", marks=pytest.mark.slow),
    ],
)
def test_no_test_text_is_nearly_in_training(name: str) -> None:
    # At most a tenth of a text's words are missing in its near-duplicate, so that holds one of any more of them: only
    # the texts with one of its rarest words need to be compared.
    def words(text: str) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", text.lower()))

    def texts(split: Dataset) -> list[frozenset[str]]:
        columns = [name for name in ("text", "text_pair") if name in split.column_names]
        return [words(" ".join(parts)) for parts in zip(*(split[name] for name in columns), strict=True)]

    data = LOADERS[name]()
    train = texts(data["train"])
    holders: dict[str, list[int]] = {}
    for index, text in enumerate(train):
        for word in text:
            holders.setdefault(word, []).append(index)
    for text in texts(data["test"]):
        if len(text) < 8:
            continue
        rarest = sorted(text, key=lambda word: len(holders.get(word, ())))[: len(text) // 10 + 1]
        candidates = {index for word in rarest for index in holders.get(word, ())}
        assert not [i for i in candidates if 10 * len(text & train[i]) >= 9 * len(text | train[i])]


def test_a_suite_reads_its_inputs_from_folders() -> None:
    data = load_from_disk(located("embedded:ratings"))
    assert data["train"].column_names == ["text", "label", "group"]
    assert located("embedded:ratings") == located("embedded:ratings")
    assert located("mine.csv") == "mine.csv"
