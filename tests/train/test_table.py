"""A user with a table of texts: scores by class, and what becomes of the table's columns."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import classification_report, confusion_matrix

from lrlora.by_class import read_by_class
from lrlora.train.inference import evaluate, predict
from lrlora.train.run import train
from lrlora.train.settings import TrainConfig
from lrlora.views.runs import load_run

from ..cli import run
from .small import reviews

COLUMNS = {"text": "review", "label": "verdict"}


def table_of_three(count: int = 240) -> pd.DataFrame:
    """Reviews of three classes, the third of which cannot be told from the first."""
    frame = reviews(count)
    frame.loc[frame.index % 5 == 0, "verdict"] = "odd, but [b]good"
    return frame.assign(number=range(count), film=[f"film {row % 7}" for row in range(count)])


@pytest.fixture(scope="module")
def home(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, its validation data, and a run on them."""
    home = tmp_path_factory.mktemp("table")
    table_of_three().to_csv(home / "table.csv", index=False)
    table_of_three(100).to_csv(home / "held.csv", index=False)
    config = TrainConfig(
        *(encoder, str(home / "table.csv"), "classify", "lora", str(home / "run")),
        **{"columns": COLUMNS, "validation": str(home / "held.csv"), "steps": 40, "rank": 2, "learning_rate": 1e-2},
    )
    train(config, announce=lambda line: None)
    return home


def test_scores_by_class_are_those_of_scikit_learn(home: Path, tmp_path: Path) -> None:
    data, file = str(home / "held.csv"), tmp_path / "metrics.json"
    result = run("evaluate", home / "run", "--data", data, "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    truth = table_of_three(100)["verdict"]
    answers = [row["prediction"] for row in predict(home / "run", data, announce=lambda line: None)]
    expected = classification_report(truth, answers, output_dict=True, zero_division=0)
    names = sorted(set(truth))
    assert set(found["classes"]) == set(names)
    for name in names:
        scores = found["classes"][name]
        pairs = (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"), ("support", "support"))
        assert all(scores[ours] == pytest.approx(expected[name][theirs]) for ours, theirs in pairs)
    assert found["macro_f1"] == pytest.approx(sum(found["classes"][name]["f1"] for name in names) / 3)
    counts = confusion_matrix(truth, answers, labels=names).tolist()
    assert [[found["confusion"][label].get(answer, 0) for answer in names] for label in names] == counts
    said = " ".join(result.output.split())
    assert "odd, but [b]good" in said
    assert "; 'odd, but [b]good' taken for" in said
    metrics = evaluate(home / "run", data, announce=lambda line: None)
    assert metrics.by_class is not None
    assert metrics.by_class.classes == found["classes"]
    assert metrics == {name: value for name, value in found.items() if name not in ("classes", "confusion")}
    # The same data chose the checkpoint.
    assert read_by_class(home / "run") == metrics.by_class == load_run(str(home / "run"), "run").by_class


def test_other_tasks_have_no_scores_by_class(encoder: str, tmp_path: Path) -> None:
    frame = reviews().assign(verdict=lambda each: (each["verdict"] == "fresh") + 0.5)
    frame.to_csv(tmp_path / "numbers.csv", index=False)
    data = str(tmp_path / "numbers.csv")
    config = TrainConfig(
        *(encoder, data, "regress", "lora", str(tmp_path / "run")), **{"columns": COLUMNS, "steps": 2, "rank": 2}
    )
    train(config, announce=lambda line: None)
    assert not (tmp_path / "run" / "classes.json").exists()
    assert evaluate(tmp_path / "run", data, announce=lambda line: None).by_class is None
