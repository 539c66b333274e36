"""Byte corpora for a language model: English, German and source code, from packages.

Reading and splitting are deterministic.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrlora.checks import require_known
from lrlora.train.packages import BOOKS, SPEECHES, TWISTED, fetch

_SECTION = 20_000  # characters of a book
_PASSAGE = 100  # bytes


class Corpus(NamedTuple):
    """Bytes of disjoint documents: three uint8 tensors of one dimension."""

    train: Tensor
    validation: Tensor
    test: Tensor


def _english() -> Iterator[str]:
    for path in sorted(fetch(BOOKS).glob("*.txt")):
        # The film script and the Kafka translation are under copyright.
        if not path.name.startswith(("Tarantino", "Kafka")):
            # Join the lines of a paragraph: their breaks are layout.
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", path.read_text(encoding="utf-8-sig").strip())
            yield from (text[i : i + _SECTION] for i in range(0, len(text), _SECTION))


def _german() -> Iterator[str]:
    with zipfile.ZipFile(fetch(SPEECHES)) as archive, archive.open("de.csv") as table:
        for row in csv.DictReader(io.TextIOWrapper(table, encoding="utf-8", newline="")):
            # Minutes before 2009 have a space before each punctuation mark.
            yield re.sub(r" +([.,;:!?])", r"\1", row["text"])


def _source_code() -> Iterator[str]:
    folder = fetch(TWISTED)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    # Tests are half of the code and repetitive.
    return ((folder / path).read_text(encoding="utf-8") for path in files if "test" not in path.parts)


CORPORA = {"english": _english, "german": _german, "source-code": _source_code}


def load_corpus(name: str) -> Corpus:
    """Load a corpus of `CORPORA`, downloaded if necessary, with a deterministic split.

    Raises:
        RuntimeError: the download failed.
        ValueError: unknown corpus.

    """
    require_known("corpus", name, CORPORA)
    return split(text.encode() for text in CORPORA[name]())


def split(documents: Iterable[bytes]) -> Corpus:
    """Split off a tenth of the documents for test and a tenth for validation, by content hash.

    Drops documents that share about 200 consecutive bytes with the test or, for training, validation.
    """
    parts: tuple[list[bytes], ...] = ([], [], [])
    for document in documents:
        parts[min(2, hashlib.sha256(document).digest()[0] % 10)].append(document)
    kept, passages = [], set[bytes]()
    for part in parts:
        part = [document for document in part if not _holds(document, passages)]
        passages |= {text[i : i + _PASSAGE] for text in part for i in range(0, len(text) - _PASSAGE + 1, _PASSAGE)}
        kept.append(torch.from_numpy(np.frombuffer(b"\n".join(part), dtype=np.uint8).copy()))
    test, validation, train = kept
    return Corpus(train, validation, test)


def _holds(document: bytes, passages: set[bytes]) -> bool:
    return any(document[i : i + _PASSAGE] in passages for i in range(len(document) - _PASSAGE + 1))
