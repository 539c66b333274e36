"""Tiny models that the laboratory's tests train."""

from __future__ import annotations

import altair as alt
import pytest
from transformers import BertConfig

from .small import SIZES, save_decoder, save_encoder, tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("models") / "decoder")


@pytest.fixture(scope="module")
def no_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The encoder's folder without its weights: whoever reads them gets another error than the one expected."""
    folder = tmp_path_factory.mktemp("models") / "no-weights"
    BertConfig(**SIZES, vocab_size=64, max_position_embeddings=48).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def drawn() -> None:
    """For tests of the picture of the ranks, which takes half a second of every run."""


@pytest.fixture(autouse=True)
def _empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        empty = alt.Chart(alt.Data(values=[{}])).mark_point()
        monkeypatch.setattr("lrlora.views.figure._map", lambda rows, measure: empty)
        monkeypatch.setattr("lrlora.views.figure._bends", lambda report: empty)
