"""Tiny models that the laboratory's tests train."""

from __future__ import annotations

import altair as alt
import pytest

from .small import save_decoder, save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("models") / "decoder")


@pytest.fixture
def drawn() -> None:
    """For tests of the picture of the ranks, which takes half a second of every run."""


@pytest.fixture(autouse=True)
def _empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        empty = alt.Chart(alt.Data(values=[{}])).mark_point()
        monkeypatch.setattr("lrlora.views.figure._map", lambda rows, measure: empty)
        monkeypatch.setattr("lrlora.views.figure._bends", lambda report: empty)
