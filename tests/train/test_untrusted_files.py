"""Data that would crash its reader or fill the disk: refused before it is read, wherever in a file it is."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from pathlib import Path

import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value

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
    for name, text in (
        ("README.md", f"\n{header}"),
        ("README.md", f"\ufeff{header}"),
        (".huggingface.yaml", header.strip("-\n")),
    ):
        (folder / "README.md").unlink()
        (folder / name).write_text(text, newline="")
        with pytest.raises(ValueError, match="names data outside of its folder"):
            read(str(folder))
        (folder / "README.md").touch()
    (folder / ".huggingface.yaml").unlink()
    (folder / "README.md").write_text(header.replace(f", {path!r}", ""))
    assert read(str(folder))["train"]["text"][:] == ["a"]


def test_a_saved_data_set_that_names_files_elsewhere(tmp_path: Path) -> None:
    rows = {"text": ["secret"], "label": ["b"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "private")
    shutil.copytree(tmp_path / "private", tmp_path / "data")
    state = tmp_path / "data" / "state.json"
    name = "data-00000-of-00001.arrow"
    state.write_text(state.read_text().replace(name, f"../private/{name}"))
    with pytest.raises(ValueError, match=r"state\.json names data outside of its folder"):
        read(str(tmp_path / "data"))
    assert read(str(tmp_path / "private"))["train"]["text"][:] == ["secret"]


def test_cells_that_name_an_image_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "data").mkdir()
    path = tmp_path / "private" / "secret.png"
    PIL.Image.new("RGB", (4, 4)).save(path)
    own = tmp_path / "data" / "own.png"
    shutil.copy(path, own)
    for found, is_refused in ((path, True), (own, False), (tmp_path / "data" / ".." / "private" / path.name, True)):
        cells = [{"path": str(found), "bytes": None}]
        features = Features({"image": Image(decode=False), "label": Value("int64")})
        table = Dataset.from_dict({"image": cells, "label": [0]}, features=features).cast_column("image", Image())
        pq.write_table(table.data.table, tmp_path / "data" / f"{found.stem}-{is_refused}.parquet")
        file = str(tmp_path / "data" / f"{found.stem}-{is_refused}.parquet")
        if is_refused:
            with pytest.raises(ValueError, match="names an image outside of its folder"):
                read(file)
        else:
            assert len(read(file)["train"]) == 1
