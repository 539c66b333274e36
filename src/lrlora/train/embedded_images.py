"""Images shipped in packages, as data sets with columns `image` and `label`."""

from __future__ import annotations

import gzip
import io
import pickle
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from numpy.typing import NDArray
from PIL import Image as Pictures
from sklearn.model_selection import train_test_split

from .packages import ANIMALS, DIGITS, fetch

_ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


def load_digits() -> DatasetDict:
    """`train` and `test` of 5,000 digits; a fifth is held out."""
    table = np.loadtxt(fetch(DIGITS), delimiter=",", dtype=np.uint8)
    return _as_splits(table[:, :-1].reshape(-1, 28, 28), table[:, -1], tuple("0123456789"))


def load_animals() -> DatasetDict:
    """`train` and `test` of 9,716 animals, deduplicated; a fifth is held out."""
    pixels, labels = (_unpickled(f"animal_{part}_version_3.gz") for part in ("data", "label"))
    pixels, labels = np.asarray(pixels, np.uint8).reshape(-1, 28, 28), np.asarray(labels).ravel()
    _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
    first.sort()
    return _as_splits(pixels[first], labels[first], _ANIMALS)


def _as_splits(pixels: NDArray[np.uint8], labels: NDArray[Any], names: tuple[str, ...]) -> DatasetDict:
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
