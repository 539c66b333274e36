"""Fill the tree of files in CONTRIBUTING.md: a line for each, from the first line of its docstring.

python docs/update_tree.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from lrlora_lab.sections import with_section

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lrlora"
# From below to above, as imports point.
FOLDERS = ("", "ops", "tuner", "lora", "adapters", "ranks", "learned", "views", "train", "train/tasks", "cli")


def about(path: Path) -> str:
    """First line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (text or "").partition("\n")[0]


def lines() -> Iterator[str]:
    """The tree, folder by folder."""
    for folder in FOLDERS:
        place = PACKAGE / folder
        yield f"src/lrlora/{folder}{'/' if folder else ''}  {about(place / '__init__.py')}".rstrip()
        for path in sorted(place.glob("*.py")):
            if path.name != "__init__.py":
                yield f"    {path.name:<22}{about(path)}"


def tree() -> str:
    """The section of the page."""
    return "```text\n" + "\n".join(lines()) + "\n```\n"


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(with_section(page.read_text(encoding="utf-8"), "tree", tree()), encoding="utf-8")
