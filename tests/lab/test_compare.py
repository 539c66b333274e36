"""A comparison as a user runs it: small, on a model and a table of their own, stopped and gone on with."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from scipy.stats import ttest_rel
from transformers import Trainer

import lrlora_lab
from lrlora.train.adapter_config import adapter_config
from lrlora_lab import jobs, pool
from lrlora_lab.cli import app
from lrlora_lab.figures import parameters_figure, ranks_figure, rates_figure, save_figure
from lrlora_lab.jobs import (
    PACKED_FILE,
    TUNING_SEED,
    Comparison,
    Job,
    best_trial,
    check,
    prepare,
    read_records,
    train_config,
)
from lrlora_lab.methods import METHODS, find_method
from lrlora_lab.report import write_report
from lrlora_lab.statistics import columns_differ, gap, holm, paired_difference, share_between_columns
from lrlora_lab.suite import Suite, load_suite
from lrlora_lab.tables import (
    against_reference,
    conditions,
    fitted_ranks,
    markdown,
    ranks_by_layer,
    results,
    tuning,
    variants,
)
from lrlora_lab.worker import run_job

from .. import cli
from ..conftest import TinyModel
from ..processes import LAB, Process
from ..train.small import reviews, save_encoder

SUITES = sorted(path.stem for path in (Path(lrlora_lab.__file__).parent / "suites").glob("*.yaml"))
COLUMNS = {"text": "review", "label": "verdict"}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of one task in a YAML file."""
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        reviews(120, seed).to_csv(tmp_path / "data" / f"{split}.csv", index=False)
    task = {"data": str(tmp_path / "data"), "task": "classify", "metric": "accuracy", "steps": 12, "batch_size": 8}
    content = {"model": save_encoder(tmp_path / "model"), "tasks": {"reviews": {**task, "columns": COLUMNS}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "suite.yaml"


def command(suite: Path, output: Path, *options: object) -> list[str]:
    return ["compare", str(suite), "--output", str(output), "--rank", "2", *map(str, options)]


run = partial(cli.run, app=app)


def facts(method: str) -> dict[str, Any]:
    """What jobs store of their method; of "sine", they alone know it."""
    if method == "sine":
        return {**facts("lr-lora"), "label": "fixed sine"}
    known = find_method(method)
    return {**known.facts(4), "rates": [*known.rates], "scales": [1.0]}


def record(task: str, method: str, rate: float, seed: int, loss: float, accuracy: float | None = None) -> Any:
    ranks = [
        {
            "module": f"layer.{i}.{kind}",
            "type": f"layer.{kind}",
            "kind": kind,
            "stable_rank": value + seed / 100,
            "energy99_rank": 3,
        }
        for i, (kind, value) in enumerate([("attention", 2.0), ("mlp", 1.1), ("attention", 2.5), ("mlp", 1.3)])
    ]
    return {
        **{"task": task, "method": method, "learning_rate": rate, "seed": seed, **facts(method)},
        **{"trainable": 10, "peak_mib": 100.0},
        **{
            "validation": {"loss": loss},
            "test": None if accuracy is None else {"accuracy": accuracy, "log_loss": 1 - accuracy},
        },
        **{"criterion": loss, "wall": 3.0},
        **{"ranks": ranks if method.startswith("l") else None, "seconds": 2.0 if method == "lr-lora" else 1.0},
    }


def filed(records: list[Any]) -> dict[str, Any]:
    return {Job(r["task"], r["method"], r["learning_rate"], r["seed"]).name: r for r in records}


def test_a_whole_comparison_and_its_report(suite: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("--methods", "lora,lr-lora", "--seeds", 2, "--rates", "1e-3,1e-2")
    result = run(*command(suite, output, *options))
    assert result.exit_code == 0, result.output
    assert "108 training, 12 validation, 120 test " in result.output
    records = read_records(output)
    comparison = Comparison(str(suite), ("lora", "lr-lora"), 2, 2, rates=(1e-3, 1e-2))
    assert list(conditions(comparison, records).iloc[0]) == ["reviews", 12, 8, 108, 12, 120]
    assert {job.name for job in comparison.plan(records)} == set(records)
    for name in ("report.md", "results.csv", "rates.png", "parameters.png", "ranks.png"):
        assert (output / name).stat().st_size > 0
    table = pd.read_csv(output / "results.csv")
    assert list(table["method"]) == ["LoRA", "LR-LoRA"]
    for method, key in (("LoRA", "lora"), ("LR-LoRA", "lr-lora")):
        final = [r for r in records.values() if r["method"] == key and r["seed"] > 0]
        assert len(final) == 2
        mean = 100 * np.mean([r["test"]["accuracy"] for r in final])
        assert table.set_index("method").loc[method, "mean"] == pytest.approx(mean)
        rates = {r["learning_rate"] for r in final}
        best = best_trial([r for r in records.values() if r["method"] == key and r["seed"] == 0])
        assert best is not None
        assert rates == {best["learning_rate"]}
        assert all(r["test"] is None for r in records.values() if r["seed"] == 0)
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("jobs/*")}
    (output / "runs" / next(iter(records))).mkdir()  # as one leaves it that is killed once its result is filed
    again = run(*command(suite, output, *options))  # nothing is done twice, and the report is the same
    assert again.exit_code == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in output.glob("jobs/*")}
    (output / "report.md").unlink()
    assert run("compare", suite, "--output", output, "--report").exit_code == 0
    assert "LR-LoRA" in (output / "report.md").read_text()
    changed = run("compare", suite, "--output", output, "--rank", 3)
    assert changed.exit_code == 1
    assert "contains another comparison" in " ".join(changed.output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"data", "model", "suite.yaml", "out"}
    assert list((output / "runs").iterdir()) == []


def test_jobs_run_at_once_until_time_is_up(suite: Path, tmp_path: Path) -> None:
    output, rates = tmp_path / "out", (1e-3, 1e-2, 3e-2)
    options = ("--methods", "lora", "--rates", ",".join(map(str, rates)), "--hours", 1e-4, "--jobs", 2)
    first, second, _ = (Job("reviews", "lora", rate, TUNING_SEED).name for rate in rates)
    result = run(*command(suite, output, *options))
    assert result.exit_code == 0, result.output
    assert re.search(r"\b4 jobs .*left", result.output)
    assert set(read_records(output)) == {first, second}
    assert "Validation loss" in (output / "report.md").read_text()
    held = f"from lrlora.locks import only_writer\nwith only_writer({str(output)!r}): print('held'); input()"
    holder = Process(held)
    assert holder.stdout.readline() == "held\n"
    refused = run(*command(suite, output, *options))
    holder.communicate()
    assert refused.exit_code == 1
    assert "Another process " in refused.output


def test_what_failed_from_outside_is_tried_again(suite: Path, tmp_path: Path) -> None:
    options = ("--methods", "lora", "--rates", "1e-2", "--seeds", 1)
    model = tmp_path / "model"
    model.rename(tmp_path / "away")
    result = run(*command(suite, tmp_path / "out", *options))
    assert re.search(r"Not done; .*again: .*\bmodel\b", " ".join(result.output.split()))
    assert read_records(tmp_path / "out") == {}
    (tmp_path / "away").rename(model)
    assert run(*command(suite, tmp_path / "out", *options)).exit_code == 0
    assert len(read_records(tmp_path / "out")) == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "nan" not in report  # one seed has no spread
    assert "Against LoRA" not in report  # and one method no rival


@pytest.mark.slow
def test_jobs_run_on_a_cluster_that_loses_a_node(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    options = ("--methods", "lora,lr-lora", "--rates", "1e-3,1e-2", "--seeds", 2)
    alone = run(*command(suite, tmp_path / "alone", *options))
    assert alone.exit_code == 0, alone.output
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    lost = threading.Thread(
        target=lambda: wait_until(lambda: any((tmp_path / "out").glob("jobs/*")), 300) and cluster.remove_node(second)
    )
    lost.start()
    try:
        done = run(*command(suite, tmp_path / "out", *options, "--ray", cluster.address))
    finally:
        lost.join()
        cluster.shutdown()
    assert done.exit_code == 0, done.output
    tables = [pd.read_csv(tmp_path / f / "results.csv")[["method", "mean"]] for f in ("out", "alone")]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks the system for child processes")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_worker_ends_with_its_parent(suite: Path, tmp_path: Path, how: signal.Signals) -> None:
    changed(suite, steps=10**6)
    parent = Process(LAB, *command(suite, tmp_path / "out", "--methods", "lora", "--rates", "1e-2"))

    def writers() -> list[int]:
        """Processes that write a job's log."""
        logs, found = {str(path.resolve()) for path in (tmp_path / "out").glob("logs/*")}, []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if logs & {file.path for file in process.open_files()}:
                    found.append(process.pid)
        return found

    try:
        assert wait_until(lambda: bool(writers()), 60)
    finally:
        parent.send_signal(how)
        parent.communicate()
    assert wait_until(lambda: not writers(), 60)  # it may be importing when its parent goes


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_a_task_of_one_step_is_one_and_one_without_steps_is_not() -> None:
    task = {"data": "data.csv", "task": "classify", "metric": "accuracy", "steps": 1, "batch_size": 1}
    assert Suite.from_dict({"model": "m", "tasks": {"reviews": task}}).tasks["reviews"].steps == 1
    with pytest.raises(ValueError, match=r"steps .*≥ 1, got 0"):
        Suite.from_dict({"model": "m", "tasks": {"reviews": {**task, "steps": 0}}})
    del task["steps"]
    with pytest.raises(ValueError, match=r"task reviews .*: .*steps"):
        Suite.from_dict({"model": "m", "tasks": {"reviews": task}})


def test_runs_at_other_rates_are_no_part_of_a_cell() -> None:
    comparison = Comparison("offline-nlu", ("lora",), 1, 4, ("r8",), rates=(1e-3,))
    records = filed([record("r8", "lora", 1e-3, 1, 0.5, 0.8)])  # one rate needs no tuning
    others = filed([record("r8", "lora", 1e-2, 1, 0.5, 0.1), record("r8", "lora", 1e-3, 2, 0.5, 0.1)])
    assert comparison.select(records | others) == records


def test_a_failed_final_run_leaves_no_mean() -> None:
    comparison = Comparison("offline-nlu", ("lora", "lr-lora"), 2, 4, ("r8",))
    good = [record("r8", method, 1e-3, seed, 0.5, 0.8) for method in ("lora", "lr-lora") for seed in (1, 2)]
    bad = {"task": "r8", "method": "lora", "learning_rate": 1e-3, "seed": 2, "failure": "diverged", **facts("lora")}
    assert list(results(comparison, filed(good) | filed([bad]))["method"]) == ["LR-LoRA"]


def test_the_grid_grows_until_the_best_rate_is_inside(tmp_path: Path) -> None:
    comparison = Comparison("offline-nlu", ("lora",), 3, 4, ("r8",))
    rates = METHODS["lora"].rates
    losses = {rate: 1 / rate for rate in rates}  # the higher, the better
    records = filed([record("r8", "lora", rate, 0, loss) for rate, loss in losses.items()])
    assert [job.learning_rate for job in comparison.plan(records)] == [*rates, 2 * rates[-1]]
    records |= filed([record("r8", "lora", 2 * rates[-1], 0, 1e9)])
    final = [job for job in comparison.plan(records) if job.seed != TUNING_SEED]
    assert [(job.learning_rate, job.seed) for job in final] == [(rates[-1], seed) for seed in (1, 2, 3)]
    steep = filed([record("r8", "lora", rate * 2**k, 0, 1 / rate / 2**k) for rate in rates for k in (0, 1, 2, 3)])
    assert max(job.learning_rate for job in comparison.plan(steep)) <= 4 * rates[-1]  # it does not grow for ever


def test_a_language_model_is_tuned_at_lower_rates() -> None:
    plan = Comparison("commonsense", ("lora",), 1).plan({})
    assert [job.learning_rate for job in plan] == [0.25 * rate for rate in METHODS["lora"].rates]


def test_failed_trials_are_never_the_best() -> None:
    good, bad = record("t", "lora", 1e-3, 0, 0.5), {"learning_rate": 1e-2, "failure": "diverged"}
    assert best_trial([good, bad]) is good
    assert best_trial([bad]) is None


def test_numbers_of_the_results() -> None:
    comparison = Comparison("offline-nlu", ("lora", "lr-lora", "sine"), 3, 4, ("r8", "movie-reviews"))
    accuracies = {
        "lora": (0.80, 0.82, 0.81),
        "lr-lora": (0.83, 0.84, 0.86),
        "sine": (0.80, 0.83, 0.81),
    }
    records = filed(
        [
            record(task, method, 1e-3, seed, 0.5, value)
            for task in ("r8", "movie-reviews")
            for method, values in accuracies.items()
            for seed, value in enumerate(values, start=1)
        ]
    )
    table = results(comparison, records).set_index(["task", "method"]).sort_index()
    row = table.loc["r8", "LR-LoRA"]
    assert row["mean"] == pytest.approx(84.333, abs=1e-3)
    assert row["difference"] == pytest.approx(10 / 3)
    assert row["time"] == 2.0
    raw = [ttest_rel(accuracies[m], accuracies["lora"]).pvalue for m in ("lr-lora", "sine")]
    assert row["p"] == pytest.approx(min(1, 4 * raw[0]))  # the smallest of four comparisons, twice
    assert math.isnan(table.loc["r8", "LoRA"]["p"])
    moved = {name: r | {"hardware": "another"} if r["method"] == "sine" else r for name, r in records.items()}
    times = results(comparison, moved).set_index(["task", "method"])["time"]["r8"]
    assert times["LR-LoRA"] == 2.0
    assert math.isnan(times["fixed sine"])  # seconds of other hardware say nothing
    found = table.reset_index()
    told = against_reference(comparison, found).set_index("method")
    assert "LoRA" not in told.index
    assert list(told.loc["LR-LoRA"]) == [2, 0, 0, 2, pytest.approx(10 / 3)]  # better by 3 points, and p = 0.2
    found.loc[(found["task"] == "r8") & (found["method"] == "LR-LoRA"), "p"] = 0.01
    found.loc[(found["task"] == "r8") & (found["method"] == "fixed sine"), ["difference", "p"]] = -1, 0.04
    told = against_reference(comparison, found).set_index("method")
    assert list(told.loc["LR-LoRA"])[:4] == [2, 1, 0, 1]
    assert list(told.loc["fixed sine"])[:4] == [2, 0, 1, 1]
    against = variants(comparison, records).set_index(["task", "method", "of"]).sort_index().loc["r8", "fixed sine"]
    assert list(against["difference"]) == pytest.approx([-3, 3])  # of the metric, and of the loss
    assert against.loc["accuracy", "from"] < -3 < against.loc["accuracy", "to"]
    assert table.loc[("r8", "LoRA"), "loss"] == pytest.approx(19)
    ranks = fitted_ranks(records)
    assert all(share.value > 0.9 for share in ranks["share of modules"])
    assert all(difference.low > 0.4 for difference in ranks["attention − MLP"])


def test_only_tasks_with_all_seeds_of_both_methods_count() -> None:
    comparison = Comparison("offline-nlu", ("lora", "lr-lora", "dora"), 2, 4)

    def runs(task: str, method: str, accuracy: float, seeds: int = 2) -> list[Any]:
        return [record(task, method, 1e-3, seed, 0.5, accuracy) for seed in range(1, seeds + 1)]

    found = filed(
        [
            *runs("r8", "lora", 0.8),
            *runs("r8", "lr-lora", 0.7),
            *runs("r8", "dora", 0.9, seeds=1),  # not all of its seeds
            *runs("ratings", "lora", 0.8),  # nobody else
            *runs("20-newsgroups", "lr-lora", 0.9),  # no reference
            *runs("movie-reviews", "dora", 0.9),
            *runs("movie-reviews", "lora", 0.8),
        ]
    )
    found = {name: r | {"test": r["test"] | {"pearson": 0.5, "rmse": 0.5}} for name, r in found.items()}
    told = against_reference(comparison, results(comparison, found)).set_index("method")
    assert dict(told["tasks"]) == {"LR-LoRA": 1, "DoRA": 1}
    single = Comparison("offline-nlu", ("lora", "lr-lora"), 1, 4)
    table = results(single, filed([*runs("r8", "lora", 0.8, 1), *runs("r8", "lr-lora", 0.9, 1)]))
    assert table["difference"].tolist()[1] == pytest.approx(10)  # a difference, but no certainty
    assert table["p"].isna().all()
    assert list(against_reference(single, table)["undecided on"]) == [1]


def test_ranks_are_told_of_modules_that_all_seeds_have() -> None:
    """A method may take its adapter off modules whose rank went elsewhere, which differ from seed to seed."""
    comparison = Comparison("offline-nlu", ("lora",), 3, 4, ("r8",))
    records = [record("r8", "lora", 1e-3, seed, 0.5, 0.8) for seed in (1, 2, 3)]
    for r in records:
        r["ranks"] = [
            {"module": f"layers.{i}.{kind}", "type": f"layers.{kind}", "kind": kind, "stable_rank": value + i}
            for kind, value in (("attention", 2.0), ("mlp", 1.0))
            for i in range(4)
            if (i, kind) != (r["seed"], "mlp")
        ]
    places = ranks_by_layer(comparison, filed(records))["r8", "LoRA"]
    assert {layer for kind, layer in places if kind == "layers.mlp"} == {0}
    assert places["layers.attention", 3] == 5.0
    records[0]["ranks"], records[1]["ranks"] = (records[2]["ranks"],) * 2
    row = fitted_ranks(filed(records)).iloc[0]
    assert row["attention − MLP"].value == pytest.approx(np.log([2, 3, 4, 5]).mean() - np.log([1, 2, 3]).mean())
    assert math.isnan(row["share of layers"])  # of two types, one lacks a layer


def test_modules_of_one_place_are_averaged() -> None:
    """As the experts of a mixture are."""
    found = record("r8", "lr-lora", 1e-3, 1, 0.5, 0.8)
    found["ranks"] = [
        {"module": f"layers.0.experts.w1.{i}", "type": "layers.experts.w1", "kind": "mlp", "stable_rank": float(i)}
        for i in (1, 2, 3)
    ]
    comparison = Comparison("offline-nlu", ("lr-lora",), 1, 4, ("r8",))
    assert ranks_by_layer(comparison, filed([found])) == {("r8", "LR-LoRA"): {("layers.experts.w1", 0): 2.0}}


def test_a_failed_rate_is_told_from_one_that_was_not_tried() -> None:
    bad = {"task": "r8", "method": "lora", "learning_rate": 1e-2, "seed": 0, "failure": "diverged", **facts("lora")}
    records = filed([record("r8", "lora", 1e-3, 0, 0.5)]) | filed([bad])
    table = tuning(records)
    assert markdown(table).endswith("| r8 | LoRA | 0.5 | failed |")
    crosses = [line for line in rates_figure(records, table).axes[0].lines if line.get_marker() == "x"]
    assert [list(map(float, cross.get_xdata())) for cross in crosses] == [[1e-2]]  # type: ignore[arg-type]


def test_what_is_left_counts_the_seeds_at_a_rate_to_be_found() -> None:
    comparison = Comparison("offline-nlu", ("lora", "lr-lora"), 3, 4, ("r8",))
    assert len(comparison.cells_left(comparison.plan({}))) == 2 * (4 + 3)


def test_statistics() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert paired_difference([], []) is None
    alone = paired_difference([1.0], [2.0])
    assert alone is not None
    assert alone.value == -1
    assert math.isnan(alone.p)
    for same in ([1.0, 2.0], [0.1, 1.1]):  # two equal differences are no certainty
        assert math.isnan(paired_difference([1.1, 2.1], same).p)
    chance = np.random.default_rng(0)
    noise = chance.normal(size=(4, 30))
    assert columns_differ(noise) > 0.05
    assert columns_differ(noise / 10 + np.linspace(0, 1, 30)) < 0.01
    # The part of the variance that a module's own level makes: 1 of 1 + 0.5².
    parted = share_between_columns(chance.normal(size=300) + 0.5 * chance.normal(size=(3, 300)))
    assert parted.low < 0.8 < parted.high
    assert parted.high - parted.low < 0.1
    assert share_between_columns(noise).low < 0 < share_between_columns(noise).high
    difference = paired_difference([3.0, 5.0, 4.5], [1.0, 2.0, 2.5])
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx(ttest_rel([3, 5, 4.5], [1, 2, 2.5]).confidence_interval())
    difference, d = gap(chance.normal(2, 2, 400), chance.normal(0, 2, 400))
    assert difference.low < 2 < difference.high
    assert d.low < 1 < d.high
    assert d.high - d.low < 0.4


def test_a_method_is_drawn_alike_in_all_panels() -> None:
    """Tasks may have different methods, and none may lack in the legend."""
    comparison = Comparison("offline-nlu", ("lora", "sine", "lr-lora"), 2, 2)
    cells = [("r8", "sine"), ("r8", "lora"), ("r8", "lr-lora"), ("20-newsgroups", "lora"), ("20-newsgroups", "lr-lora")]
    records = filed([record(task, method, 1e-3, seed, 0.5, 0.8) for task, method in cells for seed in (0, 1, 2)])
    figures = (parameters_figure(comparison, records), rates_figure(records, tuning(records)))
    for figure in figures:
        assert {text.get_text() for text in figure.legends[0].get_texts()} == {"LoRA", "fixed sine", "LR-LoRA"}
        colors: dict[str, set[Any]] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                line = handle[0] if isinstance(handle, tuple) else handle
                colors.setdefault(label, set()).add(line.get_color())
        assert {len(own) for own in colors.values()} == {1}
        assert len(set.union(*colors.values())) == 3
    places = ranks_by_layer(comparison, records)
    assert set(places) == {(task, facts(method)["label"]) for task, method in cells if method != "sine"}
    assert ranks_figure(places).axes[0].get_title() == "r8, LoRA"


def test_a_record_that_lacks_something_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    whole = record("r8", "lora", 1e-3, 0, 0.5)
    (tmp_path / "jobs" / "a.json").write_text(json.dumps({k: v for k, v in whole.items() if k != "criterion"}))
    with pytest.raises(ValueError, match=r"a\.json .*damaged .*\bcriterion\b"):
        read_records(tmp_path)
    (tmp_path / "jobs" / "a.json").write_text(json.dumps({k: v for k, v in whole.items() if k != "label"}))
    with pytest.raises(ValueError, match=r"a\.json .*damaged .*'label'"):
        read_records(tmp_path)
    (tmp_path / "jobs" / "a.json").write_text(json.dumps(whole))
    assert read_records(tmp_path) == {"a": whole}
    packed = json.dumps({"job": "b", **{k: v for k, v in whole.items() if k != "criterion"}})
    (tmp_path / PACKED_FILE).write_bytes(gzip.compress(packed.encode()))
    with pytest.raises(ValueError, match=rf"{PACKED_FILE} .*damaged .*\bb lacks criterion\b"):
        read_records(tmp_path)


def test_results_outlive_their_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"lora": 0.5, "dora": 0.4}
    tried = [record("r8", method, 1e-3 * 2**k, 0, losses[method] + abs(k)) for method in losses for k in range(-1, 4)]
    final = [record("r8", method, 1e-3, seed, 0.5, losses[method]) for method in losses for seed in (1, 2, 3)]
    comparison = Comparison("offline-nlu", tuple(losses), 3, 4, ("r8",))
    prepare(comparison, tmp_path)
    (tmp_path / "jobs").mkdir()
    for name, found in filed([*tried, *final]).items():
        (tmp_path / "jobs" / f"{name}.json").write_text(json.dumps(found))
    before = write_report(comparison, tmp_path).read_text()
    assert "| r8 | DoRA | 0.001 | 3 |" in before
    monkeypatch.delitem(METHODS, "dora")
    assert run("compare", "offline-nlu", "--output", tmp_path, "--report").exit_code == 0
    assert (tmp_path / "report.md").read_text() == before
    check(comparison, tmp_path)  # it can go on, too
    with pytest.raises(ValueError, match="Unknown method 'dora'"):
        check(replace(comparison, seeds=4), tmp_path)


def test_updates_of_zero_are_drawn(tmp_path: Path) -> None:
    save_figure(ranks_figure({("r8", "LoRA"): {("query", 0): 0.0}}), tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 0


def test_wrong_wishes_are_refused(suite: Path, tmp_path: Path) -> None:
    def wrong(name: str, value: object, place: str | None = None) -> Path:
        content = yaml.safe_load(suite.read_text())
        (content.setdefault(place, {}) if place else content["tasks"]["reviews"])[name] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    for arguments, message in (
        (("compare", "offline-nlp"), r"'offline-nlp'.* offline-nlu\?"),
        (("compare", tmp_path / "none.yaml"), r"no configuration file .*none\.yaml"),
        (("compare", suite, "--methods", "lrlora"), r"'lrlora'.* lr-lora\?"),
        (("compare", suite, "--tasks", "review"), r"'review'.* reviews\?"),
        (("compare", suite, "--rates", "0"), r"\brates .*> 0"),
        (("compare", suite, "--rates", "1e-3,x"), r"--rates .*comma-separated"),
        (("compare", suite, "--report"), r"no comparison in"),
        (("compare", suite, "--ablation", "gains"), r"'gains'.* gain\?"),
        (("compare", suite, "--ablation", "gain", "--methods", "lora"), "Remove --methods"),
        (("compare", suite, "--methods", "learned+max_rank=3"), "does not support"),
        (("compare", "capacity", "--methods", "adalora", "--tasks", "labels"), "needs the Trainer"),
        (("compare", "capacity", "--model", "bert"), r"models, got model=bert\b"),
        (("compare", suite, "--methods", "lr-lora+num_bases=5"), r"'num_bases'.* num_basis\?"),
        (("compare", suite, "--methods", "adalora+r=8"), r"method adalora .*\br\..*target_r=8"),
        (("compare", suite, "--methods", "lora,lora+size=r4"), r"field of LoraConfig 'size'"),
        (("compare", wrong("warmup_step", 3, "training")), r"'warmup_step'.* warmup_steps, a"),
        (("compare", wrong("metric", "acuracy")), r"'acuracy'.* accuracy\?"),
        (("compare", wrong("task", "clasify")), r"'clasify'.* classify\?"),
        (("compare", wrong("rate_scale", 0.0)), r"rate_scale .*> 0, got 0\.0"),
        (("compare", wrong("columns", None)), r"columns .*map"),
    ):
        for options in ((), ("--dry-run",)):
            result = run(*arguments, "--output", tmp_path / "out", *options)
            assert result.exit_code == 1
            assert re.search(message, " ".join(result.output.split())), result.output
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    plan = run("compare", suite, "--output", tmp_path / "out", "--dry-run")
    assert plan.exit_code == 1
    assert "no comparison" in " ".join(plan.output.split())
    with pytest.raises(FileExistsError, match="no comparison"):
        prepare(Comparison(str(suite)), tmp_path / "out")


def test_options_of_a_method_may_be_lists(suite: Path, tmp_path: Path) -> None:
    methods = ("lora+target_modules=[query,value]", "lora")
    options = command(suite, tmp_path / "out", "--methods", ", ".join(methods), "--rates", "1e-3", "--seeds", 1)
    plan = run(*options, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert methods[0].replace("lora+", "LoRA, ") in plan.output
    result = run(*options)
    assert result.exit_code == 0, result.output
    ranks = {r["method"]: r["ranks"] for r in read_records(tmp_path / "out").values() if r["seed"] == 1}
    assert set(ranks) == set(methods)
    assert {row["module"].rpartition(".")[2] for row in ranks[methods[0]]} == {"query", "value"}
    with pytest.raises(ValueError, match=r"\[query"):
        find_method("lora+target_modules=[query")


def changed(suite: Path, **settings: object) -> Path:
    """The suite with other settings of its task."""
    content = yaml.safe_load(suite.read_text())
    content["tasks"]["reviews"] |= settings
    suite.write_text(yaml.safe_dump(content))
    return suite


def test_a_job_that_cannot_run_is_reported_and_run_again_by_the_same_command(suite: Path, tmp_path: Path) -> None:
    options = ("--methods", "lora", "--rates", "1e-2", "--seeds", 1)
    config = tmp_path / "model" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"hidden_size"', '"hidden"'))
    result = run(*command(suite, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    assert "1 job failed" in result.output
    assert [bool(r["failure"]) for r in read_records(tmp_path / "out").values()] == [True]
    assert "What failed" in (tmp_path / "out" / "report.md").read_text()
    config.write_text(whole)
    again = run(*command(suite, tmp_path / "out", *options))
    assert again.exit_code == 0, again.output
    assert [r.get("failure") for r in read_records(tmp_path / "out").values()] == [None]


def test_a_run_that_diverged_is_a_result(suite: Path, tmp_path: Path) -> None:
    options = command(suite, tmp_path / "out", "--methods", "lora", "--rates", "1e30", "--seeds", 1)
    assert run(*options).exit_code == 0
    (file,) = (tmp_path / "out" / "jobs").iterdir()
    before = file.stat().st_mtime_ns
    assert "diverged" in read_records(tmp_path / "out")[file.stem]["failure"]
    assert run(*options).exit_code == 0
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"text": "nothing"}}, r"Task reviews: columns .*\btext to 'nothing'"),
        ({"test": "held-out"}, r"no split held-out\..*: train, test\b"),
        (
            {"data": "train.csv"},
            r"no split test\..*: train\. .*\btest: SPLIT.*\btest_data: FILE",
        ),
        ({"data": "odd.csv"}, r"Task reviews: .*odd\.csv cannot be read: .*','"),
    ],
)
def test_data_is_read_before_anything_runs(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path / "data")
    reviews(20, 0).to_csv("odd.csv", index=False, sep=";")
    changed(suite, **settings)
    for options in (("--dry-run",), ()):
        result = run(*command(suite, tmp_path / "out", *options))
        assert result.exit_code == 1
        assert re.search(message, " ".join(result.output.split()))
    assert not (tmp_path / "out").exists()


def test_a_suite_reads_data_as_train_does(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "data")
    for name, count in (("mine.csv", 60), ("held-out.csv", 30)):
        frame = reviews(count, 2).assign(verdict=lambda rows: rows["verdict"].mask(rows.index == 1))
        frame.to_csv(name, index=False, sep=";", encoding="latin-1")
    reading = {"delimiter": ";", "encoding": "latin-1", "skip_empty": True}
    changed(suite, data="mine.csv", test_data="held-out.csv", metric=None, **reading)
    options = ("--methods", "lora", "--rates", "1e-2", "--seeds", 1)
    plan = run(*command(suite, tmp_path / "out", *options, "--dry-run"))
    assert "53 training, 6 validation, 29 test " in plan.output
    result = run(*command(suite, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    (final,) = (r for r in read_records(tmp_path / "out").values() if r["seed"] == 1)
    assert 0 <= final["test"]["accuracy"] <= 1
    assert final["examples"] == {"train": 53, "validation": 6, "test": 29}


@pytest.mark.real
@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_planned(name: str, tmp_path: Path) -> None:
    result = run("compare", name, "--output", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"Plan: {name} on " in result.output
    assert not (tmp_path / "out").exists()


# Those that take ways of their own, and one that `lrlora train` does not offer; the others differ in fields of the
# adapter.
# PEFT, of AdaLoRA, which it saves with modules of rank 0 and keys of its own in `rank_pattern`.
@pytest.mark.filterwarnings(r"ignore:Adapter 'default'. 4 LoRA tensor\(s\) have invalid shape:UserWarning:peft\.")
@pytest.mark.filterwarnings(r"ignore:The following rank_pattern keys did not match:RuntimeWarning:peft\.")
@pytest.mark.parametrize("method", ["full", "adalora", "lr-lora", "learned", "pissa", "hira"])
def test_every_kind_of_method_runs(suite: Path, tmp_path: Path, method: str) -> None:
    request = {"task": "reviews", "method": method, "learning_rate": 1e-3, "seed": 1, "rank": 2}
    result = run_job(load_suite(str(suite)), request, tmp_path / "run")
    assert result["method"] == method
    assert 0 <= result["test"]["accuracy"] <= 1
    assert math.isfinite(result["validation"]["loss"])
    assert result["trainable"] > 0
    assert result["hardware"]
    assert bool(result["ranks"]) == METHODS[method].has_ranks


def test_a_long_run_goes_on_where_it_was_stopped(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "_SAVE_STEPS", 3)
    request = {"task": "reviews", "method": "lora", "learning_rate": 1e-3, "seed": 1, "rank": 2}
    whole = run_job(load_suite(str(suite)), request, tmp_path / "whole")
    step, done = Trainer.training_step, itertools.count()

    def die_in_the_eighth(*arguments: Any) -> Any:
        if next(done) == 7:
            raise MemoryError
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", die_in_the_eighth)
        with pytest.raises(MemoryError):
            run_job(load_suite(str(suite)), request, tmp_path / "cut")
    capsys.readouterr()
    found = run_job(load_suite(str(suite)), request, tmp_path / "cut")
    assert "Resuming from step 6." in capsys.readouterr().out
    assert (found["validation"], found["test"]) == (whole["validation"], whole["test"])


def test_a_job_has_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more, the Trainer would take batches larger than the task's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pool.gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert pool.gpus(2) == ["5", "6"]


@pytest.mark.real
@pytest.mark.slow
def test_every_method_runs_on_a_real_model(tmp_path: Path) -> None:
    """A few steps of each on MiniLM; tuning and one final run."""
    methods = ",".join(METHODS)
    result = run(
        "compare", "smoke", "--methods", methods, "--rates", "1e-3", "--seeds", 1, "--output", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    records = read_records(tmp_path / "out").values()
    assert not [r["failure"] for r in records if r.get("failure")]
    assert {r["method"] for r in records if r["seed"] == 1} == set(METHODS)


def test_methods_with_other_options() -> None:
    method = find_method("lr-lora+num_basis=50+interval=2")
    assert method.name == "LR-LoRA, num_basis=50, interval=2"
    assert method.adapter(4) == {"r": 4, "num_basis": 50, "interval": 2}
    assert find_method("lora+r=1").adapter(4) == {"r": 1}
    with pytest.raises(ValueError, match="name=value"):
        find_method("lora+r")


def scaling(method: str, tiny: TinyModel, options: dict[str, Any]) -> float:
    """s of a layer that a method adapts."""
    config = adapter_config(find_method(method).train, {}, 100, {**options, **tiny.targets})
    assert config is not None
    model: Any = get_peft_model(tiny.build(), config)
    return next(module.scaling["default"] for module in model.modules() if isinstance(module, BaseTunerLayer))


@pytest.mark.parametrize(("method", "s"), [("lora", 2), ("lora-2r", 2), ("rslora", 4), ("lora+lora_alpha=16", 4)])
def test_the_scale_of_a_suite_is_alpha_by_r_unless_a_method_has_an_alpha(
    tiny_bert: TinyModel, tmp_path: Path, method: str, s: int
) -> None:
    """So rsLoRA differs from LoRA by √r, and a method does what its name says."""
    suite = replace(load_suite("smoke"), scale=2.0)
    config = train_config(suite, "r8", find_method(method), 1e-3, 1, 4, tmp_path)
    assert scaling(method, tiny_bert, config.adapter) == s
    plain = train_config(load_suite("smoke"), "r8", find_method("rslora"), 1e-3, 1, 4, tmp_path)
    assert scaling("rslora", tiny_bert, plain.adapter) == 2


@pytest.mark.parametrize("method", ["lora", "lora-4r", "rslora", "rslora+r=9", "lr-lora+use_rslora=true", "dora"])
@pytest.mark.parametrize("s", [0.25, 1.0, 4.0])
def test_a_scale_that_is_tuned_is_that_of_the_update(tiny_bert: TinyModel, method: str, s: float) -> None:
    assert scaling(method, tiny_bert, find_method(method).adapter(4, s)) == pytest.approx(s)
