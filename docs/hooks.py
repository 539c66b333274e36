"""What mkdocs does not know of itself: the README is the start page, and code lies outside docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TOP_PAGES = ("SECURITY", "CONTRIBUTING", "CHANGELOG")
CODE = [
    path.relative_to(ROOT)
    for folder, kind in (
        ("src", "*.py"),
        ("lab", "*.py"),
        ("lab", "*.yaml"),
        ("examples", "*.py"),
        ("lab", "*.md"),
    )
    for path in sorted((ROOT / folder).rglob(kind))
]


def on_files(files: Files, config: Any) -> Files:
    """Add the start page, and the code that pages link to, as text."""
    files.append(File.generated(config, "index.md", content=_start_page()))
    for name in TOP_PAGES:
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
        text = re.sub(r"\]\((src|lab)/", r"](../\1/", text)
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
    for path in CODE:
        files.append(File.generated(config, f"code/{path}.txt", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Let links to the README lead to the start page, to code to those copies, and to a folder to its `__init__.py`.

    The copies are text, which has no anchors.
    """

    def copy(match: re.Match[str]) -> str:
        path = Path(match[1])
        return f"](code/{path if path.suffix else path / '__init__.py'}.txt)"

    markdown = _on_the_site(markdown.replace("](../README.md", "](index.md"), folder="../")
    return re.sub(r"\]\(\.\./((?:src|lab|examples)/[^)#]+?)/?(?:#[^)]*)?\)", copy, markdown)


def _start_page() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text).replace("](lab/", "](../lab/")
    return _on_the_site(text, folder="").replace("](examples)", "](cookbook.md)")


def _on_the_site(text: str, folder: str) -> str:
    """Point links to the pages beside the README, which have the prefix `folder`, at their copies."""
    for name in TOP_PAGES:
        text = text.replace(f"]({folder}{name}.md", f"]({name.lower()}.md")
    return text
