"""All generated sets, for tests that compute from the same rows as a command that loads them over HTTP."""

from __future__ import annotations

from datasets import DatasetDict

from .choices import choice_sets

# by repository and configuration
DATA: dict[str, dict[str, DatasetDict]] = choice_sets()

# Their main branch has a script alone, which `datasets` no longer runs.
SCRIPTS = ("ybisk/piqa", "allenai/social_i_qa")
# Their cards say nothing of the data: the files' names do.
PLAIN = ("baber/piqa", "lighteval/siqa")
