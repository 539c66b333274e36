"""Tasks on which rank binds, and the rank at which LoRA would reach the same loss."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lrlora.adapters import factorize
from lrlora.learned import LossCurve
from lrlora.learned.directions import Directions
from lrlora.train.embedded import SMOLLM2, checkpoint
from lrlora_lab.byte_model import ARCHITECTURES, Corpus
from lrlora_lab.capacity import CapacityTask, train_capacity
from lrlora_lab.capacity_report import losses, write_capacity_report
from lrlora_lab.cli import app
from lrlora_lab.jobs import TUNING_SEED, Comparison, Job, Record, check_folder, prepare, read_records
from lrlora_lab.methods import find_method
from lrlora_lab.rivals import CRITERIA, own_share
from lrlora_lab.smollm2 import LanguageModel, draw_phone_book, phone_book
from lrlora_lab.statistics import equivalent_rank
from lrlora_lab.suite import Suite, load_suite

from ..conftest import TinyModel

SEEDS = (1, 2, 3, 4, 5)


def falling(r: float, seed: int) -> float:
    """A loss that falls by 1 with every doubling of r, on a level of the seed's own."""
    return 4 + 0.1 * seed - math.log2(r)


CURVE = {r: {seed: falling(r, seed) for seed in SEEDS} for r in (1, 2, 4, 8)}


def test_the_equivalent_rank_is_where_lora_has_the_same_loss() -> None:
    found = equivalent_rank(CURVE, {seed: falling(3, seed) + 0.01 * (seed - 3) for seed in SEEDS})
    assert found is not None
    assert found.value == pytest.approx(3)
    assert found.low < 3 < found.high < 3.1
    assert (found.below, found.above) == (0, 0)


def test_the_equivalent_rank_never_leaves_the_curve() -> None:
    low, high = (equivalent_rank(CURVE, dict.fromkeys(SEEDS, loss)) for loss in (9.0, 0.0))
    assert low is not None
    assert high is not None
    assert (str(low), str(high)) == ("< 1.0", "> 8.0")  # an interval would tell of nothing
    assert (low.value, low.below) == (pytest.approx(1), len(SEEDS))
    assert (high.value, high.above) == (pytest.approx(8), len(SEEDS))
    assert equivalent_rank(CURVE, {99: 1.0}) is None  # no seed in common


def test_a_curve_that_rises_is_flattened() -> None:
    rising = {1: {1: 4.0}, 2: {1: 2.0}, 4: {1: 2.2}, 8: {1: 1.0}}
    found = equivalent_rank(rising, {1: 2.5})
    assert found is not None
    assert 1 < found.value < 2


def record(task: str, method: str, seed: int, loss: float, *, rank: int = 4, **others: Any) -> Record:
    found = {"task": task, "method": method, "learning_rate": 1e-2, "seed": seed, "scale": 4.0, "wall": 1.0}
    found |= {
        "criterion": loss,
        "test": {"loss": loss},
        "trainable": 3840,
        "seconds": 0.1,
        "hardware": "x",
        "ranks": None,
    }
    return {**found, **Comparison("capacity", rank=rank).facts(task, method), **others}


def filed(records: list[Record]) -> dict[str, Record]:
    return {Job(r["task"], r["method"], r["learning_rate"], r["seed"], r["scale"]).name: r for r in records}


def trials(method: str) -> list[Record]:
    """Of the tuning seed: best at a rate of 1e-2 and a scale of 4."""
    places = [(1e-2, 4.0), (5e-3, 4.0), (2e-2, 4.0), (1e-2, 1.0), (1e-2, 16.0)]
    losses = [1.0, 2.0, 2.0, 2.0, 2.0]
    made = [record("labels", method, 0, loss, scale=s) for loss, (_, s) in zip(losses, places, strict=True)]
    return [{**trial, "learning_rate": rate} for trial, (rate, _) in zip(made, places, strict=True)]


def climb(comparison: Comparison, criterion: Callable[[Job], float]) -> tuple[dict[str, Record], list[Job]]:
    """The trials that a comparison asks for, in turn, and the seeds that follow them."""
    finished: dict[str, Record] = {}
    while True:
        missing = [job for job in comparison.plan(finished) if job.name not in finished]
        if missing[0].seed != TUNING_SEED:
            return finished, missing
        finished |= filed(
            [
                record(job.task, job.method, job.seed, criterion(job), scale=job.scale)
                | {"learning_rate": job.learning_rate}
                for job in missing
            ]
        )


def test_rate_and_scale_are_tuned_until_the_best_is_inside() -> None:
    comparison = Comparison("capacity", ("lora+r=1",), 2, tasks=("labels",))
    task = comparison.definition.capacity_tasks["labels"]
    finished, missing = climb(
        comparison, lambda job: abs(math.log2(job.learning_rate / 4e-2)) + abs(math.log2(job.scale / 16))
    )
    assert [(job.learning_rate, job.scale, job.seed) for job in missing] == [(4e-2, 16.0, 1), (4e-2, 16.0, 2)]
    tried = {(r["learning_rate"], r["scale"]) for r in finished.values()}
    assert {(2e-2, 16.0), (8e-2, 16.0), (4e-2, 4.0), (4e-2, 64.0)} <= tried
    assert len(tried) < 3 * len(task.scales)  # not the whole grid


def test_a_climb_follows_a_ridge_on_which_half_the_rate_and_a_larger_scale_are_alike() -> None:
    comparison = Comparison("capacity", ("lora+r=1",), 1, tasks=("picture-labels",))

    def criterion(job: Job) -> float:  # the best is at 6.25e-4 and 256
        return 10 * abs(math.log2(job.learning_rate / 6.25e-4) + math.log2(job.scale / 256) / 2) - math.log2(job.scale)

    _, missing = climb(comparison, criterion)
    assert [(job.learning_rate, job.scale) for job in missing] == [(6.25e-4, 256.0)]


def test_a_method_without_a_scale_is_tuned_by_rate_alone_and_higher() -> None:
    plan = Comparison("capacity", ("hira+r=1", "lora+r=1+lora_alpha=2"), 1, tasks=("german",)).plan({})
    assert {job.scale for job in plan if job.method == "hira+r=1"} == {1.0}
    assert {job.scale for job in plan if job.method != "hira+r=1"} == {1.0}
    hira = Comparison("capacity", ("hira+r=1",), 1, tasks=("german",))
    _, missing = climb(hira, lambda job: abs(math.log2(job.learning_rate / 0.32)))
    assert [job.learning_rate for job in missing] == [0.32]


def test_a_folder_takes_more_tasks_but_no_other_settings(tmp_path: Path) -> None:
    def suite(**tasks: Any) -> str:
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({"model": "embedded:minilm", "tasks": tasks}))
        return str(path)

    small = {"task": "labels", "steps": 5, "batch_size": 4, "texts": 8}
    prepare(Comparison(suite(first=small), ("lora",)), tmp_path / "out")
    both = suite(first=small, second={**small, "methods": ["lora"]})
    prepare(Comparison(both, ("lora",)), tmp_path / "out")
    check_folder(Comparison(suite(first={**small, "methods": ["hira"]}), ("lora",)), tmp_path / "out")
    check_folder(Comparison(suite(second=small, third={**small}), ("lora",)), tmp_path / "out")  # one lost, one new
    with pytest.raises(FileExistsError, match="another comparison"):
        check_folder(Comparison(suite(first={**small, "steps": 6}), ("lora",)), tmp_path / "out")
    with pytest.raises(FileExistsError, match="another comparison"):
        check_folder(Comparison(suite(third=small), ("lora",)), tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("task", "label", "task"), ("steps", 0, "steps"), ("corpus", "latin", "corpus"), ("texts", -1, "texts")],
)
def test_bad_tasks_are_refused(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CapacityTask(**{"task": "labels", "steps": 5, "batch_size": 4, field: value})


def test_the_report_pairs_seeds_and_names_sizes(tmp_path: Path) -> None:
    records = [record("labels", f"lora+r={r}", seed, CURVE[r][seed]) for r in CURVE for seed in SEEDS]
    records += [record("labels", "expansion+r=1+num_terms=32", seed, falling(3, seed)) for seed in SEEDS]
    table = losses(filed(records), "labels").set_index(["method", "r"])
    row = table.loc["expansion", 1]
    assert row["LoRA's r for this loss"].value == pytest.approx(3)
    assert row["rank when served"] == 32
    assert row["step"] == pytest.approx(1)
    assert row["terms"] == 32
    comparison = Comparison("capacity", ("lora+r=1",), seeds=5)
    prepare(comparison, tmp_path)
    (tmp_path / "jobs").mkdir()
    methods = dict.fromkeys(r["method"] for r in records)
    for name, content in filed([*records, *(trial for method in methods for trial in trials(method))]).items():
        (tmp_path / "jobs" / f"{name}.json").write_text(json.dumps(content))
    assert read_records(tmp_path)
    text = write_capacity_report(comparison, tmp_path).read_text()
    assert "| expansion | 1 | 32 |" in text
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_report_knows_the_rank_of_a_bare_method_and_the_tuned_setting(tmp_path: Path) -> None:
    comparison = Comparison("capacity", ("lora", "lora+r=1"), 2, rank=2, tasks=("labels",))
    records = [record("labels", "lora", seed, falling(2, seed), rank=2) for seed in (1, 2)]
    records += [record("labels", "lora+r=1", seed, falling(1, seed)) for seed in (1, 2)]
    stray = record("labels", "lora", 1, 9.0, scale=16.0)  # at a setting that is not the best
    found = filed([*records, *trials("lora"), *trials("lora+r=1"), stray])
    table = losses(comparison.of_all(found).select(found), "labels").set_index("r")
    assert table.loc[2, "loss (nats)"] == pytest.approx(fmean(falling(2, seed) for seed in (1, 2)))
    assert table.loc[1, "loss (nats)"] == pytest.approx(fmean(falling(1, seed) for seed in (1, 2)))


def test_fitted_ranks_are_no_point_of_loras_curve() -> None:
    records = [record("german", f"lora+r={r}", seed, falling(r, seed)) for r in (2, 4, 8, 16) for seed in SEEDS]
    learned = [{"r": r, "stable_rank": 1.0} for r in (1, 6, 12)]
    records += [record("german", "learned", seed, falling(6, seed), ranks=learned) for seed in SEEDS]
    table = losses(filed(records), "german").set_index("method")
    row = table.loc["learned ranks"]
    assert (row["r"], row["rank when served"]) == (4, 12)
    assert row["LoRA's r for this loss"].value == pytest.approx(6, rel=0.2)


def test_a_single_rate_of_a_task_is_not_tuned() -> None:
    comparison = Comparison("rates", ("lora",), tasks=("german-0.005",), seeds=2)
    settings = {(job.learning_rate, job.scale, job.seed) for job in comparison.plan({})}
    assert settings == {(0.005, 4.0, 1), (0.005, 4.0, 2)}


def test_a_suite_of_both_kinds_is_refused() -> None:
    tasks = {
        "first": {"task": "labels", "steps": 5, "batch_size": 4},
        "second": {"task": "classify", "data": "x", "metric": "accuracy", "steps": 5},
    }
    with pytest.raises(ValueError, match="separate suites"):
        Suite.from_dict({"model": "embedded:minilm", "tasks": tasks})


@pytest.mark.refused
@pytest.mark.parametrize(("name", "value"), [("scale", 2.0), ("adapter", {"r": 2}), ("training", {"bf16": True})])
def test_what_is_not_read_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    content = {"model": "embedded:minilm", "tasks": {"first": {"task": "labels", "steps": 5, "batch_size": 4}}}
    content["methods"] = ["lora"]  # AdaLoRA, one of the main ones, needs the Trainer
    path = tmp_path / "suite.yaml"
    for suite, code in ((content, 0), ({**content, name: value}, 1)):
        path.write_text(yaml.safe_dump(suite))
        told = CliRunner().invoke(app, ["compare", str(path), "--dry-run"], env={"COLUMNS": "200"})
        assert told.exit_code == code
    said = f"Tasks on which rank binds (first) ignore {name}, got {value}. Remove it."
    assert said in " ".join(told.output.split())


def test_full_fine_tuning_starts_at_lower_rates() -> None:
    assert CapacityTask("labels", 5, 4).first_rates(find_method("full"))[0] < CapacityTask("labels", 5, 4).rates[0]


@pytest.mark.real
@pytest.mark.parametrize(
    "method",
    [
        *("lora+r=2", "learned", "learned+r=2+max_rank=1", *(f"learned+by={name}" for name in CRITERIA)),
        *("expansion+r=1", "dora+r=1", "full"),
    ],
)
def test_methods_learn_labels(method: str) -> None:
    task = CapacityTask("labels", 60, 16, texts=64, classes=4)
    known = find_method(method)
    found = train_capacity(task, known, 2, 4.0, learning_rate=1e-3 if method == "full" else 1e-2, seed=1)
    assert found["criterion"] < 1.2  # chance is 1.39
    if known.learns_ranks:
        assert found["trainable"] <= 2 * 2 * (384 + 1536)
        ranks = {row.r for row in found["ranks"].rows}
        assert (max(ranks) <= 1) == ("max_rank" in method)
        assert len(ranks) == 1 or known.cut.get("by") != "equal"
    again = train_capacity(task, known, 2, 4.0, learning_rate=1e-3 if method == "full" else 1e-2, seed=1)
    assert again["criterion"] == found["criterion"]


def test_fitted_ranks_train_in_a_byte_model_of_gpt2_s_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.arange(30_000).remainder(50).byte()
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["gpt2"](32, 1))
    monkeypatch.setattr("lrlora_lab.capacity_tasks.load_corpus", lambda name: Corpus(data, data, data))
    monkeypatch.setattr("lrlora_lab.capacity_tasks.TEST_WINDOWS", 8)
    monkeypatch.setattr("lrlora_lab.capacity_tasks.base_model", {"gpt2": model}.get)
    task = CapacityTask("transfer", 20, 4, architecture="gpt2")
    found = train_capacity(task, find_method("learned"), 2, 4.0, learning_rate=1e-2, seed=1)
    assert {row.module.rpartition(".")[2] for row in found["ranks"].rows} <= {"c_attn", "c_proj", "c_fc"}
    assert found["test"]["loss"] == found["test"]["base"] < 5.4  # chance is 5.55
    assert 0 < found["trainable"] <= 2 * (4 * 32 + 2 * 32 + 5 * 32 + 5 * 32)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("learned+by=energy", "Unknown criterion of fitted ranks 'energy'"),
        ("learned+at=1.5", "at must be a share of the steps"),
    ],
)
def test_criteria_and_cuts_that_do_not_exist_are_refused(tmp_path: Path, method: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        prepare(Comparison("rates", methods=(method,)), tmp_path / "out")


def test_fitted_ranks_of_another_size_are_compared_with_lora_of_that_size() -> None:
    known = find_method("learned+r=8")
    assert (known.facts(4)["r"], find_method("learned").facts(4)["r"]) == (8, 4)
    assert (known.size(4), known.adapter(4)["r"]) == ("r8", 32)


def test_modules_keep_a_share_of_their_own_rise() -> None:
    model = TinyModel("llama").build()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    rises = [torch.tensor([90.0, 5, 4, 1]), torch.tensor([3e-3, 3e-3, 2e-3, 1e-3])]
    factors = factorize(model, energy=1.0)
    curve = LossCurve([Directions(f, f.A, f.B, rises[f.module.endswith("down_proj")].double()) for f in factors])
    budget = sum(2 * part.parameters_per_rank for part in factors)
    kept = own_share(curve, budget, None)
    assert sum(part.parameters for part in kept) <= budget
    assert {part.rank for part in kept if part.module.endswith("down_proj")} == {2}  # 67 %; a third would not fit
    assert {part.rank for part in kept if part.module.endswith("q_proj")} == {1}  # 90 %
    # By loss, the modules with the larger rises keep more.
    by_loss = curve.within(budget)
    assert {part.rank for part in by_loss if part.module.endswith("q_proj")} == {4}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "german"])
def test_loras_own_loss_falls_steeply_with_its_rank(name: str) -> None:
    task = load_suite("capacity").capacity_tasks[name]
    chance = {"labels": 4.16, "german": 4.14}[name]
    ends = []
    for r in (1, 4, 16):
        method = find_method(f"lora+r={r}")
        runs = [train_capacity(task, method, 4, 4.0, learning_rate=1e-2, seed=seed) for seed in (1, 2)]
        ends.append(fmean(run["criterion"] for run in runs))
    assert ends[0] - ends[1] > 0.03 * chance
    assert ends[1] - ends[2] > 0.03 * chance


def test_the_loss_of_a_language_model_is_its_own() -> None:
    model = TinyModel("llama").build()
    windows = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(0))
    own = model(windows, labels=windows).loss
    assert LanguageModel(model)(windows).item() == pytest.approx(own.item(), rel=1e-6)


@pytest.mark.real
@pytest.mark.integration
def test_a_phone_book_is_learned_by_the_model_s_upper_layers() -> None:
    setting = phone_book(pairs=8, batch_size=4, seed=1)
    tokens, digits = draw_phone_book(pairs=8, seed=1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(SMOLLM2))  # whole, and in float32
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(SMOLLM2))
    text = tokenizer.decode(tokens[0].tolist() + tokenizer.encode(str(digits[0, -1].item())))
    assert re.fullmatch(r"\w+ \w+: \d{10}", text)
    assert text.endswith("".join(map(str, digits[0].tolist())))
    ids = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    with torch.no_grad():
        logits = model(tokens).logits[:, -10:, ids]
    loss = F.cross_entropy(logits.flatten(0, 1), digits.flatten()).item()
    measured = setting.test(setting.model)
    assert measured["loss"] == pytest.approx(loss, rel=0.02)
    assert measured["recalled"] == 0
    found = train_capacity(
        CapacityTask("phone-book", 50, 4, texts=4),
        find_method("lora"),
        8,
        4.0,
        learning_rate=1e-2,
        seed=1,
    )
    assert found["test"]["recalled"] == 1
    assert found["test"]["loss"] < 0.1 < loss
