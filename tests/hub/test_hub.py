"""Reading from the stand-in hub with unchanged `datasets` and `transformers`, and uploading to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard

from ..train.small import reviews, save_encoder
from .running import caches
from .server import TOKEN


def test_a_run_is_pushed_and_so_is_an_export(hub: dict[str, str], tmp_path: Path) -> None:
    save_encoder(tmp_path / "base")
    reviews().to_csv(tmp_path / "reviews.csv", index=False)

    def command(text: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        program, *arguments = text.split()
        return subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            env={**os.environ, **hub, **caches(tmp_path / "cache"), "COLUMNS": "300", "HF_TOKEN": token},
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
    assert "push_to_hub=True, but the hub does not take me/films: Client error '401" in refused.stderr
    assert not (tmp_path / "refused").exists()
    assert command(f"{pushing('planned')} --dry-run", token="wrong").returncode == 0
    pushed = command(pushing("films"))
    assert "Pushed: me/films" in pushed.stdout, pushed.stderr
    assert Path(hub["LRLORA_TEST_HUB"], "models", "me", "films.visibility").read_text() == "private"
    assert command("lrlora export films --max-rank 2 --output small").returncode == 0
    uploaded = command("hf upload me/small small")
    assert uploaded.returncode == 0, uploaded.stderr

    for name in ("films", "small"):
        local = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        code = f"from huggingface_hub import snapshot_download; print(snapshot_download('me/{name}'))"
        there = Path(command_of_python(code, {**hub, **caches(tmp_path / "cache")}).splitlines()[-1])
        found = {path.name: path.read_bytes() for path in there.iterdir() if path.is_file()}
        assert found == local
    metadata = ModelCard.load(tmp_path / "films" / "README.md").data
    assert metadata.pipeline_tag == "text-classification"
    assert {result.metric_type for result in metadata.eval_results} >= {"accuracy", "loss"}


def command_of_python(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
