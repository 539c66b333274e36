"""Data sets of the field by name, `glue:rte` or `commonsense:arc-easy`: from the hub, or from a folder without one.

`LRLORA_DATA` names a folder with files such as `glue/rte_train.jsonl.gz`, whose columns are those of `Glue.columns` and
`Choices.columns`, and with their hashes in `SHA256SUMS`. Where it is set, the hub is not asked for what it has. Prompts
follow EleutherAI's lm-evaluation-harness, so that results are comparable, except that BoolQ has no passage, as in
LLM-Adapters (arXiv:2304.01933).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset

from lrlora.checks import require_known

Example = dict[str, Any]
FOLDER = "LRLORA_DATA"
SUMS = "SHA256SUMS"
_PARQUET = "refs/convert/parquet"  # the hub's conversion of script data sets


@dataclass(frozen=True)
class Glue:
    """A task of GLUE (arXiv:1804.07461): its sentences, and a label as class or number.

    Args:
        configuration: name in the hub's repository, and of the files in the folder.
        sentences: columns of texts.
        classes: names of the classes; empty: the label is a number.

    """

    configuration: str
    sentences: tuple[str, ...] = ("sentence1", "sentence2")
    classes: tuple[str, ...] = ()
    repository: ClassVar[str] = "nyu-mll/glue"
    revision: ClassVar[str | None] = None
    test: ClassVar[str] = "validation"  # the labels of its test split are not public

    @property
    def file(self) -> str:
        """Start of its file names in the folder."""
        return f"glue/{self.configuration}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        return (*self.sentences, "label")

    @property
    def features(self) -> Features:
        """Columns of an example, with their types."""
        label = ClassLabel(names=list(self.classes)) if self.classes else Value("float32")
        return Features({**dict.fromkeys(self.sentences, Value("string")), "label": label})

    def example(self, row: Example) -> Example:
        """The columns of a row, of the hub or the folder."""
        return {name: row[name] for name in self.columns}


@dataclass(frozen=True)
class Choices:
    """Questions with choices.

    Args:
        repository, configuration: on the hub.
        convert: makes a row of the folder, with `question`, `choices` and `answer`, from one of the hub; it may add
            `prompts`, one for each choice.
        prompt: prompt around a question.
        file: start of its file names in the folder; None: the hub alone has it.
        test: split of the hub with public labels.
        revision: repository revision, if the main one is a script, which `datasets` no longer runs.

    """

    repository: str
    configuration: str | None
    convert: Callable[[Example], Example]
    prompt: str = "Question: {question}\nAnswer:"
    file: str | None = None
    test: str = "validation"
    revision: str | None = None
    columns: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    features: ClassVar[Features] = Features(
        question=Value("string"), prompts=List(Value("string")), choices=List(Value("string")), label=Value("int64")
    )

    def example(self, row: Example) -> Example:
        """`question`, `prompts`, `choices` and `label` of a row, of the hub or the folder."""
        if set(self.columns) - row.keys():
            row = self.convert(row)
        prompt = self.prompt.format(question=row["question"])
        prompts = row.get("prompts") or [prompt] * len(row["choices"])
        return {"question": prompt, "prompts": prompts, "choices": row["choices"], "label": row["answer"]}


Source = Glue | Choices


def _row(question: str, choices: list[str], answer: int) -> Example:
    return {"question": question, "choices": choices, "answer": answer}


def _boolq(row: Example) -> Example:
    return _row(f"{row['question']}?", ["no", "yes"], int(row["answer"]))


def _piqa(row: Example) -> Example:
    return _row(row["goal"], [row["sol1"], row["sol2"]], row["label"])


def _social_iqa(row: Example) -> Example:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return _row(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _hellaswag(row: Example) -> Example:
    prompt = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _row(_without_marks(prompt), list(map(_without_marks, row["endings"])), int(row["label"]))


def _without_marks(text: str) -> str:
    """Remove WikiHow's tags in square brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Example) -> Example:
    # Insert each option and compare the text after it, so that the probability of the name itself does not count.
    before, _, after = row["sentence"].partition("_")
    prompts = [before + row[option] for option in ("option1", "option2")]
    return _row(row["sentence"], [after.strip()] * 2, int(row["answer"]) - 1) | {"prompts": prompts}


def _lettered(row: Example) -> Example:
    question, choices = row.get("question") or row["question_stem"], row["choices"]
    return _row(question, choices["text"], choices["label"].index(row["answerKey"].strip()))


GLUE = {
    "cola": Glue("cola", ("sentence",), ("unacceptable", "acceptable")),
    "sst2": Glue("sst2", ("sentence",), ("negative", "positive")),
    "mrpc": Glue("mrpc", classes=("not_equivalent", "equivalent")),
    "rte": Glue("rte", classes=("entailment", "not_entailment")),
    "stsb": Glue("stsb"),
}
_ARC = "allenai/ai2_arc"
COMMONSENSE = {
    "boolq": Choices("google/boolq", None, _boolq, file="commonsense/boolq"),
    "piqa": Choices("ybisk/piqa", None, _piqa, revision=_PARQUET),
    "social-iqa": Choices(
        "allenai/social_i_qa", None, _social_iqa, "Q: {question}\nA:", "commonsense/social_iqa", revision=_PARQUET
    ),
    "hellaswag": Choices("Rowan/hellaswag", None, _hellaswag, "{question}"),
    "winogrande": Choices("allenai/winogrande", "winogrande_xl", _winogrande, "{question}"),
    "arc-easy": Choices(_ARC, "ARC-Easy", _lettered, file="commonsense/arc_easy", test="test"),
    "arc-challenge": Choices(_ARC, "ARC-Challenge", _lettered, file="commonsense/arc_challenge", test="test"),
    "openbookqa": Choices("allenai/openbookqa", "main", _lettered, "{question}", "commonsense/openbookqa", test="test"),
}
# Training sets joined. LLM-Adapters' common training set, 170,000 examples, has the larger WinoGrande set; `all` has
# 148,000.
MIXTURES = {"all": tuple(COMMONSENSE), "science": ("arc-easy", "arc-challenge", "openbookqa")}
SOURCES: dict[str, Source] = {
    **{f"glue:{name}": source for name, source in GLUE.items()},
    **{f"commonsense:{name}": source for name, source in COMMONSENSE.items()},
}
NAMES = (*SOURCES, *(f"commonsense:{name}" for name in MIXTURES))


def is_hub_data(name: str) -> bool:
    """Whether a name has the form of a data set of this file.

    Raises:
        ValueError: it has, and there is no such data set.

    """
    if name.partition(":")[0] not in ("glue", "commonsense"):
        return False
    require_known("data set", name, NAMES)
    return True


def load_hub_data(name: str) -> DatasetDict:
    """`train` and `test` of a data set of `NAMES`; a mixture has no `test`, Social IQa of the folder no `train`.

    Raises:
        FileNotFoundError: neither the folder nor the hub has it.
        ValueError: the name is unknown, or a file of the folder is not the one that `SHA256SUMS` names.

    """
    require_known("data set", name, NAMES)
    if (mixture := MIXTURES.get(name.removeprefix("commonsense:"))) is not None:
        parts = [load_hub_data(f"commonsense:{each}") for each in mixture]
        return DatasetDict(train=concatenate_datasets([part["train"] for part in parts if "train" in part]))
    source = SOURCES[name]
    splits = _from_folder(source) or _from_hub(name, source)
    return DatasetDict({split: as_examples(data, source) for split, data in splits.items()})


def as_examples(data: Dataset, source: Source) -> Dataset:
    """Rows of the hub or the folder as examples of a task."""
    return data.map(source.example, remove_columns=data.column_names, features=source.features)


def _from_hub(name: str, source: Source) -> Mapping[str, Dataset]:
    try:
        splits = load_dataset(source.repository, source.configuration, revision=source.revision)
    except OSError as error:
        raise FileNotFoundError(
            f"The data set {name} is at hand neither on the hub, as {source.repository} ({error}), nor in a folder: "
            f"set {FOLDER} to a folder that has {source.file or name}_train.jsonl.gz."
        ) from error
    return {"train": splits["train"], "test": splits[source.test]}


def _from_folder(source: Source) -> dict[str, Dataset]:
    """Splits of a data set in the folder `LRLORA_DATA`; empty where it is not set, or lacks the data set."""
    folder, splits = Path(os.environ.get(FOLDER, "")), {}
    if not os.environ.get(FOLDER) or source.file is None:
        return {}
    for split in ("train", source.test if isinstance(source, Glue) else "test"):
        path = folder / f"{source.file}_{split}.jsonl.gz"
        if path.exists():
            _require_intact(path, folder)
            with gzip.open(path, "rt", encoding="utf-8") as file:
                splits["train" if split == "train" else "test"] = Dataset.from_list(list(map(json.loads, file)))
    return splits


def _require_intact(path: Path, folder: Path) -> None:
    name = path.relative_to(folder).as_posix()
    sums = (folder / SUMS).read_text(encoding="utf-8") if (folder / SUMS).exists() else ""
    known = {line.split()[1]: line.split()[0] for line in sums.splitlines() if line.strip()}
    if known.get(name) != hashlib.sha256(path.read_bytes()).hexdigest():
        raise ValueError(f"{path} is not the file that {folder / SUMS} names. Download it again.")
