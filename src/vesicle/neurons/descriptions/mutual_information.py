"""How much more likely a description is after a neuron's contexts than without any.

    PMI(d; E) = mean over contexts e of E of log p(d | e)  -  weight * log p(d)

Hernandez et al. 2022 ("Natural Language Descriptions of Deep Visual Features", MILAN) train a
captioner for p(d | E) and a language model for p(d), and search with a beam. Here both are one
pretrained model, which reads a few examples and then a context; for p(d) the context is empty. Not
reproduced are the captioner, the data that people annotated for it, and the beam: d is one of a
list of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vesicle.errors import DataError
from vesicle.models import Text
from vesicle.neurons.descriptions.spots import Spot
from vesicle.neurons.descriptions.tree import Tree

_NODES = 640
"""Tokens of a pass, above which another is begun."""
_EXAMPLES = (
    ("She moved to Paris and has lived in France", "France", "a country"),
    ("The company was founded on 14 March", "March", "a month"),
    ("He scored twice in the final of the league", "league", "football"),
)


class Judge(Protocol):
    """Whoever knows how likely a description is."""

    def given(self, spots: Sequence[Spot], descriptions: Sequence[str]) -> Tensor:
        """(M, C) log p(d | e) of C descriptions in each of M contexts."""

    def alone(self, descriptions: Sequence[str]) -> Tensor:
        """(C,) log p(d)."""


class Scorer:
    """A model that is asked what the last word of a text is about.

    Attributes:
        model: A Hugging Face causal LM.
        text: Its text side.
    """

    def __init__(self, model: nn.Module, text: Text) -> None:
        """Ask a model.

        Args:
            model: A Hugging Face causal LM.
            text: Its text side.
        """
        self.model, self.text = model, text
        shown = (f"{_prompt(before, word)} {what}\n\n" for before, word, what in _EXAMPLES)
        self._root = text.encode("".join(shown))

    def given(self, spots: Sequence[Spot], descriptions: Sequence[str]) -> Tensor:
        """(M, C) log p(d | e) of C descriptions after each of M spots.

        Raises:
            DataError: A description is blank.
        """
        prompts = []
        for spot in spots:
            whole = " ".join((spot.before + spot.token).split())
            prompts.append(_prompt(whole, spot.token.strip() or "line break"))
        return self._score(prompts, descriptions)

    def alone(self, descriptions: Sequence[str]) -> Tensor:
        """(C,) log p(d), with an empty context.

        Raises:
            DataError: A description is blank.
        """
        return self._score([_prompt("", "")], descriptions)[0]

    def _score(self, prompts: Sequence[str], descriptions: Sequence[str]) -> Tensor:
        if blank := [d for d in descriptions if not d.strip()]:
            raise DataError(f"a description is {blank[0]!r}; allowed: visible characters")
        # The line's end is a part of it: "Bank" is not the beginning of "Bank of England".
        endings = [self._encode(f" {d}\n") for d in descriptions]
        found, tree = list[Tensor](), Tree(self._root)
        for number, prompt in enumerate(prompts, 1):
            tree.add(self._encode(prompt), endings)
            if tree.size > _NODES or number == len(prompts):
                found.append(tree.score(self.model))
                tree = Tree(self._root)
        return torch.cat(found).view(len(prompts), -1)

    def _encode(self, part: str) -> list[int]:
        """Of text that may spell out special tokens, and means none."""
        return self.text.encode(part, control_tokens=False, continues=True)


def mutual_information(given: Tensor, alone: Tensor, weight: float) -> Tensor:
    """(C,) PMI of descriptions with a set of contexts.

    Args:
        given: (M, C) log p(d | e).
        alone: (C,) log p(d).
        weight: Of the second term; 1 is PMI itself, less prefers likelier descriptions.
    """
    return given.mean(0) - weight * alone


def _prompt(context: str, word: str) -> str:
    return f"Text: {context}\nWord: {word}\nTopic:"
