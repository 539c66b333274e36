"""`lrlora-lab gpu` without a card, and the calls that it adds to PEFT's script."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import BatchEncoding

from lrlora_lab.cli import app
from lrlora_lab.measure import gpu, measurement, run_measurement
from lrlora_lab.metamath import ENTRIES, FOLDER, Entry, with_cut, write_experiment

from ..cli import run
from ..conftest import TinyModel

STEPS = 60


@pytest.mark.parametrize("name", ENTRIES)
def test_the_files_of_an_experiment_are_read_by_peft(name: str, tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, name)
    assert folder.parts[0] == "experiments"
    assert len(folder.parts) == 3
    config: Any = PeftConfig.from_pretrained(str(tmp_path / FOLDER / folder))
    assert type(config) is type(ENTRIES[name].config)
    assert (config.r, config.lora_alpha) == (32, 64)


class Tokenizer:
    """Pads at the right, with 0."""

    def pad(self, tokens: dict[str, list[list[int]]], return_tensors: str) -> BatchEncoding:
        rows = tokens["input_ids"]
        longest = max(map(len, rows))
        padded = {
            "input_ids": [row + [0] * (longest - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
        }
        return BatchEncoding(padded, tensor_type=return_tensors)


def sequences(count: int, seed: int) -> list[list[int]]:
    """Rows of 6 to 10 tokens, each the one before plus 1."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, 80, (count,), generator=generator).tolist()
    return [[start + i for i in range(6 + start % 5)] for start in starts]


@pytest.mark.parametrize("entry", [Entry(LoraConfig()), Entry(LoraConfig(), size="r2"), Entry(LoraConfig(), keep=0.9)])
def test_a_script_with_a_loop_of_its_own_cuts_before_its_test(entry: Entry) -> None:
    train, test = Dataset.from_dict({"input_ids": sequences(600, 0)}), Dataset.from_dict({"input_ids": [[1]]})
    tested: list[int] = []

    def evaluate(*, model: Any, tokenizer: Any, ds: Any) -> str:
        tested.append(sum(p.numel() for name, p in model.named_parameters() if "lora_" in name))
        return "accuracy"

    def make_optimizer(model: Any, *, max_steps: int, lr: float) -> tuple[Any, None]:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr), None

    script = SimpleNamespace(
        get_train_valid_test_datasets=lambda **options: (train, None, test),
        get_optimizer_and_scheduler=make_optimizer,
        evaluate=evaluate,
    )
    with_cut(script, entry)

    # As PEFT's script does.
    model: Any = get_peft_model(TinyModel("llama").build(), LoraConfig(r=8, target_modules="all-linear"))
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokenizer = Tokenizer()
    optimizer, _ = script.get_optimizer_and_scheduler(model, max_steps=STEPS, lr=1e-2)
    ds_train, _, ds_test = script.get_train_valid_test_datasets(tokenizer=tokenizer)
    for step in range(STEPS):
        batch = tokenizer.pad({"input_ids": ds_train[8 * step % 160 : 8 * step % 160 + 8]["input_ids"]}, "pt")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert script.evaluate(model=model.eval(), tokenizer=tokenizer, ds=ds_test) == "accuracy"
    if entry.size:
        assert tested[0] <= whole / 4
    elif entry.keep:
        assert tested[0] < whole
    else:
        assert tested[0] == whole


def test_the_plan_names_every_part_and_runs_nothing(tmp_path: Path) -> None:
    done = run("gpu", "--dry-run", "--output", tmp_path / "out", app=app)
    assert done.exit_code == 0, done.output
    assert [part for part in gpu.PARTS.values() if part.title not in done.output] == []
    assert {job.partition("--")[2] for job in measurement("gpu").jobs} == gpu.PARTS.keys()
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_all_parts_run_without_a_card_and_go_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    output = tmp_path / "out"
    assert run_measurement("gpu", output, "*kernels", announce=lambda line: None) == []
    before = (output / "jobs" / "cpu--kernels.json").stat().st_mtime_ns
    done = run("gpu", "--output", output, app=app)
    assert done.exit_code == 0, done.output
    assert "Left" not in done.output
    assert (output / "jobs" / "cpu--kernels.json").stat().st_mtime_ns == before
    records = {path.stem: json.loads(path.read_text()) for path in (output / "jobs").glob("*.json")}
    assert records.keys() == measurement("gpu").jobs.keys()
    assert records["cpu--tests"]["passed"] > 5
    assert not records["cpu--tests"]["which"]
    assert {row["method"] for row in records["cpu--recipe"]["rows"]} == {"lora", "learned"}
