"""What is known of each character of a text: its kind, and the word that it is in."""

from __future__ import annotations

from dataclasses import dataclass

WHITESPACE, PUNCTUATION, NUMBER = "whitespace", "punctuation", "number"


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Of a text of n characters.

    Attributes:
        kinds: (n,) of each character.
        words: (n,) the first character of the word that each is in; -1 in none.
    """

    kinds: list[str]
    words: list[int]

    def set(self, first: int, stop: int, kind: str, *, word: bool = False) -> None:
        """Give characters from `first` to before `stop` a kind; perhaps they are a word."""
        for i in range(first, stop):
            if self.kinds[i] != WHITESPACE:
                self.kinds[i] = kind
                self.words[i] = first if word else -1


def unmarked(text: str) -> Marks:
    """All that is visible is punctuation, until told otherwise."""
    return Marks(
        kinds=[WHITESPACE if c.isspace() else PUNCTUATION for c in text], words=[-1] * len(text)
    )
