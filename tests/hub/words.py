"""Sentences made of a small list of words. None is from a real set."""

from __future__ import annotations

from random import Random

ANIMALS = ("dog", "cat", "horse", "mouse", "bird", "fish", "goat", "duck")
PEOPLE = ("Anna", "Boris", "Clara", "David", "Emma", "Felix")
COLOURS = ("red", "blue", "green", "white", "black", "grey")
PLACES = ("garden", "kitchen", "forest", "river", "market", "school", "barn", "street")
THINGS = ("ball", "book", "stone", "apple", "lamp", "chair", "rope", "bottle")
VERBS = ("finds", "carries", "drops", "hides", "washes", "moves", "paints", "breaks")


class Writer(Random):
    """Writes sentences; the same of the same seed."""

    def subject(self) -> str:
        return f"the {self.choice(COLOURS)} {self.choice(ANIMALS)}"

    def place(self) -> str:
        return f"in the {self.choice(PLACES)}"

    def action(self) -> str:
        return f"{self.choice(VERBS)} the {self.choice(THINGS)}"

    def sentence(self) -> str:
        return f"{self.subject().capitalize()} {self.action()} {self.place()}."

    def others(self, words: tuple[str, ...], taken: str, count: int) -> list[str]:
        """As many words, none of which is the one that is taken."""
        return self.sample([word for word in words if word != taken], count)
