"""The study of the paper's claims: which runs come next, the likelihood of choices, and the tables of its rows."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrlora_lab.cli import app
from lrlora_lab.commonsense import Question, evaluate, log_likelihoods
from lrlora_lab.jobs import Job
from lrlora_lab.paper import FIRST_RATES, PARTS, ROWS, Paper, Part, tune
from lrlora_lab.paper_report import claims, mean_ranks, records_of, scores
from lrlora_lab.tables import fitted_ranks

from .. import cli

run = partial(cli.run, app=app)
PART = Part(("lora", "lr-lora"), tasks=("cola", "mrpc"), tuned_on=("cola",), seeds=2)
MODULES = [
    f"layer.{layer}.{place}"
    for layer in range(4)
    for place in ("attention.query", "attention.value", "mlp.fc1", "mlp.fc2")
]


def row(job: Job, **measured: Any) -> dict[str, Any]:
    identity = {"task": job.task, "method": job.method, "learning_rate": job.learning_rate, "seed": job.seed}
    return {**identity, "scale": 1.0, "seconds": 1.0, "wall": 60, **measured}


def of_trials(method: str, losses: dict[float, float]) -> dict[str, Any]:
    jobs = {rate: Job("cola", method, rate, 0) for rate in losses}
    return {job.name: row(job, criterion=losses[rate]) for rate, job in jobs.items()}


def test_choices_that_share_a_prompt_are_as_likely_as_each_one_alone() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).eval()
    batch = [
        Question([3, 4, 5], [[6], [7, 8, 9], [10, 11]], [1, 1, 1], 1),
        Question([12, 13, 14, 15, 16, 17], [[18, 19], [20, 21]], [1, 1], 0),
    ]
    with torch.no_grad():
        together = log_likelihoods(model, batch)
        for question, scores_of in zip(batch, together, strict=True):
            for choice, score in zip(question.choices, scores_of, strict=True):
                ids = torch.tensor([question.prompt + choice])
                alone = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(choice) :, 0]
                torch.testing.assert_close(score, alone)
    loss = -torch.cat([together[0][1], together[1][0]]).mean().item()
    assert evaluate(model, batch)["loss"] == pytest.approx(loss)


def test_the_longest_choice_wins_only_by_its_likelihood_per_character() -> None:
    class Sure:
        def __call__(self, input_ids: Any, logits_to_keep: int, **_: Any) -> Any:
            logits = torch.zeros(len(input_ids), logits_to_keep, 10)
            return type("Output", (), {"logits": logits})  # each token costs ln 10

    question = Question([1], [[2], [3, 4]], [1, 5], 1)
    assert evaluate(Sure(), [question]) == {"score": 1.0, "guess": 0.5, "loss": pytest.approx(math.log(10))}
    assert evaluate(Sure(), [Question([1], [[2], [3, 4]], [1, 1], 1)])["score"] == 0.0


@pytest.mark.parametrize(
    ("losses", "next_rates", "chosen"),
    [
        ({5e-4: 0.5}, FIRST_RATES, None),
        ({5e-4: 0.5, 1e-3: 0.4, 2e-3: 0.45}, FIRST_RATES, 1e-3),
        ({5e-4: 0.5, 1e-3: 0.4, 2e-3: 0.3}, (*FIRST_RATES, 4e-3), None),
        ({5e-4: 0.5, 1e-3: 0.4, 2e-3: 0.3, 4e-3: 0.35}, (*FIRST_RATES, 4e-3), 2e-3),
        ({5e-4: 0.3, 1e-3: 0.4, 2e-3: 0.5}, (*FIRST_RATES, 2.5e-4), None),
    ],
)
def test_the_grid_grows_until_the_best_rate_is_inside(
    losses: dict[float, float], next_rates: tuple[float, ...], chosen: float | None
) -> None:
    jobs, rate = tune(PART, "lora", of_trials("lora", losses))
    assert [job.learning_rate for job in jobs] == list(next_rates)
    assert rate == chosen


def test_a_trial_that_diverged_is_no_rate() -> None:
    finished = of_trials("lora", {5e-4: 0.5, 1e-3: 0.4, 2e-3: 0.3})
    failed = Job("cola", "lora", 4e-3, 0)
    _, rate = tune(PART, "lora", {**finished, failed.name: row(failed, failure="The loss is not finite.")})
    assert rate == 2e-3


def test_runs_come_task_by_task_with_all_seeds_once_all_methods_have_a_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrlora_lab.paper.PARTS", (PART,))
    study = Paper(tmp_path)
    finished = of_trials("lora", {5e-4: 0.5, 1e-3: 0.4, 2e-3: 0.45})
    assert {job.seed for job in study.plan(finished)} == {0}
    finished |= of_trials("lr-lora", {5e-4: 0.5, 1e-3: 0.45, 2e-3: 0.4, 4e-3: 0.5})
    jobs = [job for job in study.plan(finished) if job.name not in finished]
    assert [(job.task, job.seed, job.method, job.learning_rate) for job in jobs] == [
        (task, seed, method, rate)
        for task in ("cola", "mrpc")
        for seed in (1, 2)
        for method, rate in (("lora", 1e-3), ("lr-lora", 2e-3))
    ]


def test_results_become_rows_once(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    done = {job.name: row(job, criterion=0.4) for job in (Job("cola", "lora", 1e-3, 0), Job("mrpc", "lora", 1e-3, 0))}
    for name, content in done.items():
        (tmp_path / "jobs" / f"{name}.json").write_text(json.dumps(content))
    assert Paper(tmp_path).finished() == Paper(tmp_path).finished() == done
    assert len((tmp_path / ROWS).read_text().splitlines()) == 2
    assert not list((tmp_path / "jobs").iterdir())


def test_the_estimate_falls_with_the_runs_that_are_done(tmp_path: Path) -> None:
    before = run("paper", "--output", tmp_path, "--dry-run")
    assert before.exit_code == 0, before.output
    assert before.output.count("hours left") == len(PARTS)
    assert "DoRA on cola, mrpc, stsb, sst2, rte: 0 of about 66 runs" in before.output
    (tmp_path / ROWS).write_text(json.dumps(row(Job("cola", "dora", 1e-3, 0), criterion=0.4)) + "\n")
    after = run("paper", "--output", tmp_path, "--dry-run").output
    assert "DoRA on cola, mrpc, stsb, sst2, rte: 1 of about 66 runs" in after


def test_the_estimate_counts_the_trials_that_parts_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrlora_lab.paper.PARTS", (PART, Part(("lora",), tasks=("rte",), tuned_on=("cola",), seeds=2)))
    jobs = (Job("cola", "lora", 1e-3, 0), Job("rte", "lora", 1e-3, 1))
    (tmp_path / ROWS).write_text("".join(json.dumps(row(job, criterion=0.4)) + "\n" for job in jobs))
    first, second, _ = Paper(tmp_path).estimate()
    assert "1 of about 16 runs" in first  # two methods: four rates, two tasks with two seeds
    assert "1 of about 2 runs" in second


def written() -> list[dict[str, Any]]:
    """LoRA with ranks alike; LR-LoRA with ranks that double from layer to layer, and threefold in attention."""
    rows = []
    for seed in (1, 2, 3):
        for method, score in (("lora", 0.5), ("lr-lora", 0.52)):
            ranks = {}
            for number, module in enumerate(MODULES):
                rank = 2.0 + 0.01 * ((number * 7 + seed * 5) % 11)
                if method == "lr-lora":
                    rank *= (2 ** int(module.split(".")[1])) * (3 if "attention" in module else 1)
                ranks[module] = [rank, 2 * rank]
            test = {"cola": {"score": score + 0.01 * seed * (method == "lora"), "guess": 0.0, "loss": 1 - score}}
            rows.append(row(Job("cola", method, 1e-3, seed), criterion=0.4, ranks=ranks, test=test))
    return rows


def test_scores_are_compared_by_seed_with_lora_of_the_same_rank() -> None:
    alone = row(Job("cola", "lr-lora+r=1", 1e-3, 1), test={"cola": {"score": 0.9, "guess": 0.0, "loss": 0.1}})
    table = scores([*written(), alone]).set_index("method")
    difference = table.loc["LR-LoRA", "difference"]
    assert difference.value == pytest.approx(100 * (0.52 - 0.5) - 2)
    assert (difference.low, difference.high) == pytest.approx((-2.484, 2.484), abs=1e-3)  # t · 1 / √3
    assert table.loc["LR-LoRA", "difference (nats)"].value == pytest.approx(-0.02)
    assert table.loc["LoRA", "difference"] is None
    assert table.loc["LR-LoRA, r=1", "difference"] is None  # LoRA of r = 1 has no run


def test_ranks_that_lr_lora_moves_and_lora_does_not() -> None:
    records = records_of(written())
    table = fitted_ranks(records).set_index("method")
    for method in ("LR-LoRA", "LR-LoRA / LoRA"):
        assert table.loc[method, "layers differ: p"] < 0.05
        assert table.loc[method, "attention − MLP"].value == pytest.approx(math.log(3), abs=0.05)
    assert table.loc["LoRA", "layers differ: p"] > 0.05
    counts = claims(table.reset_index()).set_index("method")
    assert counts.loc["LR-LoRA / LoRA"].tolist() == [1, 1, 1, 0]
    assert counts.loc["LoRA", "layers differ on"] == 0
    means = mean_ranks(records).set_index("method")
    assert float(means.loc["LR-LoRA / LoRA", "stable rank, mlp"]) == pytest.approx(2**1.5, abs=0.01)
    assert float(means.loc["LoRA", "effective rank, all"]) == pytest.approx(4.1, abs=0.05)


def test_the_report_has_its_tables_and_map(tmp_path: Path) -> None:
    assert run("paper", "--output", tmp_path, "--report").exit_code == 1
    trials = of_trials("lora", {1e-3: 0.4, 2e-3: 0.5}).values()
    (tmp_path / ROWS).write_text("".join(json.dumps(each) + "\n" for each in [*trials, *written()]))
    result = run("paper", "--output", tmp_path, "--report")
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    assert "| cola | LR-LoRA | 0.001 | 3 | 0.0 | 52.0 ± 0.0 | 0.00 (-2.48 to 2.48) |" in report
    assert "| cola | LoRA | 0.4 | 0.5 |" in report
    assert (tmp_path / "ranks.png").stat().st_size > 0
