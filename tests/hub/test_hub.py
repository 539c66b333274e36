"""Uploading to the stand-in for the hub, with its libraries as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ..train.small import reviews, save_encoder
from .server import TOKEN, serving


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables for a subprocess that takes the folder `hub` for the hub, with caches of its own."""
    cache = tmp_path / "cache"
    with serving(tmp_path / "hub") as address:
        yield {
            "HF_ENDPOINT": address,
            # HF_HOME alone is not enough: where a developer has set the others, they go before it.
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }


@pytest.mark.integration
def test_a_run_is_pushed_and_so_is_an_export(hub: dict[str, str], tmp_path: Path) -> None:
    save_encoder(tmp_path / "base")
    reviews().to_csv(tmp_path / "reviews.csv", index=False)

    def command(text: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        program, *arguments = text.split()
        return subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            env={**os.environ, **hub, "COLUMNS": "300", "HF_TOKEN": token},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    def pushing(output: str) -> str:
        columns = "--column text=review --column label=verdict"
        train = f"lrlora train --model base --data reviews.csv --task classify {columns} --steps 3 --output {output}"
        settings = {"push_to_hub": "true", "hub_model_id": "me/films", "hub_private_repo": "true"}
        return train + "".join(f" --training {name}={value}" for name, value in settings.items())

    refused = command(pushing("refused"), token="wrong")
    assert re.search(r"push_to_hub=True, .*\bme/films: .*401", refused.stderr)
    assert not (tmp_path / "refused").exists()
    assert command(f"{pushing('planned')} --dry-run", token="wrong").returncode == 0
    pushed = command(pushing("films"))
    assert "Pushed: me/films" in pushed.stdout, pushed.stderr
    assert (tmp_path / "hub" / "me" / "films.visibility").read_text() == "private"
    assert command("lrlora export films --max-rank 2 --output small").returncode == 0
    uploaded = command("hf upload me/small small")
    assert uploaded.returncode == 0, uploaded.stderr

    for name in ("films", "small"):
        local, there = (
            {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            for folder in (tmp_path / name, tmp_path / "hub" / "me" / name)
        )
        assert there == local
    metadata = ModelCard.load(tmp_path / "films" / "README.md").data
    assert metadata.pipeline_tag == "text-classification"
    assert {result.metric_type for result in metadata.eval_results} >= {"accuracy", "loss"}


@pytest.mark.integration
def test_a_mistake_in_the_data_leaves_nothing_on_the_hub(hub: dict[str, str], tmp_path: Path) -> None:
    save_encoder(tmp_path / "base")
    reviews().assign(label="one class").rename(columns={"review": "text"}).to_csv(tmp_path / "bad.csv", index=False)
    command = (
        "train --model base --data bad.csv --task classify --training push_to_hub=true --training hub_model_id=me/bad"
    )
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lrlora")), *command.split()],
        env={**os.environ, **hub, "HF_TOKEN": TOKEN},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "nothing to learn" in " ".join(done.stderr.split())
    assert not (tmp_path / "hub" / "me").exists()
