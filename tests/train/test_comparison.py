"""`lrlora compare`: methods on data of one's own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lrlora.train import comparison as module
from lrlora.train.comparison import Comparison, Outcome, Score
from lrlora.train.run import Interrupted

from ..cli import run
from .small import reviews, save_encoder


@pytest.fixture
def own(tmp_path: Path) -> list[object]:
    """Options for a model and data with a test split, in 12 steps."""
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        reviews(120, seed).to_csv(tmp_path / "data" / f"{split}.csv", index=False)
    return [
        *("--model", save_encoder(tmp_path / "model"), "--data", tmp_path / "data", "--task", "classify"),
        *("--columns", "text=review", "--columns", "label=verdict", "--steps", 12, "--rank", 2),
        *("--training", "eval_strategy=no", "--output", tmp_path / "out"),
    ]


def test_learned_ranks_are_compared_with_lora(own: list[object], tmp_path: Path) -> None:
    options = [*own, "--rates", "1e-2,2e-2", "--seeds", 2]
    done = run("compare", *options)
    assert done.exit_code == 0, done.output
    assert re.search(r"\b8 runs .* in \S+\.$", done.output, re.MULTILINE)  # and no more of another rate
    assert re.search(r"lora: .*\b0\.0[12], .*edge", done.output)
    assert re.search(r"accuracy .*\btest, 120 examples", done.output)
    assert re.search(r"learned (is|and)", " ".join(done.output.split()))
    assert re.search(r"lora, seed 2: .*not chosen: .*too few", " ".join(done.output.split()))
    runs = {path.name: json.loads((path / "run.json").read_text())["config"] for path in (tmp_path / "out").iterdir()}
    assert sum(name.startswith("learned-") for name in runs) == 4
    assert all(config["size"] == ("r2" if name.startswith("learned") else None) for name, config in runs.items())
    scored = [name for name in runs if (tmp_path / "out" / name / "test.json").exists()]
    assert len(scored) == 4
    assert not any(name.endswith("-0") for name in scored)  # the seed of the rates reads no test data


def test_what_is_done_is_not_done_again(own: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*own, "--rates", "1e-2", "--seeds", 1, "--methods", "lora,full"]
    train, count = module.train, 0

    def interrupted(*given: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise Interrupted("Resume it with: lrlora train --resume out")
        return train(*given, **options)

    monkeypatch.setattr(module, "train", interrupted)
    stopped = run("compare", *options)
    assert stopped.exit_code == 130
    assert re.search(r"Interrupted\. .*same command ", stopped.output)  # not that run alone
    assert run("compare", *options).exit_code == 0
    assert count == 3
    assert run("compare", *options).exit_code == 0
    assert count == 3
    changed = run("compare", *options, "--steps", 13)
    assert changed.exit_code == 1
    assert re.search(r"steps=12, not 13\..*--output", " ".join(changed.output.split()))
    data = Path(str(own[3]))
    for split, message in (("test", "of other data"), ("train", "data has changed")):
        frame = pd.read_csv(data / f"{split}.csv")
        frame.assign(verdict=[*frame["verdict"][1:], frame["verdict"][0]]).to_csv(data / f"{split}.csv", index=False)
        assert message in " ".join(run("compare", *options).output.split())
    assert count == 3


def test_a_file_of_settings_and_rates_of_many_digits(own: list[object], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    run("init", file, *own[:6])
    options = [file, *own[6:], "--rates", "0.0031622776601683794,1e-2", "--seeds", 1, "--methods", "lora,dora"]
    for _ in range(2):  # the second finds the folders of the first
        done = run("compare", *options)
        assert done.exit_code == 0, done.output
        assert "inf" not in done.output  # the interval of one seed
    assert (tmp_path / "out" / "lora-0.0031622776601683794-0").is_dir()


def test_alpha_is_of_one_scale_for_all_methods() -> None:
    settings = {"model": "m", "data": "d", "task": "classify", "output": "out", "rank": 8, "alpha": 16.0}
    comparison = Comparison(settings, ("lora", "learned"))
    lora, learned = (comparison.run(method, 1e-3, 0) for method in comparison.methods)
    assert comparison.run("full", 1e-3, 0).alpha is None
    assert lora.wide_fields["lora_alpha"] / lora.wide_fields["r"] == 2
    assert learned.wide_fields["lora_alpha"] / learned.wide_fields["r"] == 2


def test_ranks_that_were_not_learned_are_not_compared(own: list[object]) -> None:
    by_epochs = [option for option in own if option not in ("--steps", 12)]
    for _ in range(2):  # nor by a second call
        done = run("compare", *by_epochs, "--rates", "1e-2", "--seeds", 1, "--epochs", 1, "--methods", "learned,lora")
        assert done.exit_code == 1
        assert re.search(r"learned-0\.01-1 .*ranks .*--steps", " ".join(done.output.split()))


def test_the_grid_grows_at_its_edge(own: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": own[1], "data": str(own[3]), "task": "classify", "output": "out"}
    comparison, tried = Comparison(settings, ("lora", "learned")), []

    def loss(config: Any, data: Any, announce: Any) -> float:
        tried.append(config.learning_rate)
        return math.inf if config.learning_rate > 0.01 else -config.learning_rate

    monkeypatch.setattr(module, "_loss", loss)
    assert module._tune(comparison, "lora", None, print) == pytest.approx(8e-3)
    assert tried == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    monkeypatch.setattr(module, "_loss", lambda config, data, announce: math.inf)
    with pytest.raises(ValueError, match=r"lora diverged .*: 0\.001, .*--rates"):
        module._tune(comparison, "lora", None, print)


@pytest.mark.parametrize(
    ("values", "examples", "said"),
    [
        ([0.81, 0.83, 0.82], 100, "No difference between learned and lora that 3 seeds and 100 examples could show"),
        ([0.91, 0.93, 0.92], 2_000, r"learned is better than lora: accuracy \+0.110"),
        ([0.71, 0.73, 0.72], 2_000, "learned is worse than lora"),
    ],
)
def test_the_answer_takes_seeds_and_examples_into_account(values: list[float], examples: int, said: str) -> None:
    scores = [Score("lora", 1e-3, 10, [0.80, 0.82, 0.81]), Score("learned", 1e-3, 10, values)]
    (line,) = Outcome(scores, "accuracy", "the split test", examples).answers()
    assert re.search(said, line), line
    if examples == 100:
        assert "About 1,2" in line  # 2 p (1 − p) (1.96 / 0.03)²


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.82], "learned − lora: -0.080. One seed "), ([0.80, 0.91], "pass more --seeds")],
)
def test_few_seeds_are_named_before_few_examples(values: list[float], said: str) -> None:
    scores = [Score("lora", 1e-3, 10, [0.90, 0.90][: len(values)]), Score("learned", 1e-3, 10, values)]
    (line,) = Outcome(scores, "accuracy", "the split test", 100).answers()
    assert said in line
    assert "examples would show" not in line


@pytest.mark.refused
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "lora,lora"), r"methods must be different .*\blora, lora\b"),
        (("--methods", ","), r"methods must be .* none"),
        (("--methods", "lora,lerned"), r"'lerned'.* learned\?"),
        (("--rates", "fast"), r"--rates .*numbers"),
        (("--seeds", 0), r"seeds .*≥ 1, got 0"),
        (("--steps", 6), r"steps .*at least 10 .*learned, got 6"),
        (("--output", __file__), r"test_comparison\.py .*file\..*--output"),
        (("--task", "clasify"), r"'clasify'.* classify\?"),
        (("--rates", "1e-3,inf"), r"learning_rate .*> 0, got inf"),
        (("--task", "causal-lm", "--methods", "lora,adalora"), "Leave adalora out"),
        (("--learning-rate", 1e-3), "No such option"),
    ],
)
def test_bad_options_are_refused_before_any_run(
    own: list[object], tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    done = run("compare", *own, *options)
    assert done.exit_code != 0
    assert re.search(said, " ".join(done.output.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.refused
@pytest.mark.parametrize("how", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("test", "said"),
    [
        (None, "no file or folder"),
        ("review,grade\nfine,good\n", "label to 'verdict'"),
        ("review,verdict\nfine,excellent\n", "excellent"),
    ],
)
def test_bad_test_data_are_refused_before_any_run(
    own: list[object], tmp_path: Path, test: str | None, said: str, how: tuple[str, ...]
) -> None:
    if test is not None:
        (tmp_path / "held-out.csv").write_text(test)
    done = run("compare", *own, "--test-data", tmp_path / "held-out.csv", *how)
    assert done.exit_code == 1
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.refused
def test_without_test_data_nothing_is_trained(own: list[object], tmp_path: Path) -> None:
    (tmp_path / "data" / "test.csv").unlink()
    done = run("compare", *own)
    assert re.search(r"no split test\b.*--test-data", " ".join(done.output.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_runs_and_seeds_that_cannot_conclude_are_told_before_any_run(own: list[object], seeds: int) -> None:
    done = run("compare", *own, "--rates", "1e-2", "--seeds", seeds, "--methods", "lora,learned", "--dry-run")
    assert done.exit_code == 0, done.output
    assert re.search(rf"\b{2 * seeds} runs of ", done.output)  # none for a rate that decides nothing
    assert f"for {2 * seeds} runs" in done.output
    assert ("Pass more --seeds" in " ".join(done.output.split())) == (seeds < 3)


def test_a_new_comparison_asks_before_it_starts(
    own: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrlora.cli.compare.in_terminal", lambda: True)
    output = tmp_path / "asked"
    options = [*own, "--rates", "1e-2", "--seeds", 1, "--output", output]
    done = run("compare", *options, typed="n\n")
    assert done.exit_code == 0, done.output
    assert "for 2 runs" in done.output
    assert not output.exists()
    output.mkdir()
    done = run("compare", *options, typed="n\n")
    assert "for 2 runs" in done.output
    assert not any(output.iterdir())
    done = run("compare", *options, typed="y\n")
    assert done.exit_code == 0, done.output
    assert (output / "lora-0.01-1").exists()
    done = run("compare", *options)  # resumes, without a question
    assert done.exit_code == 0, done.output


def test_the_rate_of_one_method_is_tuned(own: list[object]) -> None:
    done = run("compare", *own, "--methods", "lora", "--rates", "1e-3,1e-2", "--seeds", 1)
    assert done.exit_code == 0, done.output
    assert all(f"lora, rate {rate}: validation loss" in done.output for rate in ("0.001", "0.01"))
    assert "differ" not in done.output.split("validation loss")[-1].replace("difference", "")
