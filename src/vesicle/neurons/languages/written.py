"""Which language a text is in, by script and words; and in which a model goes on.

A language is that of the highest likelihood, with the script of each letter and each word as
independent features, whose frequencies are counted in sentences of the data. So Greek is known by
its letters, and German by its `der` and `und`. How often it is right on other sentences is told.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vesicle.families import cache_argument, find_cache
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.sets import lesions

PROMPT, CONTINUATION = 10, 16
"""Tokens."""
_WORD = re.compile(r"[^\W\d_]+")


class Identifier:
    """Tells languages apart."""

    def __init__(self, languages: Sequence[str], sentences: Sequence[Sequence[str]]) -> None:
        """Count scripts and words.

        Args:
            languages: K names.
            sentences: By language.
        """
        self.languages = tuple(languages)
        self._counts = [Counter(f for text in own for f in _features(text)) for own in sentences]
        self._totals = [sum(counts.values()) for counts in self._counts]
        self._known = len(set().union(*self._counts))

    def language(self, text: str) -> str | None:
        """The likeliest language; None for a text without letters."""
        found = Counter(_features(text))
        if not found:
            return None
        scores = [
            sum(
                n * math.log((counts[feature] + 0.1) / (total + 0.1 * self._known))
                for feature, n in found.items()
            )
            for counts, total in zip(self._counts, self._totals, strict=True)
        ]
        return self.languages[scores.index(max(scores))]

    def accuracy(self, sentences: Sequence[Sequence[str]]) -> float:
        """Share of texts, by language, that are taken for what they are."""
        right = [
            self.language(text) == language
            for language, own in zip(self.languages, sentences, strict=True)
            for text in own
        ]
        return sum(right) / len(right)


def prompts(sentences: Sequence[Sequence[int]], length: int = PROMPT) -> Tensor:
    """(N, length) beginnings of those sentences that are longer.

    Args:
        sentences: Token ids.
        length: Tokens.
    """
    found = [list(ids[:length]) for ids in sentences if len(ids) > length]
    return torch.tensor(found, dtype=torch.long).reshape(-1, length)


@torch.no_grad()
def continuations(
    hooked: Hooked, ids: Tensor, silenced: Sequence[int] | Tensor = (), length: int = CONTINUATION
) -> Tensor:
    """(N, length) how a model goes on from prompts (N, T), greedily, whatever it ends with.

    Args:
        hooked: The model.
        ids: Prompts.
        silenced: Numbers of neurons.
        length: Tokens.
    """
    model: Any = hooked.model
    found: list[Tensor] = []
    cache = None
    with hooked.hold(lesions(silenced, hooked.shape)):
        for _ in range(length):
            given = cache_argument(model, cache)
            out = model(ids, **given, use_cache=True, logits_to_keep=1)
            cache = find_cache(out)
            ids = out.logits[:, -1:].argmax(-1)
            found.append(ids)
    return torch.cat(found, 1)


def _features(text: str) -> list[str]:
    """The script of each letter, and each word."""
    words = _WORD.findall(text.lower())
    scripts = [unicodedata.name(c, "?").split()[0] for word in words for c in word]
    # Scripts in capitals, words in small letters: they cannot be taken for each other.
    return [*scripts, *words]
