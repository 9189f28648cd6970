"""Checks of words and letters. Words are runs of letters, digits and underscores, as in IFEval."""

from __future__ import annotations

import re

# No word stands in two of these, so that what one instruction asks for, no other forbids.
KEYWORDS = ("people", "time", "work", "idea", "question", "world", "change", "place")
FORBIDDEN = ("very", "good", "important", "however", "also", "many", "because", "great")
FIRST_WORDS = ("Today", "Perhaps", "Once", "Imagine", "Indeed", "Sometimes")
LAST_SENTENCES = (
    "That is all for now.",
    "Thank you for reading.",
    "This is where I stop.",
    "Let me know what you think.",
)


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores in a text, in order."""
    return re.findall(r"\w+", text)


def lower_case(text: str) -> bool:
    """No capital letter, and at least one letter that has case."""
    return text.islower()


def upper_case(text: str) -> bool:
    """No small letter, and at least one letter that has case."""
    return text.isupper()


def no_commas(text: str) -> bool:
    """No comma (`,`) anywhere; other scripts' commas may occur."""
    return "," not in text


def at_most_words(text: str, n: int) -> bool:
    """At most n words, as `words` finds them."""
    return len(words(text)) <= n


def at_least_words(text: str, n: int) -> bool:
    """At least n words, as `words` finds them."""
    return len(words(text)) >= n


def keyword(text: str, word: str, n: int) -> bool:
    """The word occurs at least n times, letter case aside, not inside others."""
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)) >= n


def avoids(text: str, forbidden: list[str]) -> bool:
    """None of the words occurs, letter case aside; inside others they may."""
    return not any(keyword(text, word, 1) for word in forbidden)


def starts_with(text: str, word: str) -> bool:
    """The first word is this one, letter case aside."""
    return bool(re.match(rf"\W*{re.escape(word)}\b", text, re.IGNORECASE))


def ends_with(text: str, sentence: str) -> bool:
    """The answer ends with the sentence; letter case, blanks and a closing quote aside."""
    return text.strip().rstrip('"').rstrip().lower().endswith(sentence.lower())
