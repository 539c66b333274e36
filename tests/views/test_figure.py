"""The picture of a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image

from lrlora import LrLoraConfig, RankReport, rank_report
from lrlora.views.figure import save_rank_comparison, save_rank_figure

from ..conftest import TinyModel


@pytest.mark.parametrize("family", ["bert", "mixtral", "vit"])
def test_draws_a_heat_map_and_curves(family: str, tmp_path: Path) -> None:
    tiny = TinyModel(family)
    model = get_peft_model(tiny.build(), LrLoraConfig(r=2, **tiny.targets))
    tiny.train(model, 3)
    save_rank_figure(rank_report(model), tmp_path / "ranks.png")
    pixels = np.asarray(Image.open(tmp_path / "ranks.png").convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.png"]


def test_text_of_an_svg_names_types_layers_and_measure(tiny_bert: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert.build(), LoraConfig(r=2, target_modules=["query", "value"]))
    save_rank_figure(rank_report(model), tmp_path / "ranks.svg", measure="stable_rank", title="A title")
    text = (tmp_path / "ranks.svg").read_text()
    for expected in ("bert.encoder.layer.attention.self.query", "stable rank of ΔW", "r = 2", "A title"):
        assert expected in text


def test_adapters_stand_side_by_side(tiny_bert: TinyModel, tmp_path: Path) -> None:
    models = [
        get_peft_model(tiny_bert.build(), kind(r=r, target_modules=["query", "value"]))
        for kind, r in ((LoraConfig, 3), (LrLoraConfig, 5))
    ]
    tiny_bert.train(models[1], 3)
    first, second = map(rank_report, models)
    save_rank_comparison({"plain": (first, "r"), "trained": (second, "stable_rank")}, tmp_path / "ranks.svg")
    text = (tmp_path / "ranks.svg").read_text()
    assert text.index("plain") < text.index("trained")
    assert text.count(">bert.encoder.layer.attention.self.query<") == 2
    with pytest.raises(ValueError, match="no stable_rank"):
        save_rank_comparison({"plain": (RankReport([]), "stable_rank")}, tmp_path / "ranks.svg")


def test_a_deep_model_gets_a_wider_picture(tiny_bert: TinyModel, tmp_path: Path) -> None:
    report = rank_report(get_peft_model(tiny_bert.build(), LoraConfig(r=2, target_modules=["query"])))
    deep = RankReport([replace(report.rows[0], layer=layer) for layer in range(40)])
    widths = []
    for number, each in enumerate((report, deep)):
        save_rank_figure(each, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as picture:
            widths.append(picture.width)
    assert widths[1] > 2 * widths[0]


def test_unknown_measure_is_refused(tiny_bert: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert.build(), LrLoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"'rank'\..* stable_rank"):
        save_rank_figure(rank_report(model), tmp_path / "ranks.png", measure="rank")
    untrained = RankReport([replace(row, r=None) for row in rank_report(model).rows])  # as of full fine-tuning
    with pytest.raises(ValueError, match=r"\bno r, .*measure"):
        save_rank_figure(untrained, tmp_path / "ranks.png", measure="r")


def test_modules_that_share_a_cell_are_averaged(tiny_bert: TinyModel, tmp_path: Path) -> None:
    rows = rank_report(get_peft_model(tiny_bert.build(), LrLoraConfig(r=2, target_modules=["query"]))).rows
    shared = [
        replace(rows[0], module="experts.0", stable_rank=2.0),
        replace(rows[0], module="experts.1", stable_rank=5.0),
    ]
    save_rank_figure(RankReport(shared), tmp_path / "ranks.svg", measure="stable_rank")
    text = (tmp_path / "ranks.svg").read_text()
    assert ">3.5<" in text
    assert "several modules share" in text


def test_a_full_fine_tuning_has_neither_r_nor_curves(tiny_bert: TinyModel, tmp_path: Path) -> None:
    report = rank_report(get_peft_model(tiny_bert.build(), LoraConfig(r=2, target_modules=["query"])))
    rows = [replace(row, r=None) for row in report.rows]
    save_rank_figure(RankReport(rows), tmp_path / "ranks.svg")
    text = (tmp_path / "ranks.svg").read_text()
    assert ">stable rank of ΔW<" in text
    assert "φ" not in text
