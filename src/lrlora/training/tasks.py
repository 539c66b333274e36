"""Text-classification tasks whose data comes with packages: loaded, split and tokenised the same way every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from datasets import Dataset, DatasetDict
from sklearn.model_selection import GroupShuffleSplit
from transformers import PreTrainedTokenizerBase

from .inputs import MOVIE_REVIEWS, NEWSGROUPS_TEST, NEWSGROUPS_TRAIN, R8_TEST, R8_TRAIN, VITAMINC, EmbeddedInput, fetch


@dataclass(frozen=True)
class TextTask:
    """A classification task.

    Args:
        labels: names of the classes, in the order of the integer labels.
        max_tokens: where texts are cut.
        load: gives `train` and `test` with the columns `text`, `label`, `group` and, for pairs of texts, `text_pair`.
            Examples of one group belong together: no group is in both splits, and none should be split further.

    """

    labels: tuple[str, ...]
    max_tokens: int
    load: Callable[[], DatasetDict]


def split_by_group(frame: pd.DataFrame, test_share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two parts without a common `group`, always the same ones."""
    splitter = GroupShuffleSplit(n_splits=1, test_size=test_share, random_state=0)
    first, second = next(splitter.split(frame, groups=frame["group"]))
    return frame.iloc[first], frame.iloc[second]


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> DatasetDict:
    """Token ids, cut at `max_tokens`, and labels; nothing else."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_tokens))

    texts = [name for name in data["train"].column_names if name != "label"]
    return data.map(encode, batched=True, remove_columns=texts, desc="Tokenizing")


def _as_splits(train: pd.DataFrame, test: pd.DataFrame) -> DatasetDict:
    return DatasetDict(
        train=Dataset.from_pandas(train, preserve_index=False), test=Dataset.from_pandas(test, preserve_index=False)
    )


_MOVIE_LABELS = ("rotten", "fresh")


def _load_movie_reviews() -> DatasetDict:
    # Split by film: snippets about one film share names and plot, and would leak.
    frame = pd.read_csv(fetch(MOVIE_REVIEWS), compression="bz2")
    frame = frame[frame["category"].isin(_MOVIE_LABELS)].dropna(subset=["text"]).drop_duplicates("text")
    label = frame["category"].map(_MOVIE_LABELS.index)
    frame = pd.DataFrame({"text": frame["text"], "label": label, "group": frame["movie_name"]})
    return _as_splits(*split_by_group(frame, 0.25))


_VITAMINC_LABELS = ("False", "Neither", "True")


def _load_vitaminc() -> DatasetDict:
    # Split by the article a passage is from: its passages are edits of one another.
    rows = []
    for example in json.loads(fetch(VITAMINC).read_text(encoding="utf-8"))["examples"]:
        passage, claim = example["input"].split("\nClaim: ")
        scores = example["target_scores"]
        label = _VITAMINC_LABELS.index(max(scores, key=scores.get))
        rows.append({"text": claim, "text_pair": passage, "label": label, "group": passage.split(":")[0]})
    return _as_splits(*split_by_group(pd.DataFrame(rows), 0.25))


_R8_LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)


def _load_topics(train: EmbeddedInput, test: EmbeddedInput, labels: tuple[str, ...]) -> DatasetDict:
    """The official splits, without the few training texts that are also in the test; a text is its own group."""

    def read(source: EmbeddedInput) -> pd.DataFrame:
        frame = pd.read_csv(fetch(source), sep="\t", names=["label", "text"], skiprows=3, quoting=3, dtype=str)
        frame = frame.dropna()
        return pd.DataFrame({"text": frame["text"], "label": frame["label"].map(labels.index), "group": frame["text"]})

    training, testing = read(train), read(test)
    return _as_splits(training[~training["group"].isin(testing["group"])], testing)


MOVIE_REVIEW_TASK = TextTask(_MOVIE_LABELS, 48, _load_movie_reviews)
TASKS = {
    "movie-reviews": MOVIE_REVIEW_TASK,
    "vitaminc": TextTask(_VITAMINC_LABELS, 64, _load_vitaminc),
    "20-newsgroups": TextTask(_NEWSGROUPS, 48, lambda: _load_topics(NEWSGROUPS_TRAIN, NEWSGROUPS_TEST, _NEWSGROUPS)),
    "r8": TextTask(_R8_LABELS, 48, lambda: _load_topics(R8_TRAIN, R8_TEST, _R8_LABELS)),
}
