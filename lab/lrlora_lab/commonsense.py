"""The eight commonsense data sets of the hub, as multiple choice: `commonsense:piqa` and others.

Prompts follow EleutherAI's lm-evaluation-harness, so that results are comparable.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset

Example = dict[str, Any]
ALL = "all"


@dataclass(frozen=True)
class ChoiceSet:
    """A data set of the hub.

    Args:
        repository, configuration: on the hub.
        convert: converts an example to `question`, `prompts`, `choices` and `label`.
        test: split with public labels.
        revision: repository revision, if the main one is a script, which `datasets` no longer runs.

    """

    repository: str
    configuration: str | None
    convert: Callable[[Example], Example]
    test: str = "validation"
    revision: str | None = None


def _boolq(row: Example) -> Example:
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _example(prompt, ["no", "yes"], int(row["answer"]))


def _piqa(row: Example) -> Example:
    return _example(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _social_iqa(row: Example) -> Example:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return _example(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)


def _hellaswag(row: Example) -> Example:
    prompt = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _example(_without_marks(prompt), list(map(_without_marks, row["endings"])), int(row["label"]))


def _without_marks(text: str) -> str:
    """Remove WikiHow's tags in square brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Example) -> Example:
    # Insert each option and compare the text after it, so that the probability of the name itself does not count.
    before, _, after = row["sentence"].partition("_")
    prompts = [before + row[option] for option in ("option1", "option2")]
    return _example(row["sentence"], [after.strip()] * 2, int(row["answer"]) - 1) | {"prompts": prompts}


def _lettered(prompt: str) -> Callable[[Example], Example]:
    def convert(row: Example) -> Example:
        choices = row["choices"]
        return _example(prompt.format(**row), choices["text"], choices["label"].index(row["answerKey"].strip()))

    return convert


def _example(question: str, choices: list[str], label: int) -> Example:
    return {"question": question, "prompts": [question] * len(choices), "choices": choices, "label": label}


_FEATURES = Features(
    question=Value("string"), prompts=List(Value("string")), choices=List(Value("string")), label=Value("int64")
)
_PARQUET = "refs/convert/parquet"  # the hub's conversion of script data sets
_SCIENCE = _lettered("Question: {question}\nAnswer:")
COMMONSENSE = {
    "boolq": ChoiceSet("google/boolq", None, _boolq),
    "piqa": ChoiceSet("ybisk/piqa", None, _piqa, revision=_PARQUET),
    "social-iqa": ChoiceSet("allenai/social_i_qa", None, _social_iqa, revision=_PARQUET),
    "hellaswag": ChoiceSet("Rowan/hellaswag", None, _hellaswag),
    "winogrande": ChoiceSet("allenai/winogrande", "winogrande_xl", _winogrande),
    "arc-easy": ChoiceSet("allenai/ai2_arc", "ARC-Easy", _SCIENCE, "test"),
    "arc-challenge": ChoiceSet("allenai/ai2_arc", "ARC-Challenge", _SCIENCE, "test"),
    "openbookqa": ChoiceSet("allenai/openbookqa", "main", _lettered("{question_stem}"), "test"),
}


def load_commonsense(name: str) -> DatasetDict:
    """`train` and `test` of a set of `COMMONSENSE`, with columns `question`, `prompts`, `choices` and `label`.

    `ALL` is `train` of all sets together, 148,000 examples (LLM-Adapters, arXiv:2304.01933, a common training set, has
    170,000, with the larger WinoGrande set); it has no `test`.
    """
    if name == ALL:
        return DatasetDict(train=concatenate_datasets([load_commonsense(each)["train"] for each in COMMONSENSE]))
    known = COMMONSENSE[name]
    splits = load_dataset(known.repository, known.configuration, revision=known.revision)
    return DatasetDict(train=as_choices(splits["train"], known), test=as_choices(splits[known.test], known))


def as_choices(data: Dataset, known: ChoiceSet) -> Dataset:
    """Convert a split to questions with choices."""
    return data.map(known.convert, remove_columns=data.column_names, features=_FEATURES)
