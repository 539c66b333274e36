"""A small byte-level language model, pretrained here on English, and corpora from packages to adapt it to.

The adapter must learn a language, so unlike on most tasks its rank matters.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import trange
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from lrlora.checks import require_known
from lrlora.files import cache_folder, readable, replacing
from lrlora.train.embedded import EmbeddedInput, fetch

from .inputs import BOOKS, SPANISH_SPEECHES, SPEECHES, TWISTED

CONTEXT = 128  # bytes
_WARM_UP = 0.05  # of the steps
_AT_ONCE = 64  # windows per batch without gradients


def sample_batch(data: Tensor, generator: torch.Generator, batch_size: int, length: int = CONTEXT) -> Tensor:
    """Random windows.

    Args:
        data: uint8, one dimension.
        generator: for sampling.
        batch_size: number of windows.
        length: in bytes.

    Returns:
        int64, (batch_size, length).

    """
    starts = torch.randint(len(data) - length + 1, (batch_size, 1), generator=generator)
    return data[starts + torch.arange(length)].long()


@torch.no_grad()
def mean_loss(model: nn.Module, data: Tensor, windows: int) -> float:
    """Mean next-byte loss, in nats, over evenly spaced, non-overlapping windows of 128 bytes.

    Args:
        model: a causal byte-level language model; its mode is preserved.
        data: uint8, one dimension.
        windows: number of windows.

    Raises:
        ValueError: the data is too short.

    """
    held = len(data) // CONTEXT
    if not 1 <= windows <= held:
        raise ValueError(f"windows must be between 1 and {held}, the number in the data, got {windows}.")
    chosen = data[: held * CONTEXT].view(held, CONTEXT)[torch.arange(windows) * held // windows].long()
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total = 0.0
    for batch in chosen.to(device).split(_AT_ONCE):
        total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    model.train(was_training)
    return total / windows


def base_model(architecture: str = "opt") -> PreTrainedModel:
    """Byte model of 1.9 M parameters, pretrained on English: cached, or trained in minutes.

    Concurrent processes wait for the first. After an interruption, the next call resumes.

    Args:
        architecture: one of `ARCHITECTURES`.

    Raises:
        RuntimeError: the corpus cannot be downloaded.

    """
    folder = cache_folder() / ("byte-model" if architecture == "opt" else f"byte-model-{architecture}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            pretrain(load_corpus("english").train, folder, architecture=architecture)
        # Under the lock: two threads that load at once leave transformers without weight tying.
        with readable(folder, "Remove it to train the model again."):
            return AutoModelForCausalLM.from_pretrained(folder)


def _opt(hidden: int, layers: int) -> PretrainedConfig:
    return OPTConfig(
        vocab_size=256,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=CONTEXT,
        activation_function="gelu",
        dropout=0.0,
        # Every byte is an ordinary token.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _gpt2(hidden: int, layers: int) -> PretrainedConfig:
    """Queries, keys and values in one matrix, weights stored as (in, out)."""
    return GPT2Config(
        vocab_size=256,
        n_embd=hidden,
        n_layer=layers,
        n_head=hidden // 32,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )


ARCHITECTURES = {"opt": _opt, "gpt2": _gpt2}


def pretrain(
    data: Tensor,
    folder: Path,
    *,
    steps: int = 2_500,
    hidden: int = 192,
    layers: int = 4,
    save_every: int = 200,
    architecture: str = "opt",
) -> None:
    """Train a byte model from scratch and save it atomically.

    Args:
        data: uint8, one dimension.
        folder: folder of the model. The state for resuming is in a file next to it.
        steps: number of steps of 16 × 128 bytes.
        hidden: hidden size; an attention head has 32.
        layers: number of layers.
        save_every: steps between saves.
        architecture: one of `ARCHITECTURES`.

    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](hidden, layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(_WARM_UP * steps), steps)
    generator, done = torch.Generator().manual_seed(0), 0
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = folder.with_suffix(".checkpoint")
    if saved.exists():
        with readable(saved, "Remove it to restart the training."):
            state = torch.load(saved)
            for name, part in stateful.items():
                part.load_state_dict(state[name])
            generator.set_state(state["generator"])
            done = state["done"]
    for step in (bar := trange(done, steps, initial=done, total=steps, desc="Pretraining on English")):
        batch = sample_batch(data, generator, 16)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        if (step + 1) % save_every == 0:
            state = {name: part.state_dict() for name, part in stateful.items()}
            with replacing(saved) as partial:
                torch.save({**state, "generator": generator.get_state(), "done": step + 1}, partial)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    saved.unlink(missing_ok=True)


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


def _speeches(source: EmbeddedInput, table: str) -> Iterator[str]:
    with zipfile.ZipFile(fetch(source)) as archive, archive.open(table) as rows:
        for row in csv.DictReader(io.TextIOWrapper(rows, encoding="utf-8", newline="")):
            # Minutes before 2009 have a space before each punctuation mark.
            yield re.sub(r" +([.,;:!?])", r"\1", row["text"])


def _source_code() -> Iterator[str]:
    folder = fetch(TWISTED)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    # Tests are half of the code and repetitive.
    return ((folder / path).read_text(encoding="utf-8") for path in files if "test" not in path.parts)


CORPORA: dict[str, Callable[[], Iterator[str]]] = {
    "english": _english,
    "german": partial(_speeches, SPEECHES, "de.csv"),
    "spanish": partial(_speeches, SPANISH_SPEECHES, "es.csv"),
    "source-code": _source_code,
}


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
