"""Data that would crash its reader or fill the disk: refused before it is read, wherever in a file it is."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from lrlora.train import untrusted_files as harmless

from ..processes import Process
from .small import read

DEEP = "[" * 50_000 + "]" * 50_000


def test_a_row_that_would_kill_the_process(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    file.write_text('{"text": "a"}\n' * 9 + f'{{"text": "a", "more": {DEEP}}}\n')
    code = f"from tests.train.small import read; read({str(file)!r})"
    process = Process(code)
    said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert f"ValueError: {file} nests brackets 50001 levels deep" in said


def test_nested_data_in_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "part" / "train.json"
    file.parent.mkdir()
    file.write_text('{"a":\n' * 10_000)
    with pytest.raises(ValueError, match=re.escape(f"{file} nests brackets 10000 levels deep")):
        read(str(tmp_path))


def row(chance: random.Random, depth: int) -> str:
    """One row of JSON with values that are so deep, and texts with brackets, quotes and backslashes."""
    text = json.dumps("".join(chance.choices('[]{}"\\\n ab', k=chance.randrange(30))))
    value = text
    for _ in range(depth - 1):
        value = chance.choice((f"[{value}]", f"[{text}, {value}]", f'{{"a": {value}, {text}: {text}}}'))
    return f'{{"text": {text}, "more": {value}}}'


@pytest.mark.parametrize("seed", range(30))
def test_depth_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    stride = 3
    monkeypatch.setattr(harmless, "_STRIDE", stride)
    monkeypatch.setattr(harmless, "_BLOCK", 64)
    monkeypatch.setattr(harmless, "DEEPEST", 2 * stride)
    chance, file = random.Random(seed), tmp_path / "rows.jsonl"
    end = chance.choice(("\n", "\r\n", "\n\n"))
    rows = [row(chance, chance.randint(1, 2 * stride)) for _ in range(20)]
    file.write_bytes(end.join(rows).encode())
    harmless.require_harmless(file)
    rows[chance.randrange(20)] = row(chance, 2 * stride + 1)
    file.write_bytes(end.join(rows).encode())
    with pytest.raises(ValueError, match=f"nests brackets {2 * stride + 1} levels deep"):
        harmless.require_harmless(file)


def test_many_brackets_are_not_deep(tmp_path: Path) -> None:
    rows = [{"text": "[{" * 5000, "messages": [{"content": "a]"}] * 3000}, {"text": "b", "messages": []}]
    (tmp_path / "wide.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert len(read(str(tmp_path / "wide.jsonl"))["train"]) == 2


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "folder/train.csv"])
def test_packed_data(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(gzip.compress(b"text,label\n" + b"0," * 10**6))
    source = file if name.startswith("data") else file.parent
    with pytest.raises(ValueError, match=re.escape(f"{file} is an archive (gzip)")):
        read(str(source))


@pytest.mark.parametrize(
    "path", ["http://127.0.0.1:9/train.csv", "../elsewhere.csv", "/etc/passwd", "zip://a.csv::b.zip"]
)
def test_a_card_that_names_data_elsewhere(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\na,b\n")
    (tmp_path / "elsewhere.csv").write_text("text,label\nsecret,b\n")
    files = f"data_files:\n  - split: train\n    path: [train.csv, {path!r}]"
    header = f"---\nconfigs:\n- config_name: default\n  {files}\n---\n"
    (folder / "README.md").write_text(header)
    with pytest.raises(ValueError, match="names data outside of its folder"):
        read(str(folder))
    (folder / "README.md").write_text(header.replace(f", {path!r}", ""))
    assert read(str(folder))["train"]["text"][:] == ["a"]
