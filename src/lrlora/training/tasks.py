"""Tasks whose data comes with packages: loaded, split and tokenised the same way every time."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from datasets import Dataset, DatasetDict
from sklearn.model_selection import GroupShuffleSplit
from transformers import PreTrainedTokenizerBase

from .inputs import (
    MOVIE_REVIEWS,
    NEWSGROUPS_TEST,
    NEWSGROUPS_TRAIN,
    R8_TEST,
    R8_TRAIN,
    RATINGS,
    SOCIAL_IQA,
    VITAMINC,
    EmbeddedInput,
    fetch,
)


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


# Not the film reviews of this package: they overlap with those above.
_RATED = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")


def load_ratings() -> DatasetDict:
    """Sentences with the mean of 20 ratings, −4 to 4: `text`, `label`, `group`; documents held out."""
    parts = []
    with tarfile.open(fetch(RATINGS)) as archive:
        for source in _RATED:
            file = archive.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            assert file is not None
            frame = pd.read_csv(file, sep="\t", names=["id", "label", "text"], quoting=3, dtype={"id": str})
            document = frame["id"].str.partition("_")[0]
            parts.append(
                pd.DataFrame({"text": frame["text"], "label": frame["label"], "group": f"{source} " + document})
            )
    return _as_splits(*split_by_group(pd.concat(parts).dropna().drop_duplicates("text"), 0.25))


def load_social_iqa() -> DatasetDict:
    """Questions with 3 answers, shuffled: `question`, `choices`, `label`, `group`; situations held out."""
    rows = []
    for example in json.loads(fetch(SOCIAL_IQA).read_text(encoding="utf-8"))["examples"]:
        scores = example["target_scores"]
        # Shuffled by the text itself: the order of the file may give the answer away.
        choices = sorted(scores, key=lambda choice: hashlib.sha256((example["input"] + choice).encode()).digest())
        label = choices.index(max(scores, key=scores.get))
        situation = example["input"].partition(".")[0]
        rows.append({"question": example["input"], "choices": choices, "label": label, "group": situation})
    frame = pd.DataFrame(rows)
    return _as_splits(*split_by_group(frame[frame["choices"].map(len) == 3], 0.25))


MOVIE_REVIEW_TASK = TextTask(_MOVIE_LABELS, 48, _load_movie_reviews)
TASKS = {
    "movie-reviews": MOVIE_REVIEW_TASK,
    "vitaminc": TextTask(_VITAMINC_LABELS, 64, _load_vitaminc),
    "20-newsgroups": TextTask(_NEWSGROUPS, 48, lambda: _load_topics(NEWSGROUPS_TRAIN, NEWSGROUPS_TEST, _NEWSGROUPS)),
    "r8": TextTask(_R8_LABELS, 48, lambda: _load_topics(R8_TRAIN, R8_TEST, _R8_LABELS)),
}
