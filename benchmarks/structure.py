"""Code size and data-flow length: PYTHONPATH=COMMIT/src python benchmarks/structure.py.

Counts, for the imported lrlora: lines (code, docstrings and comments), files, packages and imports between them,
functions that take Any, command-line options, configuration fields; and the path of two values through the files: a
run's configuration through `train`, and an adapted layer's input through a step.
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tempfile
import tokenize
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer
from peft import get_peft_model
from torch import nn

import lrlora
from lrlora import LrLoraConfig
from lrlora.cli import app

SOURCE = Path(lrlora.__file__).parents[1]
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0].startswith("lrlora"))


def lines() -> dict[str, int]:
    """Lines of code, docstrings, comments only, and empty lines."""
    found = dict.fromkeys(("code", "docstrings", "comments", "empty"), 0)
    for path in FILES:
        text = path.read_text()
        quoted: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            value = node.value if isinstance(node, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                quoted |= set(range(value.lineno, (value.end_lineno or value.lineno) + 1))
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        noted = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.strip().startswith("#")}
        for number, line in enumerate(text.splitlines(), 1):
            kind = (
                "docstrings"
                if number in quoted
                else "comments"
                if number in noted
                else "code"
                if line.strip()
                else "empty"
            )
            found[kind] += 1
    return found


def package_of(module: str) -> str:
    """Folder or single module below lrlora that contains a module."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "lrlora" else parts[0]


def imports() -> set[tuple[str, str]]:
    """Pairs of packages (importer, imported)."""
    found = set()
    for path in FILES:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        own = list(parts[:-1])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = own[: len(own) - node.level + 1] if node.level else []
                target = ".".join([*base, *([node.module] if node.module else [])])
                if target.startswith("lrlora"):
                    found.add((package_of(".".join(parts)), package_of(target)))
    return {(a, b) for a, b in found if a != b and "lrlora" not in (a, b)}


def depth(arrows: set[tuple[str, str]]) -> int:
    """Longest import chain between packages."""
    below: dict[str, int] = {}

    def of(package: str, seen: tuple[str, ...] = ()) -> int:
        if package not in below:
            after = [b for a, b in arrows if a == package and b not in seen]
            below[package] = 1 + max((of(b, (*seen, package)) for b in after), default=0)
        return below[package]

    return max(of(a) for a, _ in arrows)


def functions_with_any() -> int:
    """Functions with a parameter of type Any, or a container of it."""
    count = 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                count += any(each.annotation is not None and "Any" in ast.unparse(each.annotation) for each in given)
    return count


def options() -> int:
    """Of all commands."""
    commands: Any = typer.main.get_command(app)
    return sum(len(command.params) for command in commands.commands.values())


def course(run: Callable[[], Any], travels: Callable[[Any], bool]) -> dict[str, int]:
    """Calls within lrlora that receive a value, their files, and returns to a file left before."""
    entered: list[str] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(SOURCE)) and not frame.f_code.co_name.startswith("<"):
            given = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
            if any(travels(frame.f_locals.get(name)) for name in given):
                entered.append(file)

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    stays = [file for at, file in enumerate(entered) if not at or entered[at - 1] != file]
    return {"calls": len(entered), "files": len(set(stays)), "returns": len(stays) - len(set(stays))}


def course_of_x() -> dict[str, int]:
    """Input of an adapted layer, and tensors that share its data, in a forward and a backward."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LrLoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()  # warm-up: compilation and registration
    place = x.data_ptr()
    return course(
        lambda: model(x).sum().backward(), lambda value: isinstance(value, torch.Tensor) and value.data_ptr() == place
    )


def course_of_a_run() -> dict[str, int]:
    """Configuration of a run through `train`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.train.small import reviews, save_encoder

    try:
        from lrlora.train.run import train
        from lrlora.train.settings import TrainConfig
    except ImportError:  # commits before the folder was renamed
        from lrlora.lab.config import TrainConfig  # type: ignore[no-redef]
        from lrlora.lab.train import train  # type: ignore[no-redef]
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(Path(folder) / "base")
        reviews().to_csv(f"{folder}/reviews.csv", index=False)
        config = TrainConfig.from_dict(
            {
                "model": f"{folder}/base",
                "data": f"{folder}/reviews.csv",
                "task": "classify",
                "output": f"{folder}/run",
                "columns": {"text": "review", "label": "verdict"},
                "training": {"max_steps": 2, "use_cpu": True},
            }
        )
        return course(lambda: train(config, announce=lambda line: None), lambda value: isinstance(value, TrainConfig))


def main() -> None:
    """Print all results as JSON."""
    arrows = imports()
    found: dict[str, Any] = {
        "files": len(FILES),
        "lines": lines(),
        "packages and modules on top": len({package for arrow in arrows for package in arrow}),
        "imports between them": len(arrows),
        "longest chain of imports": depth(arrows),
        "functions that take Any": functions_with_any(),
        "options of commands": options(),
        "fields of LrLoraConfig": len(fields(LrLoraConfig)),
        "x in a step": course_of_x(),
        "configuration of a run": course_of_a_run(),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
