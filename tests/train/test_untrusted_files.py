"""Data that names files elsewhere is refused before it is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value

from .small import read


def texts_or_error(folder: Path) -> list[str] | str:
    try:
        return list(read(str(folder))["train"]["text"])
    except ValueError as error:
        return str(error)


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
    with pytest.raises(ValueError, match=r"README\.md .*outside"):
        read(str(folder))
    for name, text in (
        ("README.md", f"\n{header}"),
        ("README.md", f"\ufeff{header}"),
        (".huggingface.yaml", header.strip("-\n")),
    ):
        (folder / "README.md").unlink()
        (folder / name).write_text(text, newline="")
        found = texts_or_error(folder)  # some versions of huggingface_hub see no header there
        assert found == ["a"] or "outside" in found
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
    with pytest.raises(ValueError, match=r"state\.json .*outside"):
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
            with pytest.raises(ValueError, match="image outside"):
                read(file)
        else:
            assert len(read(file)["train"]) == 1
