"""Settings by the names that people use, and what goes to a pipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lrlora.learned.cut import Cut, Size
from lrlora.train.adapter_config import adapter_config
from lrlora.train.settings import TrainConfig, with_short_names
from lrlora.train.undertraining import undertraining

from ..cli import run
from .small import reviews

RUN = {"model": "m", "data": "d", "task": "classify"}


def config_of(**settings: Any) -> Any:
    config = TrainConfig.from_dict({**RUN, **settings})
    return adapter_config(config.method, {}, 10, config.wide_fields)


def test_the_expansion_is_a_method_with_its_own_scale() -> None:
    config = config_of(method="expansion", rank=3)
    assert (config.form, config.r, config.lora_alpha) == ("expansion", 3, 12)
    assert config_of(method="expansion", rank=3, alpha=6.0).lora_alpha == 6
    assert (config_of(method="lr-lora", rank=3).form, config_of(method="lr-lora", rank=3).lora_alpha) == ("residual", 3)


def test_alpha_and_targets_stand_beside_the_rank() -> None:
    config = config_of(method="lora", rank=4, alpha=16.0, targets="query,value")
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 16, {"query", "value"})
    assert (config_of(rank=4, alpha=8.0).r, config_of(rank=4, alpha=8.0).lora_alpha) == (4, 8)
    # Before the cut, with the same α/r.
    assert (config_of(size="r4", alpha=8.0).r, config_of(size="r4", alpha=8.0).lora_alpha) == (16, 32)
    assert config_of(size="r4", adapter={"lora_alpha": 8}).lora_alpha == 32
    assert config_of(size="r4", alpha=8.0, adapter={"use_rslora": True}).lora_alpha == 16
    config = config_of(size="r4", rank=8, alpha=8.0)
    assert (config.r, config.lora_alpha) == (8, 8)
    assert set(config_of(targets="query").target_modules) == {"query"}
    assert set(config_of(targets="query, value").target_modules) == {"query", "value"}
    assert config_of(targets=r".*\.(query|key)").target_modules == r".*\.(query|key)"
    assert config_of().target_modules == "all-linear"
    assert set(config_of(adapter={"target_modules": "query,value"}).target_modules) == {"query", "value"}
    told = with_short_names({"method": "lora", "adapter": {"target_modules": ["query"], "r": 3, "lora_alpha": 6}})
    assert told == {"method": "lora", "adapter": {"target_modules": ["query"]}, "rank": 3, "alpha": 6}
    with pytest.raises(ValueError, match=r"alpha=2\.0 .*lora_alpha=3 "):
        config_of(alpha=2.0, adapter={"lora_alpha": 3})
    with pytest.raises(ValueError, match=r"alpha .*> 0, got -1\.0"):
        config_of(alpha=-1.0)


def test_help_has_its_short_name() -> None:
    assert run("train", "-h").output == run("train", "--help").output


def test_results_go_to_a_pipe_one_a_line_and_whole(encoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rows = reviews(40)
    rows["review"] += " with plot and actors" * 12  # longer than any terminal
    rows.to_csv("reviews.csv", index=False)
    asked = ("--columns", "text=review", "--columns", "label=verdict", "--steps", "3", "--batch-size", "4")
    trained = run("train", "--model", encoder, "--data", "reviews.csv", "--task", "classify", *asked)
    assert trained.exit_code == 0, trained.output
    lines = run("predict", "lrlora-run", "--data", "reviews.csv", "--split", "train").stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == list(rows["review"])
    typed = "\n".join(rows["review"][:3]).replace("plot and", "plot\u2028and") + "\n"
    piped = run("predict", "lrlora-run", typed=typed).stdout.split("\n")[:-1]
    assert [json.loads(line)["prediction"] for line in piped] == [json.loads(line)["prediction"] for line in lines[:3]]
    one = run("predict", "lrlora-run", "--text", rows["review"][0]).stdout
    assert json.loads(one)["prediction"] == json.loads(piped[0])["prediction"]
    assert "input is empty" in " ".join(run("predict", "lrlora-run", typed="").output.split())
    said = " ".join(run("evaluate", "lrlora-run", "--data", "reviews.csv", "--split", "train").output.split())
    assert "reviews.csv, 40 examples" in said
    assert " ± 0.0" in said


def test_the_plan_says_what_is_trained_and_warns_of_a_rank_beyond_the_layers(encoder: str, tmp_path: Path) -> None:
    reviews(120).to_csv(tmp_path / "reviews.csv", index=False)
    asked = ("train", "--model", encoder, "--data", tmp_path / "reviews.csv", "--task", "classify", "--dry-run")
    asked += ("--columns", "text=review", "--columns", "label=verdict")
    said = " ".join(run(*asked, "--method", "expansion", "--rank", "4", "--epochs", "2").output.split())
    assert re.search(r"Adapter: expansion, r = 4, α = 16, on [\w, ]*query, value \(13 modules\)\.", said)
    assert "% of all)" in said
    assert "2 epochs" in said
    assert "Warning" not in said
    said = " ".join(run(*asked, "--method", "lora", "--rank", "100").output.split())
    assert re.search(r"Warning: r = 100 .*\b13 of 13 layers \(32\)", said)
    said = " ".join(run(*asked, "--method", "lora", "--rank", "500").output.split())
    assert re.search(r"r = 500 .*at most 32\..*--rank", said)


@pytest.mark.parametrize("rate", ["0.01", "1e-6"])  # with the second, the accuracy is always the same
def test_it_says_which_step_was_kept(encoder: str, tmp_path: Path, rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    courses: list[list[Any]] = []

    def spy(metrics: Any, log: Any, **options: Any) -> Any:
        courses.append([entry["step"] for entry in log if "eval_loss" in entry])
        return undertraining(metrics, log, **options)

    monkeypatch.setattr("lrlora.train.run.undertraining", spy)
    reviews(80).to_csv(tmp_path / "reviews.csv", index=False)
    asked = ("train", "--model", encoder, "--data", tmp_path / "reviews.csv", "--task", "classify", "--steps", "6")
    asked += ("--columns", "text=review", "--columns", "label=verdict", "--output", tmp_path / "run")
    asked += ("--method", "lora", "--no-measure")
    asked += ("--training", "eval_strategy=steps", "--training", "eval_steps=2", "--training", "save_steps=2")
    asked += ("--learning-rate", rate)
    said = " ".join(run(*asked).output.split())
    state = [e for e in json.loads((tmp_path / "run" / "log_history.json").read_text()) if "eval_accuracy" in e]
    best = max(state, key=lambda entry: (entry["eval_accuracy"], -entry["eval_loss"]))
    assert f"Kept: step {best['step']} of 6, the best by accuracy" in said
    assert courses == [[2, 4, 6]]  # the loss of the kept step is not the last one of the course


def test_without_a_method_the_cut_keeps_a_share_of_the_gain() -> None:
    def config(**settings: Any) -> TrainConfig:
        return TrainConfig("model", "data", "classify", **settings)

    def cut(**settings: Any) -> Cut:
        found = config(**settings).cut
        assert found is not None
        return found

    assert (config().method, cut()) == ("lora", Cut(keep=0.99, at=0.6))
    assert (config().wide_fields["r"], config(rank=8).wide_fields["r"]) == (16, 8)
    assert config(adapter={"r": 4, "lora_dropout": 0.1}).wide_fields["r"] == 4
    assert cut(size="200k", rank=8, cut_rate=2.0) == Cut(Size.parse("200k"), at=0.3, rate=2.0)
    assert (cut(keep=0.9), config(keep=0.9).filled_by) == (Cut(keep=0.9, at=0.6), None)
    assert (cut(method="lora", keep=0.9), config(method="lora", keep=0.9).filled_by) == (Cut(keep=0.9), "--keep")
    assert (cut(method="lr-lora", size="r4"), config(method="lr-lora").cut) == (Cut(Size.parse("r4")), None)
    assert not config(start_from="run").learns_ranks
    assert (config(method="lora").size, config(method="lora", rank=4).rank) == (None, 4)
    assert TrainConfig.from_dict({**vars(config(rank=16))}) == config(rank=16)  # as a resumed run reads it
    assert config(method="fitted", rank=4) == config(rank=4)
    assert config(method="fitted", keep=0.95) == config(keep=0.95)
