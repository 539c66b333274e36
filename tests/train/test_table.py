"""A user with a table of texts: scores by class, and what becomes of the table's columns."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from sklearn.metrics import classification_report, confusion_matrix

from lrlora.by_class import read_by_class
from lrlora.train.data import load_examples, load_task_data
from lrlora.train.inference import evaluate, predict
from lrlora.train.run import train
from lrlora.train.settings import TrainConfig
from lrlora.train.tasks import TASKS
from lrlora.views.runs import load_run

from ..cli import run, told
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


MARK = "best checkpoint, chosen by these scores"


def test_scores_that_chose_the_checkpoint_are_marked(home: Path, encoder: str, tmp_path: Path) -> None:
    held = str(home / "held.csv")
    shared = ("train", "--model", encoder, "--data", home / "table.csv", "--task", "classify", "--method", "lora")
    columns = ("--column", "text=review", "--column", "label=verdict")
    last = ("--training", "eval_strategy=no")
    for name, how in (("best", ()), ("last", last)):
        result = run(
            *(*shared, *columns, "--validation", held, "--steps", 4, "--no-measure"),
            *("--output", tmp_path / name, *how),
        )
        assert result.exit_code == 0, result.output
        is_best = name == "best"
        assert (f"Validation, {MARK}" in result.output) == is_best
        assert json.loads((tmp_path / name / "metrics.json").read_text())["chose_checkpoint"] == is_best
        card = (tmp_path / name / "README.md").read_text()
        assert (f"- validation, {MARK}: " in card) == (f"name: accuracy ({MARK})" in card) == is_best
        facts = load_run(str(tmp_path / name), name).facts  # of the page
        assert (f"validation, {MARK}" in facts) == is_best
        assert ("validation, last step" in facts) != is_best
        result = run("evaluate", tmp_path / name, "--data", held, "--json", tmp_path / f"{name}.json")
        assert result.exit_code == 0, result.output
        said = " ".join(result.output.split())
        assert ("these examples chose the run's checkpoint. Expect lower scores" in said) == is_best
        assert ("100 examples, which chose the checkpoint" in said) == is_best
        assert json.loads((tmp_path / f"{name}.json").read_text()).get("chose_checkpoint", False) == is_best
    said: list[str] = []
    evaluate(tmp_path / "last", str(home / "table.csv"), announce=said.append)
    assert "Warning: these examples trained the run. Expect lower scores on others." in said
    table_of_three(99).to_csv(tmp_path / "other.csv", index=False)
    said.clear()
    assert "chose_checkpoint" not in evaluate(tmp_path / "best", str(tmp_path / "other.csv"), announce=said.append)
    assert not said


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


def predicted(home: Path, file: Path, data: Path, *options: object) -> Path:
    result = run("predict", home / "run", "--data", data, "--output", file, *options)
    assert result.exit_code == 0, result.output
    assert f"predictions: {file}" in result.output
    return file


def cells(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))


def test_columns_are_kept_as_they_were_written(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "orders.csv"
    data.write_text('order,review,price,note\n007,a splendid film,1.50,"a, ""b"""\n012,,2,\n1e3,a dull film,,é\n')
    options = (data, "--keep-columns", "--skip-empty")
    kept = {suffix: predicted(home, tmp_path / f"out{suffix}", *options) for suffix in (".csv", ".tsv", ".jsonl")}
    expected = [cells(data)[row] for row in (0, 2)]  # the second has no text
    for file in (kept[".csv"], kept[".tsv"]):
        assert [{name: row[name] for name in expected[0]} for row in cells(file)] == expected
    rows = [json.loads(line) for line in kept[".jsonl"].read_text().splitlines()]
    assert [{name: row[name] or "" for name in expected[0]} for row in rows] == expected
    classes = ["fresh", "odd, but [b]good", "rotten"]
    names = [*expected[0], "prediction", *(f"probability of {name}" for name in classes)]
    assert list(cells(kept[".csv"])[0]) == names
    for line, row in zip(cells(kept[".csv"]), rows, strict=True):
        assert line["prediction"] == row["prediction"]
        assert [float(line[f"probability of {name}"]) for name in classes] == [*row["probabilities"].values()]


def test_without_the_option_the_columns_are_those_that_the_task_reads(home: Path, tmp_path: Path) -> None:
    (row, *_) = cells(predicted(home, tmp_path / "out.csv", home / "held.csv"))
    assert [name for name in row if not name.startswith("probability")] == ["text", "prediction"]


def test_any_column_of_other_files_is_kept(home: Path, tmp_path: Path) -> None:
    frame = table_of_three(12).assign(date=pd.Timestamp("2024-02-29"), tags=[["a", "b"]] * 12)
    frame.to_parquet(tmp_path / "table.parquet")
    file = predicted(home, tmp_path / "out.jsonl", tmp_path / "table.parquet", "--keep-columns")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["number"] for row in rows] == [*range(12)]
    assert rows[0]["date"].startswith("2024-02-29")
    assert rows[0]["tags"] == ["a", "b"]
    table = cells(predicted(home, tmp_path / "out.csv", tmp_path / "table.parquet", "--keep-columns"))
    assert json.loads(table[0]["tags"]) == ["a", "b"]
    in_memory = predict(home / "run", Dataset.from_pandas(frame), keep_columns=True, announce=lambda line: None)
    assert [row["film"] for row in in_memory] == [*frame["film"]]


def test_a_column_with_the_name_of_the_predictions_is_not_replaced(home: Path, tmp_path: Path) -> None:
    table_of_three(12).assign(prediction="mine").to_csv(tmp_path / "table.csv", index=False)
    said = told("predict", home / "run", "--data", tmp_path / "table.csv", "--keep-columns")
    assert "has a column 'prediction'" in said
    assert "rename it in the data" in said
    assert "--keep-columns describes data" in told("predict", home / "run", "--text", "a film", "--keep-columns")


@pytest.mark.parametrize("command", ["export", "export twice", "beside the run"])
def test_an_export_knows_the_columns_of_its_run(home: Path, encoder: str, tmp_path: Path, command: str) -> None:
    table_of_three(60).to_csv(tmp_path / "table.csv", index=False, sep=";", encoding="latin-1")
    data, how = str(tmp_path / "table.csv"), {"delimiter": ";", "encoding": "latin-1", "columns": COLUMNS}
    options = {**how, "steps": 2, "rank": 2}
    method = "lr-lora" if command == "beside the run" else "lora"
    train(TrainConfig(encoder, data, "classify", method, str(tmp_path / "run"), **options), announce=lambda line: None)
    small = tmp_path / "small"
    if command == "beside the run":
        small = tmp_path / "run" / "lora"
    else:
        steps = (
            (tmp_path / "run", tmp_path / "again", small) if command == "export twice" else (tmp_path / "run", small)
        )
        for source, output in pairwise(steps):
            result = run("export", source, "--output", output, "--energy", 1, "--no-check")
            assert result.exit_code == 0, result.output
    assert json.loads((small / "reading.json").read_text()) == {"task": "classify", **how}
    result = run("evaluate", small, "--data", data)
    assert result.exit_code == 0, result.output
    (first, *_) = predict(small, data, announce=lambda line: None)
    assert first["text"] == table_of_three()["review"][0]
    result = run("evaluate", small, "--data", home / "held.csv", "--delimiter", ",", "--column", "text=film")
    assert "needs the column label" in " ".join(result.output.split())  # given columns replace those of the run


def test_an_adapter_from_elsewhere_has_no_columns(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("run.json", "lora"))
    result = run("export", tmp_path / "elsewhere", "--energy", 1, "--no-check", "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "small" / "reading.json").exists()
    assert "needs the columns text and label" in told("evaluate", tmp_path / "small", "--data", home / "held.csv")


def written(frame: pd.DataFrame, file: Path) -> str:
    """A table as a file of its suffix."""
    write = {
        ".csv": lambda: frame.to_csv(file, index=False),
        ".parquet": lambda: frame.to_parquet(file),
        ".jsonl": lambda: frame.to_json(file, orient="records", lines=True),
    }
    write[file.suffix]()
    return str(file)


KINDS = ("csv", "parquet", "jsonl")


@pytest.mark.parametrize("numbers", [[*range(40)], [row / 4 for row in range(40)], [*range(39), None]])
def test_numbers_as_text_are_the_same_in_all_files(tmp_path: Path, numbers: list[float | None]) -> None:
    frame = pd.DataFrame({"number": numbers, "label": ["good", "bad"] * 20})
    texts, notes = [], []
    for kind in KINDS:
        data = written(frame, tmp_path / f"table.{kind}")
        config = TrainConfig("model", data, "classify", columns={"text": "number"}, skip_empty=True)
        found = load_task_data(config, TASKS["classify"])
        texts.append(sorted(text for part in found.splits.values() for text in part["text"]))
        notes.append([note for note in found.notes if "numbers" in note])
    assert texts[0] == texts[1] == texts[2]
    count = sum(number is not None for number in numbers)
    assert len(texts[0]) == count
    assert notes[0] == notes[1] == notes[2]
    assert f"all {count} training cells of the column 'number' are numbers" in notes[0][0]
    assert "pass --column text=NAME" in notes[0][0]


def test_numbers_of_32_bits_are_those_of_a_csv_file(tmp_path: Path) -> None:
    frame = pd.DataFrame({"number": (np.arange(40) / 10).astype(np.float32), "label": ["good", "bad"] * 20})
    texts = []
    for kind in ("csv", "parquet"):
        data = written(frame, tmp_path / f"table.{kind}")
        found = load_task_data(TrainConfig("model", data, "classify", columns={"text": "number"}), TASKS["classify"])
        texts.append({text for part in found.splits.values() for text in part["text"]})
    assert texts[0] == texts[1] >= {"0.1", "3.9"}


def test_numbers_that_are_answers_are_no_mistake(tmp_path: Path) -> None:
    frame = pd.DataFrame({"prompt": [f"{row} + 1 =" for row in range(40)], "completion": range(1, 41)})
    for kind in KINDS:
        found = load_task_data(
            TrainConfig("model", written(frame, tmp_path / f"a.{kind}"), "causal-lm"), TASKS["causal-lm"]
        )
        assert found.splits["train"]["completion"][0] == str(int(found.splits["train"]["prompt"][0].split()[0]) + 1)
        assert not found.notes


def test_classes_of_numbers_have_one_name_in_all_files(tmp_path: Path) -> None:
    """A table in memory has 1.0 in place of 1 where a cell of the column is empty."""
    texts = [f"film {row}" for row in range(40)]
    whole = pd.DataFrame({"text": texts, "label": [1, 2, 10, 1] * 10})
    gap = whole.assign(label=[None, *whole["label"][1:]])
    for kind in KINDS:
        for frame in (whole, gap):
            data = written(frame, tmp_path / f"table.{kind}")
            config = TrainConfig("model", data, "classify", skip_empty=True)
            assert load_task_data(config, TASKS["classify"]).labels == ["1", "2", "10"]
    versions = written(whole.assign(label=["1.0", "1.0a", "2.0", "1.0"] * 10), tmp_path / "versions.csv")
    config = TrainConfig("model", versions, "classify")
    assert load_task_data(config, TASKS["classify"]).labels == ["1.0", "1.0a", "2.0"]
    some = written(whole[:2].assign(label="2.0"), tmp_path / "some.csv")
    examples, *_ = load_examples(config, TASKS["classify"], some, None, ["1.0", "1.0a", "2.0"], with_label=True)
    assert examples["label"][:] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_cells_that_are_no_text_get_a_hint_that_helps(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame({"text": ["a film"] * 9 + [None], "label": ["good", "bad"] * 5})
    with pytest.raises(ValueError, match=r"text must not be empty .*--skip-empty skips such examples.*Row 9 is None"):
        load_task_data(TrainConfig("model", written(frame, tmp_path / f"a.{kind}"), "classify"), TASKS["classify"])
    frame = pd.DataFrame({"prompt": ["a film"] * 9, "completion": [None, *["good"] * 8]})
    with pytest.raises(ValueError, match=r"completion must not be empty .*--skip-empty"):
        load_task_data(TrainConfig("model", written(frame, tmp_path / f"b.{kind}"), "causal-lm"), TASKS["causal-lm"])
    if kind != "csv":  # which has text alone
        frame = pd.DataFrame({"text": [["a", "film"]] * 10, "label": ["good", "bad"] * 5})
        with pytest.raises(ValueError, match=r"text must be text .*--column text=NAME.*Row 0 is \['a', 'film'\]"):
            load_task_data(TrainConfig("model", written(frame, tmp_path / f"c.{kind}"), "classify"), TASKS["classify"])
