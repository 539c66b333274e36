"""The sets of commonsense questions, with the quirks of the real ones: labels that are missing, choices that vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from .words import ANIMALS, PEOPLE, PLACES, THINGS, VERBS, Writer

Row = dict[str, Any]
TRAIN, OTHER = 64, 32  # rows of a split
_TEXT = Value("string")
_CHOICES = {"text": List(_TEXT), "label": List(_TEXT)}


def _set(
    splits: str, features: dict[str, Any], write: Callable[[Writer, str, int], Row], seed: str = ""
) -> DatasetDict:
    made = {}
    for split in splits.split():
        writer = Writer(f"{seed} {write.__name__} {split}")
        rows = [write(writer, split, index) for index in range(TRAIN if split == "train" else OTHER)]
        made[split] = Dataset.from_list(rows, Features(features))
    return DatasetDict(made)


def _boolq(writer: Writer, split: str, index: int) -> Row:
    answer = writer.random() < 0.6
    animal, place = writer.choice(ANIMALS), writer.choice(PLACES)
    asked = place if answer else writer.others(PLACES, place, 1)[0]
    passage = f"The {animal} is in the {place}. {writer.sentence()} {writer.sentence()}"
    # Questions are in lower case, without a question mark.
    return {"question": f"is the {animal} in the {asked}", "answer": answer, "passage": passage}


def _piqa(writer: Writer, split: str, index: int) -> Row:
    thing, label = writer.choice(THINGS), writer.randrange(2)
    wrong = writer.others(THINGS, thing, 1)[0]
    solutions = [f"{writer.choice(VERBS)} the {named} {writer.place()}" for named in (wrong, thing)]
    row = {"goal": f"How does a {writer.choice(ANIMALS)} move a {thing}?", "sol1": solutions[1 - label]}
    return {**row, "sol2": solutions[label], "label": -1 if split == "test" else label}


def _social_iqa(writer: Writer, split: str, index: int) -> Row:
    person, place, label = writer.choice(PEOPLE), writer.choice(PLACES), writer.randrange(3)
    answers = [f"go to the {other}" for other in writer.others(PLACES, place, 2)]
    answers.insert(label, f"go to the {place}")
    row = {"context": f"{person} needs a {writer.choice(THINGS)} of the {place}."}
    row["question"] = f"What will {person} want to do next?"
    return {
        **row,
        **{f"answer{letter}": answer for letter, answer in zip("ABC", answers, strict=True)},
        "label": str(label + 1),
    }


def _hellaswag(writer: Writer, split: str, index: int) -> Row:
    animal, label, film = writer.choice(ANIMALS), writer.randrange(4), index % 2 == 0
    endings = [f"{writer.choice(VERBS)} the {thing}." for thing in writer.sample(THINGS, 4)]
    endings[label] = f"goes home with the {animal}."
    # Half is from films, with a subject that the ending goes on from, half from instructions with headings.
    context = (
        [f"A {animal} is {writer.place()}.", f"the {animal}"]
        if film
        else [f"[header] How to wash a {animal} [step]", ""]
    )
    return {
        "ind": 3 * index,
        "activity_label": f"Washing a {animal}",
        "ctx_a": context[0],
        "ctx_b": context[1],
        "ctx": " ".join(context).strip(),
        "endings": endings,
        "source_id": f"activitynet~v_{index}" if film else f"wikihow~{index}",
        "split": {"validation": "val"}.get(split, split),
        "split_type": "indomain" if split == "train" or index % 4 else "zeroshot",
        "label": "" if split == "test" else str(label),
    }


def _winogrande(writer: Writer, split: str, index: int) -> Row:
    people, right = writer.sample(PEOPLE, 2), writer.randrange(2)
    sentence = f"{people[right]} gave {people[1 - right]} the {writer.choice(THINGS)} because _ was {writer.place()}."
    if index % 8 == 0:
        sentence = f"_ was {writer.place()}, and {people[right]} knew it before {people[1 - right]}."
    return {
        "sentence": sentence,
        "option1": people[0],
        "option2": people[1],
        "answer": "" if split == "test" else str(right + 1),
    }


def _arc(writer: Writer, split: str, index: int) -> Row:
    count = {7: 3, 25: 5}.get(index, 4)
    question, choices, answer = _lettered(writer, count, "1234" if index % 10 == 3 else "ABCDE")
    return {"id": f"Mercury_{index}", "question": question, "choices": choices, "answerKey": answer}


def _openbookqa(writer: Writer, split: str, index: int) -> Row:
    question, choices, answer = _lettered(writer, 4, "ABCD")
    return {"id": f"7-{index}", "question_stem": question.rstrip("?"), "choices": choices, "answerKey": answer}


def _lettered(writer: Writer, count: int, labels: str) -> tuple[str, dict[str, list[str]], str]:
    """A question whose answer is the place that it names."""
    place, right = writer.choice(PLACES), writer.randrange(count)
    texts = [f"the {other}" for other in writer.others(PLACES, place, count - 1)]
    texts.insert(right, f"the {place}")
    question = f"The {writer.choice(ANIMALS)} of the {place} finds a {writer.choice(THINGS)}. Where is it?"
    return question, {"text": texts, "label": list(labels[:count])}, labels[right]


def _strings(names: str) -> dict[str, Value]:
    return dict.fromkeys(names.split(), _TEXT)


def choice_sets() -> dict[str, dict[str, DatasetDict]]:
    """The sets by repository and configuration."""
    boolq = {"question": _TEXT, "answer": Value("bool"), "passage": _TEXT}
    piqa = {**_strings("goal sol1 sol2"), "label": ClassLabel(names=["0", "1"])}
    siqa = _strings("context question answerA answerB answerC label")
    swag = {"ind": Value("int32"), **_strings("activity_label ctx_a ctx_b ctx"), "endings": List(_TEXT)}
    arc = {"id": _TEXT, "question": _TEXT, "choices": _CHOICES, "answerKey": _TEXT}
    book = {"id": _TEXT, "question_stem": _TEXT, "choices": _CHOICES, "answerKey": _TEXT}
    three, unusual = "train validation test", "train test validation"
    return {
        "google/boolq": {"default": _set("train validation", boolq, _boolq)},
        "ybisk/piqa": {"plain_text": _set(unusual, piqa, _piqa)},
        "baber/piqa": {"default": _set(three, {**piqa, "label": Value("int64")}, _piqa)},
        "allenai/social_i_qa": {"default": _set("train validation", siqa, _social_iqa)},
        "lighteval/siqa": {"default": _set("train validation", siqa, _social_iqa)},
        "Rowan/hellaswag": {
            "default": _set(unusual, {**swag, **_strings("source_id split split_type label")}, _hellaswag)
        },
        "allenai/winogrande": {
            "winogrande_xl": _set(unusual, _strings("sentence option1 option2 answer"), _winogrande)
        },
        "allenai/ai2_arc": {
            f"ARC-{level}": _set("train test validation", arc, _arc, level) for level in ("Challenge", "Easy")
        },
        "allenai/openbookqa": {"main": _set(three, book, _openbookqa)},
    }
