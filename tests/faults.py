"""One-line faults, and which test notices each: a net under every redesign.

python -m tests.faults cover       # run the tests once under coverage: which test runs which line (20 minutes)
python -m tests.faults             # put in one fault after the other, and run the tests of its line (half an hour);
                                   # without `cover`, only the test that noticed it last
python -m tests.faults --only 7,12 # some of them

`cover` needs `pip install pytest-cov`. The list is in faults.json: file, line, what it becomes, and the test that
noticed. A line that has moved is found by its text; one that is gone is reported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
LIST, COVERAGE = Path(__file__).with_suffix(".json"), ROOT / "lrlora-compress" / "faults" / "coverage"
AT_MOST = 60  # seconds of tests of a line, the quickest first
AT_ONCE, LIMIT, MEMORY = 2, 600, 16 << 30  # faults; seconds and bytes for the tests of each


@dataclass
class Fault:
    """One line that is wrong.

    Args:
        kind: sign, off by one, dropped check, wrong default or swallowed error.
        file: below the project's root.
        line: text of the line as it is.
        occurrence: which of the lines of that text, from 0.
        fault: text that takes its place.
        caught: the first test that failed; None where none did.
        why: no user could notice it.

    """

    kind: str
    file: str
    line: str
    occurrence: int
    fault: str
    caught: str | None = None
    why: str | None = None

    def place(self, root: Path) -> tuple[Path, int] | None:
        """Where the line is now: a file and an index of its lines."""
        own = [index for index, text in enumerate(_lines(root / self.file)) if text == self.line]
        if len(own) > self.occurrence:
            return root / self.file, own[self.occurrence]
        found = [
            (path, index)
            for path in sorted((root / "src").rglob("*.py"))
            for index, text in enumerate(_lines(path))
            if text.strip() == self.line.strip()
        ]
        return found[0] if len(found) == 1 else None

    def put_in(self, root: Path) -> tuple[Path, int] | None:
        """Write the fault into a copy of the project."""
        place = self.place(root)
        if place:
            lines = _lines(place[0])
            indent = lines[place[1]][: len(lines[place[1]]) - len(lines[place[1]].lstrip())]
            lines[place[1]] = indent + self.fault.strip()
            place[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
        return place


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def cover() -> None:
    """Which test runs which line, the tests' subprocesses included."""
    COVERAGE.parent.mkdir(parents=True, exist_ok=True)
    for old in COVERAGE.parent.glob("coverage*"):
        old.unlink()
    settings = COVERAGE.with_name("settings")
    settings.write_text(
        f"[run]\nsource_pkgs = lrlora, lrlora_lab\ndata_file = {COVERAGE}\nparallel = true\npatch = subprocess\n"
        "sigterm = true\n"
        "context = ${PYTEST_CURRENT_TEST-}\n"
    )
    options = ["--cov", f"--cov-config={settings}", "--cov-context=test", "--cov-report="]
    times = ["--junitxml", str(COVERAGE.with_name("times.xml"))]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", *options, *times]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})


def tests_of(fault: Fault, place: tuple[Path, int], root: Path) -> list[str]:
    """The tests that run a line: first the one that noticed before, then the quickest."""
    if not COVERAGE.exists():
        return [fault.caught] if fault.caught else []
    from xml.etree import ElementTree

    from coverage.numbits import numbits_to_nums

    times: dict[str, float] = {}
    for case in ElementTree.parse(COVERAGE.with_name("times.xml")).iter("testcase"):
        parts = (case.get("classname") or "").replace(".", "/")
        times[f"{parts}.py::{case.get('name')}"] = float(case.get("time") or 0)
    of_line, of_file = set(), set()
    with sqlite3.connect(COVERAGE) as data:
        rows = data.execute(
            "SELECT context.context, line_bits.numbits FROM line_bits JOIN file ON file.id = file_id "
            "JOIN context ON context.id = context_id WHERE file.path LIKE ?",
            (f"%/{place[0].relative_to(root)}",),
        )
        for context, bits in rows:
            of_file.add(context.split("|")[0])
            if place[1] + 1 in numbits_to_nums(bits):
                of_line.add(context.split("|")[0])
    # A default runs when its module is imported, in no test.
    found = of_line & times.keys() or of_file
    chosen, seconds = [], 0.0
    for each in sorted(found & times.keys(), key=lambda each: times[each]):
        seconds += times[each]
        chosen += [each] if seconds < AT_MOST and each != fault.caught else []
    return ([fault.caught] if fault.caught else []) + chosen


def run(fault: Fault, number: int) -> NoReturn:
    """Put a fault into a copy, and run the tests of its line; this process, a fork, then ends."""
    scratch = Path(tempfile.mkdtemp(prefix=f"fault-{number}-"))
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, scratch / name)
    place = fault.put_in(scratch)
    tests = tests_of(fault, place, scratch) if place else []
    log = COVERAGE.with_name(f"{number}.log")
    log.write_text("" if place else "GONE")
    if tests:
        _test(scratch, tests, log)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def _test(root: Path, tests: list[str], log: Path) -> None:
    """Run tests in this process, until one fails."""
    os.chdir(root)
    sources = [str(root / "src"), str(root / "lab")]
    os.environ["PYTHONPATH"] = os.pathsep.join(sources)
    sys.path[:0] = [str(root), *sources]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "lrlora", "lrlora_lab")]:
        del sys.modules[name]
    written = os.open(log, os.O_WRONLY)
    os.dup2(written, 1)
    os.dup2(written, 2)
    signal.alarm(LIMIT)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    options = ["-x", "-q", "--tb", "line", "-rfE", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not slow"]
    # A library has imported a pytest plugin (anyio) before, which warns.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    pytest.main([*options, *tests])
    sys.stdout.flush()


def run_all(faults: list[Fault], only: set[int]) -> None:
    """Two at a time, each in a fork that has imported torch."""
    COVERAGE.parent.mkdir(parents=True, exist_ok=True)
    for name in ("torch", "transformers", "transformers.trainer", "peft", "datasets", "typer", "pandas", "scipy.stats"):
        importlib.import_module(name)
    waiting, running = [number for number in range(len(faults)) if number in only], {}
    while waiting or running:
        if waiting and len(running) < AT_ONCE:
            number = waiting.pop(0)
            child = os.fork()
            if child == 0:
                run(faults[number], number)
            running[child] = (number, time.perf_counter())
            continue
        child, status = os.wait()
        number, start = running.pop(child)
        fault, said = faults[number], COVERAGE.with_name(f"{number}.log").read_text()
        failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said, re.MULTILINE)
        fault.caught = failed[0] if failed else None
        if said == "GONE":
            outcome = "GONE"
        elif os.waitstatus_to_exitcode(status) not in (0, -signal.SIGALRM):
            outcome = fault.caught = f"the tests themselves: status {os.waitstatus_to_exitcode(status)}"
        else:
            outcome = f"caught by {fault.caught}" if fault.caught else f"NOT CAUGHT ({fault.why})"
        print(f"{number:2} {fault.kind}: {fault.file}: {fault.fault.strip()[:100]}", flush=True)
        print(f"   {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
        LIST.write_text(json.dumps([asdict(each) for each in faults], indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "cover"), default="run")
    parser.add_argument("--only", help="numbers of faults, from 0, with commas between")
    options = parser.parse_args()
    if options.what == "cover":
        cover()
        return
    faults = [Fault(**each) for each in json.loads(LIST.read_text())]
    run_all(faults, {int(each) for each in options.only.split(",")} if options.only else set(range(len(faults))))


if __name__ == "__main__":
    main()
