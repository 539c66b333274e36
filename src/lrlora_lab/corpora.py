"""Texts as bytes for a language model: English, German and source code, from packages.

They are read in the same way and split in the same places every time.
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
    """Text as bytes, without a common document: three uint8 tensors of one dimension."""

    train: Tensor
    validation: Tensor
    test: Tensor


def _english() -> Iterator[str]:
    for path in sorted(fetch(BOOKS).glob("*.txt")):
        # Under copyright are a film script and the translation of Kafka.
        if not path.name.startswith(("Tarantino", "Kafka")):
            # The lines of a paragraph become one: their breaks are those of a page.
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", path.read_text(encoding="utf-8-sig").strip())
            yield from (text[i : i + _SECTION] for i in range(0, len(text), _SECTION))


def _german() -> Iterator[str]:
    with zipfile.ZipFile(fetch(SPEECHES)) as archive, archive.open("de.csv") as table:
        for row in csv.DictReader(io.TextIOWrapper(table, encoding="utf-8", newline="")):
            # Until 2009 the minutes have a space before every punctuation mark.
            yield re.sub(r" +([.,;:!?])", r"\1", row["text"])


def _source_code() -> Iterator[str]:
    folder = fetch(TWISTED)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    # Its tests are half of it, and repeat themselves.
    return ((folder / path).read_text(encoding="utf-8") for path in files if "test" not in path.parts)


CORPORA = {"english": _english, "german": _german, "source-code": _source_code}


def load_corpus(name: str) -> Corpus:
    """A corpus of `CORPORA`, downloaded first if need be, and split the same way every time.

    Raises:
        RuntimeError: it cannot be downloaded.
        ValueError: there is no such corpus.

    """
    require_known("corpus", name, CORPORA)
    return split(text.encode() for text in CORPORA[name]())


def split(documents: Iterable[bytes]) -> Corpus:
    """A tenth of the documents for the test and a tenth for validation, chosen by their content.

    Left out are documents that share 200 bytes in a row, or a little less, with the test or, for training, validation.
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
