"""The byte model and its corpora: small ones here, the real ones where they may be downloaded."""

from __future__ import annotations

import math
import random
import string
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTForCausalLM

from lrlora_lab import byte_model
from lrlora_lab.byte_model import (
    ARCHITECTURES,
    CONTEXT,
    CORPORA,
    Corpus,
    base_model,
    load_corpus,
    mean_loss,
    pretrain,
    sample_batch,
    split,
)

TINY = {"steps": 12, "hidden": 32, "layers": 1, "save_every": 5}


def repeated(size: int = 4_000) -> Tensor:
    """A text that is easily learned."""
    return torch.arange(size).remainder(7).add(97).byte()


def text(data: Tensor) -> bytes:
    return data.numpy().tobytes()


def documents(count: int, size: int, seed: int = 0) -> list[bytes]:
    letters = random.Random(seed)
    return ["".join(letters.choices(string.ascii_lowercase, k=size)).encode() for _ in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> OPTForCausalLM:
    pretrain(repeated(), tmp_path / "model", **TINY)
    return OPTForCausalLM.from_pretrained(tmp_path / "model")


def test_a_corpus_is_split_by_document() -> None:
    written = documents(400, size=150)
    parts = [text(part).split(b"\n") for part in split(written)]
    assert sorted(document for part in parts for document in part) == sorted(written)
    train, validation, test = map(len, parts)
    assert train > 280
    assert 20 < validation < 60
    assert 20 < test < 60


def test_the_split_of_a_document_is_its_own() -> None:
    written = documents(100, size=150)
    first, second = split(written), split(written[::-1][:50])
    for one, other in zip(first, second, strict=True):
        assert set(text(other).split(b"\n")) <= set(text(one).split(b"\n"))


def test_what_shares_a_long_passage_with_the_test_is_left_out() -> None:
    written = documents(200, size=300)
    known = text(split(written).test).split(b"\n")[0]
    quoting = [known[50:250] + other for other in documents(50, size=100, seed=1)]
    brief = [known[50:140] + other for other in documents(50, size=100, seed=2)]
    corpus = split(written + quoting + brief)
    assert not any(document in text(corpus.train) + text(corpus.validation) for document in quoting)
    assert sum(document in text(corpus.train) for document in brief) > 30


def test_an_unknown_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="french"):
        load_corpus("french")


def test_batches_are_windows_at_random_places() -> None:
    data = torch.arange(20).byte()
    batch = sample_batch(data, torch.Generator().manual_seed(0), 500, length=15)
    assert batch.shape == (500, 15)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, batch[:, :1] + torch.arange(15))
    assert set(batch[:, 0].tolist()) == set(range(6))
    assert torch.equal(batch, sample_batch(data, torch.Generator().manual_seed(0), 500, length=15))


def test_the_loss_is_the_mean_over_even_windows(model: OPTForCausalLM) -> None:
    data = torch.randint(256, (100 * CONTEXT + 5,), generator=torch.Generator().manual_seed(0)).byte()
    model.train()
    windows = torch.stack([data[start : start + CONTEXT] for start in range(0, 100 * CONTEXT, CONTEXT)]).long()
    for count, step in ((100, 1), (50, 2)):
        logits = model(input_ids=windows[::step]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[::step, 1:].flatten())
        assert mean_loss(model, data, count) == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


@pytest.mark.parametrize("windows", [0, 4])
def test_more_windows_than_there_are_are_refused(model: OPTForCausalLM, windows: int) -> None:
    with pytest.raises(ValueError, match=rf"windows .*\b1 and 3\b.* got {windows}"):
        mean_loss(model, repeated(4 * CONTEXT - 1), windows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pretraining_learns_and_leaves_nothing_else(tmp_path: Path, architecture: str) -> None:
    state = torch.get_rng_state()
    pretrain(repeated(), tmp_path / "model", **{**TINY, "steps": 60}, architecture=architecture)
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert mean_loss(model, repeated(), 20) < 0.5 * math.log(256)


def test_interrupted_pretraining_goes_on_to_the_same_model(
    tmp_path: Path, model: OPTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return sample_batch(*arguments)

    monkeypatch.setattr(byte_model, "sample_batch", interrupted)
    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        pretrain(repeated(), folder, **TINY)
    assert not folder.exists()
    pretrain(repeated(), folder, **TINY)
    assert calls == 8 + TINY["steps"] - 5  # those up to the checkpoint are not repeated
    resumed = OPTForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in model.state_dict().items())


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.checkpoint").write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"model\.checkpoint is damaged"):
        pretrain(repeated(), tmp_path / "model", **TINY)


def test_at_once_the_base_model_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Path] = []

    def brief(data: Tensor, folder: Path, architecture: str) -> None:
        trained.append(folder)
        pretrain(data, folder, **TINY, architecture=architecture)

    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(byte_model, "pretrain", brief)
    monkeypatch.setattr(byte_model, "load_corpus", lambda name: Corpus(repeated(), repeated(), repeated()))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: base_model(), range(2))
    assert trained == [tmp_path / "cache" / "byte-model"]
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)


def test_a_damaged_base_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path))
    pretrain(repeated(), tmp_path / "byte-model", **TINY)
    (tmp_path / "byte-model" / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"byte-model.* damaged"):
        base_model()


@pytest.mark.integration
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train_size", "common"),
    [("english", 3_000_000, " the "), ("german", 1_400_000, " und "), ("source-code", 2_000_000, "    def ")],
)
def test_real_corpora_are_what_they_should_be(name: str, train_size: int, common: str) -> None:
    corpus = load_corpus(name)
    assert len(corpus.train) > train_size
    for part in corpus:
        assert part.dtype == torch.uint8
        assert part.dim() == 1
        assert len(part) > 150_000
        decoded = text(part).decode("utf-8")
        assert decoded.count(common) > len(decoded) / 1_000
        assert "\r" not in decoded
        assert "\ufffd" not in decoded
    assert all(torch.equal(one, other) for one, other in zip(corpus, load_corpus(name), strict=True))


@pytest.mark.integration
@pytest.mark.real
@pytest.mark.parametrize("name", CORPORA)
def test_no_long_passage_is_in_two_parts(name: str) -> None:
    train, validation, test = map(text, load_corpus(name))
    for held_out, others in ((test, (train, validation)), (validation, (train,))):
        # Their own offset, not that at which `split` looks; a passage over the border of two documents is nowhere else.
        passages = {held_out[i : i + 200] for i in range(37, len(held_out) - 200, 50)}
        for other in others:
            assert not any(other[i : i + 200] in passages for i in range(len(other) - 200))


@pytest.mark.real
@pytest.mark.slow  # a quarter of an hour, unless it is in the cache
def test_the_base_model_knows_english_best() -> None:
    model = base_model()
    losses = {name: mean_loss(model, load_corpus(name).test, 512) for name in CORPORA}
    assert losses["english"] < 1.6
    assert min(losses["german"], losses["source-code"]) > losses["english"] + 0.5
