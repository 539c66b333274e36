"""What is imported with what: the method without charts and without the laboratory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .lab.small import reviews, save_encoder

CHARTS = ("altair", "matplotlib", "vl_convert")
RUN = """
from lrlora.lab.config import TrainConfig
from lrlora.lab.train import train
train(TrainConfig.from_dict({
    "model": "base", "data": "data.csv", "task": "classify", "columns": {"text": "review", "label": "verdict"},
    "output": "run", "training": {"max_steps": 2},
}))
card = open("run/README.md", encoding="utf-8").read()
assert "energy-99 rank" in card and "ranks.png" not in card
"""


@pytest.mark.parametrize(
    ("script", "absent"), [("import lrlora", (*CHARTS, "pandas", "datasets", "lrlora.lab")), (RUN, CHARTS)]
)
def test_no_charts_are_imported(script: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    save_encoder(tmp_path / "base")
    reviews().to_csv(tmp_path / "data.csv", index=False)
    check = f"\nimport sys\nassert not (there := set({absent!r}) & set(sys.modules)), there"
    subprocess.run([sys.executable, "-c", script + check], cwd=tmp_path, check=True)
