"""What a neuron might be described as: strings from its contexts, its weights and its model.

token     the token itself, where it is a word or a sign
word      the word that the token is a part of
phrase    the word with the one before it
near      words that stand around it oftener than elsewhere
class     named classes of tokens (`classes`) that hold oftener than elsewhere
decoded   tokens that the neuron's output makes likelier, through the LM head
written   what the model answers when it is shown the words and asked what they share
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vesicle.families import cache_argument, find_cache
from vesicle.models import Text
from vesicle.neurons.decoding.readout import Readout
from vesicle.neurons.descriptions.classes import CLASSES
from vesicle.neurons.descriptions.spots import Spot, words_in
from vesicle.neurons.neuron import Neuron

LINE_BREAK = "a line break"
_EXAMPLES = (
    (("Peru", "France", "Kenya"), "countries"),
    (("12", "seven", "1,000"), "numbers"),
    (("uncle", "sister", "wife"), "members of a family"),
    (("was", "had", "did"), "verbs in the past"),
)
_SHOWN, _ANSWER = 8, 7


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many candidates of each kind there are at most."""

    token: int = 3
    word: int = 3
    phrase: int = 2
    near: int = 6
    named: int = 4
    decoded: int = 3
    written: int = 3


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A description that may be chosen.

    Attributes:
        text: The description.
        kind: Where it is from, as the module tells.
    """

    text: str
    kind: str


def of_contexts(spots: Sequence[Spot], others: Sequence[Spot], limits: Limits) -> list[Candidate]:
    """Candidates from a neuron's contexts.

    Args:
        spots: Where it fires most.
        others: Drawn at random.
        limits: How many.
    """
    phrases = [
        f"{before[-1]} {spot.word}"
        for spot in spots
        if spot.word and (before := words_in(spot.before_word))
    ]
    by_kind = {
        "token": _most((s.token.strip() for s in spots), limits.token, 1),
        "word": _most((s.word for s in spots), limits.word, 1),
        "phrase": _most(phrases, limits.phrase, 2),
        "near": _near(spots, others)[: limits.near],
        "class": _holding(spots, others)[: limits.named],
    }
    if any("\n" in spot.token for spot in spots) and LINE_BREAK not in by_kind["class"]:
        by_kind["class"].append(LINE_BREAK)
    found = [Candidate(text=text, kind=kind) for kind, texts in by_kind.items() for text in texts]
    return found or [Candidate(text=best_token(spots), kind="token")]


def best_token(spots: Sequence[Spot]) -> str:
    """The token at which the neuron fires most often, as a description."""
    found = _most((spot.token.strip() for spot in spots), 1, 1)
    return found[0] if found else LINE_BREAK


def decoded(
    readout: Readout, text: Text, neuron: Neuron, *, low: bool, limits: Limits
) -> list[Candidate]:
    """Tokens that the neuron makes likelier where it fires.

    Args:
        readout: Of the neuron's model.
        text: The model's text side.
        neuron: Which.
        low: Whether it fires by its lowest activations.
        limits: How many.
    """
    direction = readout.directions(neuron.layer, "down")[neuron.index][None]
    ids = readout.logits(-direction if low else direction)[0].topk(limits.decoded).indices
    pieces = [piece.strip() for piece in text.pieces(ids.tolist())]
    return [Candidate(text=piece, kind="decoded") for piece in pieces if _visible(piece)]


@torch.no_grad()
def written(model: nn.Module, text: Text, spots: Sequence[Spot], limits: Limits) -> list[Candidate]:
    """What the model says that the words of contexts share: its likeliest beginnings, gone on with.

    Args:
        model: A Hugging Face causal LM.
        text: Its text side.
        spots: Where the neuron fires most.
        limits: How many.
    """
    if not limits.written:
        return []
    words = _most((spot.word for spot in spots), _SHOWN, 1)
    shown = "".join(f"{_question(known)} {answer}\n\n" for known, answer in _EXAMPLES)
    ids = text.encode(shown) + text.encode(_question(words), control_tokens=False, continues=True)
    loaded: Any = model
    device = next(model.parameters()).device
    read = loaded(torch.tensor([ids], device=device), use_cache=True)
    cache: Any = find_cache(read)
    following = read.logits[0, -1].topk(limits.written).indices[:, None]
    cache.batch_repeat_interleave(limits.written)
    answers = [following]
    for _ in range(_ANSWER):
        read = loaded(following, use_cache=True, **cache_argument(model, cache))
        following = read.logits[:, -1:].argmax(-1)
        answers.append(following)
    lines = (text.decode(row.tolist()).split("\n")[0] for row in torch.cat(answers, 1))
    return [Candidate(text=a, kind="written") for a in map(_tidy, lines) if _visible(a)]


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Without those whose text an earlier one has."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.text, candidate)
    return list(found.values())


def _most(texts: Iterable[str], limit: int, least: int) -> list[str]:
    """The most frequent visible ones of at least as many occurrences."""
    counts = Counter(text for text in texts if _visible(text))
    return [text for text, count in counts.most_common(limit) if count >= least]


def _near(spots: Sequence[Spot], others: Sequence[Spot]) -> list[str]:
    """Words of two contexts or more and twice as often as elsewhere, by how much that tells."""
    inside = Counter(word for spot in spots for word in _around(spot))
    outside = Counter(word for spot in others for word in _around(spot))
    found = {}
    for word, n in inside.items():
        share = n / len(spots)
        times = share * (len(others) + 1) / (outside[word] + 0.5)
        if n > 1 and times > 2:
            found[word] = share * math.log(times)
    return sorted(found, key=lambda word: -found[word])


def _holding(spots: Sequence[Spot], others: Sequence[Spot]) -> list[str]:
    """Classes of a quarter of the contexts or more and oftener than elsewhere, likewise."""
    found = {}
    for name, test in CLASSES.items():
        inside = sum(map(test, spots)) / len(spots)
        outside = (sum(map(test, others)) + 0.5) / (len(others) + 1)
        if inside >= 0.25 and inside > outside:
            found[name] = inside * math.log(inside / outside)
    return sorted(found, key=lambda name: -found[name])


def _around(spot: Spot) -> set[str]:
    return {word for word in words_in(spot.before_word) if len(word) > 2}


def _question(words: Sequence[str]) -> str:
    return f"Words: {', '.join(words)}\nThey are all:"


def _tidy(answer: str) -> str:
    return answer.strip().strip(".,;:")


def _visible(text: str) -> bool:
    return any(not character.isspace() for character in text) and "\ufffd" not in text
