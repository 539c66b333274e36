"""`lrlora train --method lora --size`: ranks learned in training."""

from __future__ import annotations

import json
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from lrlora.shrunk import SHRUNK_FILE, read_shrunk
from lrlora.train.run import Interrupted, train
from lrlora.train.settings import TrainConfig, read_run
from lrlora.views.runs import load_runs

from ..cli import run as lrlora
from .small import reviews, save_decoder, save_encoder, size_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "base")
    save_decoder(tmp_path / "decoder")
    frame = reviews(96).rename(columns={"review": "text", "verdict": "label"})
    frame.to_csv("reviews.csv", index=False)
    frame[["text"]].to_csv("texts.csv", index=False)
    return tmp_path


CONFIG: dict[str, Any] = {"model": "./base", "data": "reviews.csv", "task": "classify", "method": "lora", "size": "r1"}
CONFIG |= {"steps": 20, "batch_size": 4, "learning_rate": 1e-2, "rank_every": 1}
CONFIG |= {"training": {"eval_steps": 2, "save_steps": 2, "logging_steps": 1}}


def run(output: str, announce: Callable[[str], None] = lambda line: None, **settings: Any) -> None:
    train(TrainConfig.from_dict(CONFIG | {"output": output} | settings), announce=announce)


def test_a_plain_lora_of_the_size(here: Path) -> None:
    result = lrlora(
        *("train", "--model", "base", "--data", "reviews.csv", "--task", "classify"),
        *("--size", "r2", "--steps", 20, "--batch-size", 4, "--learning-rate", 1e-2, "--output", "out"),
    )
    assert result.exit_code == 0, result.output
    match = re.search(r"until step 6, then the ([\d,]+) parameters", " ".join(result.output.split()))
    assert match, result.output
    limit = int(match[1].replace(",", ""))
    assert "Adapter: lora, r = 8, α = 8" in result.output
    size = size_of(here / "out")
    assert re.search(r"Ranks fitted at step 6: [\d,]+ to " + f"{size:,} parameters; ", result.output)
    assert f"Ranks: {size:,} parameters in " in result.output
    assert 0.9 * limit < size <= limit
    config = PeftConfig.from_pretrained("out")
    assert config.peft_type.value == "LORA"
    assert config.rank_pattern
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert re.search(r"rank of BA: \d to \d", card)
    assert f"ranks: fitted: LoRA r = 8, cut after 30% of the steps to {size:,} parameters (r2)" in card
    assert not Path("out/lora").exists()
    assert not Path("out", SHRUNK_FILE).exists()
    for command in (("evaluate", "out", "--data", "reviews.csv"), ("ranks", "out"), ("report", "out")):
        result = lrlora(*command)
        assert result.exit_code == 0, result.output
    (shown,) = load_runs([str(here)])  # the folder above, with this one run
    assert shown.history
    assert shown.settings["training"]["size"] == "r2"


def test_a_share_of_the_gain_while_training(here: Path) -> None:
    reviews(320).rename(columns={"review": "text", "verdict": "label"}).to_csv("many.csv", index=False)
    options = [*("train", "--model", "base", "--data", "many.csv", "--task", "classify", "--method", "fitted")]
    options += ["--keep", 0.9, "--steps", 60, "--learning-rate", 1e-2, "--validation-share", 0.35, "--rank", 8]
    result = lrlora(*options, "--output", "out", "--cut-at", 0.5, "--cut-rate", 1.5)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert re.search(r"r = 8 until step 30, [^.]* keep 0\.9 [^.]* at 1\.5 times", said)
    match = re.search(r"Cut at step 30 to ([\d,]+) of [\d,]+ parameters", said)
    assert match, said
    assert f"{size_of(here / 'out'):,}" == match[1]
    assert "learns at 1.5 times the schedule's rate" in said
    assert PeftConfig.from_pretrained("out").rank_pattern
    assert "0.9 of the gain" in Path("out/README.md").read_text(encoding="utf-8")
    default = TrainConfig("base", "many.csv", "classify", method="fitted", keep=0.9)
    assert (default.cut_at, default.size, default.filled_by) == (0.6, None, None)
    assert TrainConfig("base", "many.csv", "classify", method="lora", keep=0.9).filled_by == "--keep"
    few = lrlora(*options, "--output", "few", "--train-examples", 100, "--validation-examples", 40)
    assert few.exit_code == 1
    assert re.search(r"\b40 validation .*too few", " ".join(few.output.split()))


@pytest.mark.parametrize("step", [4, 14])  # before and after the cut
def test_a_run_with_a_share_is_resumed(step: int, here: Path) -> None:
    reviews(320).rename(columns={"review": "text", "verdict": "label"}).to_csv("many.csv", index=False)
    settings = {"data": "many.csv", "size": None, "keep": 0.9, "cut_at": 0.5, "validation_share": 0.35, "rank": 8}
    settings["training"] = {
        **CONFIG["training"],
        "load_best_model_at_end": False,
    }  # which may be one from before the cut

    def stop(line: str) -> None:
        if line.startswith(f"Step {step}:"):
            raise KeyboardInterrupt

    run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop, **settings)
    train(read_run(Path("cut"))[0], resume=True, announce=lambda line: None)
    weights, others = (load_file(Path(name) / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)


@pytest.mark.refused
def test_options_of_the_cut_without_a_cut() -> None:
    for options, said in (
        ({"method": "dora", "size": "r4", "cut_rate": 2.0}, r"cut_at and cut_rate "),
        ({"size": "r4", "cut_at": 1.0}, r"cut_at .*between 0 and 1, got 1"),
        ({"size": "r4", "cut_rate": 0.0}, r"cut_rate .*> 0, got 0\.0"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainConfig("base", "many.csv", "classify", **options)


def test_a_language_model_and_a_size_in_bytes(here: Path) -> None:
    result = lrlora(
        *("train", "--model", "./decoder", "--data", "texts.csv", "--task", "causal-lm", "--size", "12kB"),
        *("--rank", 8, "--steps", 20, "--batch-size", 4, "--output", "out"),
    )
    assert re.search(
        r"vLLM reserves r = 8 in \d+ modules: [\d.]+ MiB a slot in bfloat16", " ".join(result.output.split())
    )
    assert size_of(here / "out") <= 3_000
    assert lrlora("predict", "out", "--text", "a film").exit_code == 0


def test_a_run_that_starts_from_one_keeps_its_ranks(here: Path) -> None:
    run("out")
    result = lrlora("train", "--start-from", "out", "--steps", 12, "--output", "further")
    assert result.exit_code == 0, result.output
    assert size_of(here / "further") == size_of(here / "out")
    assert PeftConfig.from_pretrained("further").rank_pattern == PeftConfig.from_pretrained("out").rank_pattern


def test_patience_begins_after_the_cut(here: Path) -> None:
    run("whole")
    # The loss falls, so that the first evaluation is the best one.
    first = {"metric_for_best_model": "loss", "greater_is_better": True}
    run("out", early_stopping=1, training={**CONFIG["training"], **first})
    assert size_of(here / "out") <= size_of(here / "whole")
    assert json.loads(Path("out/log_history.json").read_text())[-1]["step"] < 20


def test_an_interrupted_run_resumes_to_the_bit(here: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("Step 6:"):
            signal.raise_signal(signal.SIGINT)

    run("alone")
    with pytest.raises(Interrupted):
        run("cut", announce=stop)
    result = lrlora("train", "--resume", "cut")
    assert result.exit_code == 0, result.output
    for file in ("adapter_model.safetensors", "metrics.json", "rank_history.jsonl", "ranks.json"):
        assert Path("cut", file).read_bytes() == Path("alone", file).read_bytes()
    assert json.loads(Path("cut/adapter_config.json").read_text())["r"] == PeftConfig.from_pretrained("alone").r


def test_a_run_that_is_stopped_before_the_cut_says_how_to_resume_and_no_more(
    here: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def stop(line: str) -> None:
        if line.startswith("Step 2:"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM after step \d+ of 20.*lrlora train --resume out"):
        run("out", announce=stop, cut_at=0.9)
    told = [str(each.message) for each in recwarn.list]
    assert not [line for line in told if "before the cut" in line]
    with pytest.warns(UserWarning, match="before the cut"):  # of a training that ends early by itself
        warnings.warn("Training ended at step 2, before the cut at step 18.", stacklevel=1)


def test_by_default_a_run_keeps_99_percent_of_its_gain(here: Path) -> None:
    reviews(320).rename(columns={"review": "text", "verdict": "label"}).to_csv("many.csv", index=False)
    options = ["--steps", 60, "--learning-rate", 1e-2, "--validation-share", 0.35]
    result = lrlora("train", "--model", "base", "--data", "many.csv", "--task", "classify", *options)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert re.search(r"r = 16 until step 36, [^.]* keep 0\.99 ", said)
    found = read_shrunk(Path("lrlora-run"))
    assert found is not None
    assert (found.keep, found.step) == (0.99, 36)
    assert size_of(here / "lrlora-run") == found.parameters < found.whole
    assert found.sentence in said
    assert found.sentence in " ".join(lrlora("ranks", "lrlora-run").output.split())
    resumed = lrlora("train", "--resume", "lrlora-run")
    assert "finished" in resumed.output


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--steps", 5], r"5 steps .*\b10"),
        (["--steps", 12, "--validation-share", 0.1], r"\d+ validation .*\b90"),
    ],
)
def test_a_run_that_cannot_measure_a_share_is_a_plain_lora(here: Path, options: list[object], why: str) -> None:
    result = lrlora("train", "--model", "base", "--data", "reviews.csv", "--task", "classify", *options)
    assert result.exit_code == 0, result.output
    assert re.search(rf"Ranks: {why}, .*not fitted: r = 16 ", result.output), result.output
    config = PeftConfig.from_pretrained("lrlora-run")
    assert (config.r, config.rank_pattern) == (16, {})
    assert "fitted: LoRA" not in Path("lrlora-run/README.md").read_text(encoding="utf-8")


def test_a_default_run_that_is_left_whole_writes_no_smaller_one(here: Path) -> None:
    reviews(900).rename(columns={"review": "text", "verdict": "label"}).to_csv("many.csv", index=False)
    options = ["--steps", 9, "--batch-size", 64, "--learning-rate", 2e-2, "--validation-share", 0.42]
    options += ["--head-learning-rate", 2e-2]  # at a higher one, the head learns all
    result = lrlora("train", "--model", "base", "--data", "many.csv", "--task", "classify", *options)
    assert result.exit_code == 0, result.output
    assert "parameters, as many as LoRA" in " ".join(result.output.split())  # measured at the end
    assert "lrlora export" in " ".join(result.output.split())
    assert not Path("lrlora-run/lora").exists()  # nobody asked for it


def test_without_a_gain_a_default_run_is_a_plain_lora(here: Path) -> None:
    reviews(320).rename(columns={"review": "text", "verdict": "label"}).to_csv("many.csv", index=False)
    options = ["--steps", 12, "--learning-rate", 1e-7, "--validation-share", 0.35]
    result = lrlora("train", "--model", "base", "--data", "many.csv", "--task", "classify", *options)
    assert result.exit_code == 0, result.output
    assert "Nothing was cut at step 7" in " ".join(result.output.split())
    assert not Path("lrlora-run/lora").exists()


def test_a_default_run_whose_loss_is_known_by_batch_alone_is_a_plain_lora(here: Path) -> None:
    reviews(320).rename(columns={"review": "text", "verdict": "label"}).to_csv("many.csv", index=False)
    arguments = ["train", "--model", "base", "--data", "many.csv", "--task", "classify", "--steps", 12]
    arguments += ["--validation-share", 0.35, "--training", "label_smoothing_factor=0.1"]
    result = lrlora(*arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"Ranks: not fitted, r = 16 .* batches", " ".join(result.output.split()))
    assert PeftConfig.from_pretrained("lrlora-run").r == 16
    asked = lrlora(*arguments, "--method", "fitted", "--keep", 0.99, "--output", "asked")
    assert asked.exit_code == 1
    assert "90 batches" in " ".join(asked.output.split())
    assert not Path("asked").exists()


@pytest.mark.refused
@pytest.mark.parametrize("keep", [0.98, 0.99])
def test_a_share_that_was_asked_for_is_never_left_out(here: Path, keep: float) -> None:
    options = ["--method", "fitted", "--keep", keep, "--steps", 12, "--output", "out"]
    result = lrlora("train", "--model", "base", "--data", "reviews.csv", "--task", "classify", *options)
    assert result.exit_code == 1
    assert re.search(r"\d+ validation .*too few", " ".join(result.output.split()))
    assert not Path("out").exists()


def test_a_run_that_learned_nothing_says_so(here: Path) -> None:
    options = ["--steps", 12, "--learning-rate", 1e-6, "--method", "lora", "--validation-share", 0.3]
    result = lrlora("train", "--model", "base", "--data", "reviews.csv", "--task", "classify", *options)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert re.search(
        r"Guessing: accuracy 0\.\d+, .*(hardly better than|above that of) guessing: .*--head-learning-rate.*Validation",
        said,
    )
    assert "smallest LoRA" not in said
    metrics = json.loads(Path("lrlora-run/metrics.json").read_text())
    assert 0.5 <= metrics["guess_accuracy"] < 0.7
    assert f"(guessing {metrics['guess_accuracy']:.4g})" in Path("lrlora-run/README.md").read_text("utf-8")
    assert f"(guessing {metrics['guess_accuracy']:.4g})" in str(load_runs(["lrlora-run"])[0].facts)
    again = lrlora("evaluate", "lrlora-run", "--data", "reviews.csv", "--json", "scores.json")
    assert "guessing" in again.output
    assert "guess_macro_f1" in json.loads(Path("scores.json").read_text())


def test_equal_ranks_were_learned_too(here: Path) -> None:
    module = r".*layer\.0\.attention\.self\.query"
    run("out", targets=module, rank=4)
    assert "ranks: fitted: LoRA r = 4, cut after 30% of the steps" in Path("out/README.md").read_text("utf-8")
    assert "fitted: LoRA r = 4" in str(load_runs(["out"])[0].facts)


def test_validation_examples_without_a_loss_are_told(here: Path) -> None:
    rows = [{"prompt": "a film " * (40 if n % 10 == 0 else 1), "completion": "it is good"} for n in range(60)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", "decoder", "--data", "chats.jsonl", "--task", "causal-lm", "--steps", 2, "--max-length", 24]
    result = lrlora("train", *arguments, "--validation-share", 0.5, "--method", "lora", "--no-measure", "--rank", 2)
    assert result.exit_code == 0, result.output
    said = re.findall(r"Skipped (\d+) of 30 (?:validation )?examples", " ".join(result.output.split()))
    assert sum(map(int, said)) == 6


@pytest.mark.parametrize(
    ("adapter", "alpha", "scaled"), [({}, 16, 4), ({"use_rslora": True}, 16, 8), ({"lora_alpha": 16}, None, 4)]
)
def test_a_short_run_has_the_scale_of_the_rank_that_was_given(
    here: Path, adapter: dict[str, Any], alpha: float | None, scaled: float
) -> None:
    run("out", size="r4", rank=16, alpha=alpha, adapter=adapter, steps=5, targets="query,value")
    config = PeftConfig.from_pretrained("out")
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, scaled, bool(adapter.get("use_rslora")))


@pytest.mark.refused
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--rank", 1), r"size=.*\bbelow the adapter's"),
        (("--steps", 5, "--size", "1k"), r"steps .*at least 10\b"),
    ],
)
def test_what_cannot_be_learned_is_one_clear_error(here: Path, settings: tuple[object, ...], said: str) -> None:
    arguments = ("train", "--model", "base", "--data", "reviews.csv", "--task", "classify", "--method", "lora")
    for options in (("--dry-run",), ()):
        result = lrlora(*arguments, "--size", "r1", "--output", "out", *settings, *options)
        assert result.exit_code == 1, result.output
        assert re.search(said, result.output), result.output
        assert not Path("out").exists()


@pytest.mark.parametrize("step", [24, 42])  # before and after the cut
def test_a_run_cut_to_a_share_resumes_to_the_bit(here: Path, step: int) -> None:
    reviews(320).rename(columns={"review": "text", "verdict": "label"}).to_csv("many.csv", index=False)
    options = {"model": "./base", "data": "many.csv", "task": "classify", "steps": 60, "learning_rate": 1e-2}
    options |= {"validation_share": 0.35, "training": {"eval_steps": 6, "save_steps": 6}}

    def stop(line: str) -> None:
        if line.startswith(f"Step {step}:"):
            signal.raise_signal(signal.SIGINT)

    train(TrainConfig.from_dict(options | {"output": "alone"}), announce=lambda line: None)
    with pytest.raises(Interrupted):
        train(TrainConfig.from_dict(options | {"output": "cut"}), announce=stop)
    train(TrainConfig.from_dict(options | {"output": "cut"}), resume=True, announce=lambda line: None)
    weights = [Path(name, "adapter_model.safetensors").read_bytes() for name in ("alone", "cut")]
    assert weights[0] == weights[1]
    assert read_shrunk(Path("cut")) == read_shrunk(Path("alone")) is not None
