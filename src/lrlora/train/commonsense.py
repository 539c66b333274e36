"""The eight commonsense sets of the hub, as questions with choices: `commonsense:piqa` and its kin.

The prompts are those of EleutherAI's lm-evaluation-harness, so that its numbers and ours can be compared.
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
    """A set of the hub.

    Args:
        repository, configuration: on the hub.
        convert: gives `question`, `prompts`, `choices` and `label` of one of its examples.
        test: the split whose labels are public.
        revision: of the repository, where its main one is a script, which `datasets` no longer runs.

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
    """Text from WikiHow without its marks in square brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Example) -> Example:
    # The options are put in, and what follows them is compared: how likely a name is by itself is left out.
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
_PARQUET = "refs/convert/parquet"  # made by the hub of what a script would give
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
    """`train` and `test` of a set of `COMMONSENSE`, with the columns `question`, `prompts`, `choices` and `label`.

    `ALL` is `train` of all sets together, 148,000 examples (LLM-Adapters, arXiv:2304.01933, which language models are
    commonly trained on, has 170,000, with the larger set of WinoGrande); it has no `test`.
    """
    if name == ALL:
        return DatasetDict(train=concatenate_datasets([load_commonsense(each)["train"] for each in COMMONSENSE]))
    known = COMMONSENSE[name]
    splits = load_dataset(known.repository, known.configuration, revision=known.revision)
    return DatasetDict(train=as_choices(splits["train"], known), test=as_choices(splits[known.test], known))


def as_choices(data: Dataset, known: ChoiceSet) -> Dataset:
    """The examples of a split as questions with choices."""
    return data.map(known.convert, remove_columns=data.column_names, features=_FEATURES)
