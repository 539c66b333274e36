"""One card: what it runs right, what it costs there, and the users' recipe; `lrlora-lab gpu`.

The parts are in an order in which an interrupted hour still tells something. Without a card, each part runs on the CPU
with tiny models, which shows that the command works, and fills no page.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lrlora.files import write_whole

from ..metamath import ENTRIES, FOLDER, write_experiment
from ..sections import table
from . import Job, Measurement, card_speed
from .card_speed import Record

PEFT = "https://github.com/huggingface/peft"
TESTS = Path("tests") / "gpu"
_TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
_TINY |= {"num_attention_heads": 2}


@dataclass(frozen=True)
class Part:
    """A part of the hour.

    Attributes:
        title: in words.
        minutes, gib: estimated time and memory, on an H100; never measured.

    """

    title: str
    minutes: int
    gib: int


PARTS = {
    "kernels": Part("versions, card and the self-test of the kernels", 1, 1),
    "tests": Part("tests of the paths that depend on the card", 6, 2),
    "speed": Part("a layer of 7B; steps and generation of 1B", 8, 24),
    "recipe": Part("the users' recipe: Llama-3.2-1B on Capybara, three methods, one seed", 25, 40),
    # PEFT's own LoRA took 19 minutes and 21 GiB on an L40S.
    **{f"metamath--{name.replace('/', '-')}": Part(f"MetaMathQA by PEFT's script: {name}", 15, 24) for name in ENTRIES},
}


def _call(*command: str) -> str:
    """Output of a command; raises with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {' / '.join(said[-3:])}")
    return done.stdout


def kernels(is_tiny: bool, _: Path) -> Record:
    """Versions, the card, and whether the Triton kernels pass their self-test on it."""
    facts = {name: version(name) for name in ("torch", "peft")}
    if not is_tiny:
        from lrlora.ops.gpu import is_sound  # needs Triton, which only Linux has

        result = "pass" if is_sound(torch.device("cuda")) else "fail"
        facts["GPU"] = f"{torch.cuda.get_device_name()}, whose Triton kernels {result} their self-test"
    return {"facts": facts}


def tests(is_tiny: bool, _: Path) -> Record:
    """Numbers of passed, skipped and failed tests of `TESTS`, and the names of the failed."""
    if not TESTS.exists():
        raise FileNotFoundError(f"{TESTS} does not exist. Run the command in a checkout of lrlora.")
    chosen = "gpu and not slow" if is_tiny else "gpu"
    command = (sys.executable, "-m", "pytest", "-q", "-n0", "-m", chosen, "--tb=line", "-rf", str(TESTS))
    output = subprocess.run(command, capture_output=True, text=True).stdout
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output)}
    if "passed" not in counts and "failed" not in counts:
        raise RuntimeError(f"pytest ran no test: {output.strip().splitlines()[-1:]}")
    failed = [line.removeprefix("FAILED ") for line in output.splitlines() if line.startswith("FAILED ")]
    return {**counts, "which": failed}


def speed(is_tiny: bool, _: Path) -> Record:
    """See `card_speed`."""
    if is_tiny:
        model = card_speed.measure_model("cpu", _TINY, (2, 66), new_tokens=2, rounds=1)
        return {"records": card_speed.measure("cpu", ((48, 32),), 16, 1) + model}
    return {"records": card_speed.measure("cuda") + card_speed.measure_model("cuda")}


def recipe(is_tiny: bool, files: Path) -> Record:
    """Loss, trained parameters and time of LoRA and fitted ranks, by `lrlora-lab compare users-gpu`."""
    suite, options = "users-gpu", ["--methods", "lora,lora+r=4,learned+r=4", "--rates", "2e-4", "--seeds", "1"]
    if is_tiny:
        suite, options = "smoke", ["--methods", "lora,learned", "--rates", "2e-3", "--seeds", "1", "--steps", "12"]
    folder = files / "recipe"
    _call(sys.executable, "-m", "lrlora_lab", "compare", suite, *options, "--output", str(folder))
    rows = [json.loads(path.read_text()) for path in sorted((folder / "jobs").glob("*.json"))]
    return {"rows": [{name: row[name] for name in ("method", "test", "trainable", "seconds")} for row in rows]}


def metamath(name: str, is_tiny: bool, files: Path) -> Record:
    """Result of PEFT's script for an experiment; on the CPU, which it does not support, its files alone."""
    folder = files / "peft"
    if is_tiny:
        return {"written": str(write_experiment(folder, name))}
    if not (folder / FOLDER).exists():
        shutil.rmtree(folder, ignore_errors=True)
        _call("git", "clone", "--quiet", "--depth", "1", PEFT, str(folder))
    _call(sys.executable, "-m", "lrlora_lab.metamath", str(folder), name)
    path = next((folder / FOLDER).glob(f"*results/{name.replace('/', '--')}.json"))
    result = json.loads(path.read_text())
    last = result["train_info"]["metrics"][-1]
    return {
        "accuracy": last["test accuracy"],
        "forgetting": last["forgetting"],
        "seconds": result["train_info"]["train_time"],
        "mib": result["train_info"]["accelerator_memory_max"] / 2**20,
        "file_mib": result["train_info"]["file_size"] / 2**20,
    }


def _jobs() -> dict[str, Job]:
    """Jobs of this machine, named after its card."""
    is_tiny = not torch.cuda.is_available()
    card = "cpu" if is_tiny else torch.cuda.get_device_name().replace(" ", "-")
    runs: dict[str, Callable[[Path], Record]] = {
        run.__name__: partial(run, is_tiny) for run in (kernels, tests, speed, recipe)
    }
    runs |= {f"metamath--{name.replace('/', '-')}": partial(metamath, name, is_tiny) for name in ENTRIES}
    return {f"{card}--{name}": Job(run, is_timed=True) for name, run in runs.items()}


def plan() -> list[str]:
    """A line per part, with its estimate."""
    lines = [f"{part.title}: about {part.minutes} min, {part.gib} GiB" for part in PARTS.values()]
    total = sum(part.minutes for part in PARTS.values())
    return [*lines, f"In all about {total / 60:.1f} hours on an H100, estimated, never measured."]


def sections(records: dict[str, Record]) -> dict[str, str]:
    """What each card did, and what it took beside the estimate."""
    cards: dict[str, dict[str, Record]] = {}
    for job, record in records.items():
        card, is_of_card, name = job.partition("--")
        if is_of_card:  # the page also has what `speed` measures
            cards.setdefault(card, {})[name] = record
    return {"gpu": "\n".join(_of_card(card.replace("-", " "), parts) for card, parts in cards.items()) or NOTHING}


NOTHING = (
    "No card was measured yet: the Triton kernels were run in Triton's interpreter only, on a CPU, where their results "
    "are compared with the formula in float64. Before their first use on a card they test themselves, and plain "
    "PyTorch runs where they fail. `lrlora-lab gpu`, in a checkout, tests and measures a card, goes on after an "
    "interruption, and writes the tables here; `--dry-run` prints its parts and estimates.\n"
)


def fill_readme() -> None:
    """Replace the README's limit, in a checkout, by the card."""
    path = Path("README.md")
    limit = "nothing measured on a GPU"
    if path.exists() and limit in (text := path.read_text(encoding="utf-8")):
        write_whole(path, text.replace(limit, f"one GPU ([{torch.cuda.get_device_name()}](docs/speed.md))"))


def told(output: Path) -> str:
    """What the finished parts in a folder of results found."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted((output / "jobs").glob("*.json"))}
    return sections(records)["gpu"]


def _of_card(card: str, parts: dict[str, Record]) -> str:
    lines = [f"### {card}\n"]
    if "kernels" in parts:
        lines.append("; ".join(f"{name} {fact}" for name, fact in parts["kernels"]["facts"].items()) + "\n")
    if "tests" in parts:
        tests = parts["tests"]
        which = f": {', '.join(tests['which'])}" if tests["which"] else ""
        lines.append(f"Tests: {tests.get('passed', 0)} passed, {tests.get('failed', 0)} failed{which}\n")
    if "speed" in parts:
        lines.append(card_speed.render(parts["speed"]["records"]))
    if "recipe" in parts:
        rows = [
            [row["method"], f"{row['test']['loss']:.4f}", f"{row['trainable']:,}", f"{row['seconds']:.3g}"]
            for row in parts["recipe"]["rows"]
        ]
        lines.append(table(["users' recipe", "test loss", "trained parameters", "seconds a step"], rows))
    rows = [
        [name, f"{100 * p['accuracy']:.1f} %", f"{p['forgetting']:.2f}", f"{p['seconds']:,.0f}", f"{p['file_mib']:.1f}"]
        for name in ENTRIES
        if "accuracy" in (p := parts.get(f"metamath--{name.replace('/', '-')}", {}))
    ]
    if rows:
        lines.append(table(["MetaMathQA", "accuracy on GSM8K", "forgetting", "seconds", "file, MiB"], rows))
    rows = [
        [part.title, str(part.minutes), f"{parts[name]['wall'] / 60:.1f}"]
        for name, part in PARTS.items()
        if name in parts
    ]
    lines.append(table(["part", "minutes, estimated for an H100", "minutes"], rows))
    return "\n".join(lines)


MEASUREMENT = Measurement("docs/speed.md", _jobs(), sections, is_trial=not torch.cuda.is_available())
