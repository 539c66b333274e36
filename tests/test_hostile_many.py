"""A thousand hostile adapters and run folders: each ends with a result or one clear error, in bounded time and memory.

Every field of every file is changed in turn. Each command runs in a fork of this process, which has imported all.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any

import datasets
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, HiraConfig, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModel
from typer.testing import CliRunner

from lrlora.cli import app
from lrlora.train.run import Interrupted, train
from lrlora.train.settings import TrainConfig
from lrlora.views import page
from lrlora_lab import queue

from .test_robustness import run_here
from .train.small import reviews, save_encoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="forks, and bounds memory as Linux does"),
]
SECONDS, MEMORY = 10, 2**30  # of a processor, and beyond what this process has, that one command may take
PATIENCE = 60  # seconds, whatever it does in them
OF_ADAPTER = (
    "ranks {} --base ./base --json out.json",
    "report {} --output out.html",
    "export {} --energy 0.9 --output out",
    "merge {} --output out",
)
OF_RUN = (
    *(command.format("run") for command in OF_ADAPTER),
    "evaluate run --data data.csv --json out.json",
    "predict run --data data.csv --output out.jsonl",
    "train --start-from run --output out",
)
RESUME, COMPARE = ("train --resume cut",), ("compare suite.yaml --report --output compared",)
PEFT = {"lora": LoraConfig, "hira": HiraConfig, "loha": LoHaConfig, "vera": VeraConfig, "adalora": AdaLoraConfig}
# A file, the commands that read it, and how many examples of it there are: 1,000 in all.
CASES: list[tuple[str, tuple[str, ...], int]] = [
    *(
        (f"{name}/adapter_config.json", tuple(command.format(name) for command in OF_ADAPTER), count)
        for name, count in zip(PEFT, (100, 40, 40, 35, 55), strict=True)
    ),
    ("run/adapter_config.json", OF_RUN, 90),
    ("run/run.json", OF_RUN[1:], 110),
    ("run/metrics.json", OF_RUN[1:2], 15),
    ("run/ranks.json", OF_RUN[1:2], 60),
    ("run/log_history.json", OF_RUN[1:2], 30),
    ("run/rank_history.jsonl", OF_RUN[1:2], 40),
    ("cut/run.json", RESUME, 70),
    ("cut/checkpoint-2/trainer_state.json", RESUME, 60),
    ("cut/checkpoint-2/run_record.json", RESUME, 55),
    ("compared/jobs/reviews--lora--0.001--0.json", COMPARE, 30),
    ("compared/comparison.json", COMPARE, 20),
    ("lora/adapter_model.safetensors", tuple(command.format("lora") for command in OF_ADAPTER), 70),
    ("run/adapter_model.safetensors", OF_RUN, 80),
]
HOW = (*("replace",) * 4, "remove", "rename")
NUMBERS = (-1, 0, 1, 7, 10**7, 2**63, -(2**64), 10**400, 0.5, -1e-300, 1e308, *map(float, ("nan", "inf", "-inf")))
WORDS = ("", "nan", "LORA", "VERA", "SEQ_CLS", "all-linear", "pissa", "eva", "lora_only", "bfloat16", "I8", "F64")
TRICKS = (
    *("../../x", "/dev/zero", "file:///etc/passwd", "~", ".", "CON", "./base", "..%2f", "$(id)", "{0.__class__}"),
    *("\0", "\ud800", "\x1b[31mred", "a\nb", "\u202e", "é" * 300, "x" * 10**6, "a." * 5000, "[bold]", "<script>"),
    *("((.+)+)+Z", "(a|a)*b", "(" * 500, "[", "(?P<x>", ".*" * 30, "(?<=a{0,65535}){9}", "a{1,99999}{1,99999}"),
)
NESTED: tuple[Any, ...] = (None, True, [], {}, [[]], [{}], {"": []}, {"default": None}, [0] * 10**5, {"query": 10**30})
DEEP: Any = []
for _ in range(600):
    DEEP = [DEEP]
VALUES = st.sampled_from((*NUMBERS, *WORDS, *TRICKS, *NESTED, DEEP)) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(TRICKS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: adapters, a finished run, one that was cut short, and a comparison."""
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 1, "learning_rate": 0.05}
    run = {"model": "./base", "data": "data.csv", "task": "classify", "rank_every": 1, "adapter": {"r": 2}}
    task = {"data": "data.csv", "task": "classify", "metric": "accuracy", "steps": 2, "test": "train"}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("inputs")
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # What the page is drawn with is always the same, and takes a second to bundle.
        patch.setattr(page, "_charts_library", lambda: "")
        patch.setattr(queue, "_run", run_here)
        save_encoder(folder / "base")
        reviews(32).rename(columns={"review": "text", "verdict": "label"}).to_csv("data.csv", index=False)
        for name, kind in PEFT.items():
            planned = {"total_step": 9} if name == "adalora" else {}
            save_adapter(name, kind(target_modules=["query", "value"], **planned))
        train(TrainConfig.from_dict(run | {"output": "run", "training": training}), announce=lambda line: None)
        with pytest.raises(Interrupted):
            train(
                TrainConfig.from_dict(run | {"output": "cut", "training": training}),
                announce=lambda line: signal.raise_signal(signal.SIGINT) if line.startswith("Step 1:") else None,
            )
        Path("suite.yaml").write_text(yaml.safe_dump({"model": "./base", "tasks": {"reviews": task}}))
        compare = "compare suite.yaml --methods lora --rates 1e-3 --seeds 1 --output compared"
        done = CliRunner().invoke(app, compare.split())
        assert done.exit_code == 0, done.output
        yield folder


def save_adapter(name: str, config: Any) -> None:
    model: PeftModel = get_peft_model(AutoModel.from_pretrained("./base"), config)
    for key, weight in model.named_parameters():
        if "_B." in key or "hada_" in key:
            torch.nn.init.normal_(weight)
    model.save_pretrained(name)


def parts_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Of safetensors a few entries of the header, all others, which are like them, and the data."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = list(json.loads(content[8:start]).items())
    return dict(entries[:3]), dict(entries[3:]), content[start:]


def unpacked(path: Path) -> Any:
    """The values in a file; of safetensors the length of the header and of all, None for true ones, and entries."""
    if path.suffix == ".safetensors":
        return {"length": None, "size": None, "header": {"__metadata__": {"format": "pt"}, **parts_of(path)[0]}}
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write(path: Path, values: Any) -> None:
    """The opposite, into a file that is there."""
    if path.suffix == ".safetensors":
        _, others, data = parts_of(path)
        first = values.get("header")
        header = json.dumps({**first, **others} if isinstance(first, dict) else first).encode()
        length, size = (
            given if isinstance(given, (int, NoneType)) else len(repr(given))
            for given in (values.get("length"), values.get("size"))
        )
        content = (len(header) if length is None else abs(length) % 2**64).to_bytes(8, "little") + header + data
        path.write_bytes(content if size is None else content[: size % len(content)])
    elif path.suffix == ".jsonl" and isinstance(values, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in values))
    else:
        path.write_text(json.dumps(values))


def places(values: Any, *above: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value below; of a list to the first alone."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values[:1]):
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from places(value, *above, key)


def changed(values: Any, place: tuple[Any, ...], how: str, value: Any) -> Any:
    """The values with the one at a place replaced, removed, or under another name."""
    values = copy.deepcopy(values)
    holder = values
    for key in place[:-1]:
        holder = holder[key]
    before = holder[place[-1]]
    holder[place[-1]] = value
    if how != "replace" and isinstance(holder, dict):
        del holder[place[-1]]
        if how == "rename":
            holder[value if isinstance(value, str) else str(value)[:99]] = before
    return values


def run_in_fork(command: str) -> tuple[int, str]:
    """The exit status of a command, negative for a signal, and what it has said, with what was raised beyond that."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, -1))
            result = CliRunner().invoke(app, command.split(), env={"COLUMNS": "500"})
            said = result.output
            if not isinstance(result.exception, (SystemExit, type(None))):
                said += "".join(traceback.format_exception(result.exception))
            Path("said").write_text(said, encoding="utf-8", errors="replace")
            status = result.exit_code
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), Path("said").read_text(encoding="utf-8") if Path("said").exists() else ""


def wrong_with(command: str) -> str | None:
    """What a command does that none should, in the current folder."""
    status, said = run_in_fork(command)
    errors = re.findall("(?m)^Error: .+", said)
    if status in (-signal.SIGALRM, -signal.SIGXCPU):
        return "takes too long"
    if status not in (0, 1, 2) or "Traceback" in said or "This error is unexpected" in said:
        return f"ends with status {status}: {said[-3000:]}"
    if status and len(errors) != 1:
        return f"says {len(errors)} errors: {said[-3000:]}"
    if left := sorted(map(str, Path().rglob("*.partial"))):
        return f"leaves {left}"
    for path in (path for path in Path().glob("out*") if path.suffix in (".json", ".jsonl")):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{command} wrote {name}"))
    return None


@pytest.mark.parametrize(("file", "commands", "count"), CASES, ids=[case[0] for case in CASES])
def test_hostile_files(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, file: str, commands: tuple[str, ...], count: int
) -> None:
    values, found = unpacked(inputs / file), []
    turn = itertools.cycle(places(values))

    @settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(command=st.sampled_from(commands), how=st.sampled_from(HOW), value=VALUES)
    def give(command: str, how: str, value: Any) -> None:
        place = next(turn)
        with TemporaryDirectory() as scratch:
            shutil.copytree(inputs, scratch, dirs_exist_ok=True)
            monkeypatch.chdir(scratch)
            write(Path(file), changed(values, place, how, value))
            if wrong := wrong_with(command):
                found.append(f"{command}, with {file} {how} {place} {value!r:.200}: it {wrong}")
            monkeypatch.chdir(inputs)

    give()
    assert found == [], "\n\n".join(found)
