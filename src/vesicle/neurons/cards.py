"""A card for every neuron of a model: its tokens, where it fires, which transmitters it drives.

Kept in a folder, and gone on with where a run was cut off: weights through the LM head (`decoding`)
beside random mixtures of them, one pass over a text (`contexts`), and slopes of released levels
(`drives`). A card says what was seen. Whether a neuron does what its card suggests is told by
clamps and lesions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesicle.errors import DataError
from vesicle.models import Text
from vesicle.neurons.contexts import Contexts, ContextSettings, collect
from vesicle.neurons.decoding.mixtures import load_mixtures, score_mixtures
from vesicle.neurons.decoding.tokens import Decoded, decode_all
from vesicle.neurons.drives import Drives, find_drives, released
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron
from vesicle.neurons.own_text import own_texts

_DECODED, _MIXTURES, _CONTEXTS, _DRIVES = "decoded", "mixtures", "contexts", "drives"
_PARTS = (_DECODED, _MIXTURES, _CONTEXTS, _DRIVES)
AROUND = 12
"""Tokens that are shown before and behind a place, at most."""

Show = Callable[[str, int, int, str], None]
"""Told what is going on, how much is done, of how much, and a note."""


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """How cards are made.

    Attributes:
        top: Tokens of each direction.
        mixtures: Random directions of each layer and projection, as a control of scores.
        contexts: Highest activations of a neuron, and as many lowest.
        drawn: Places at which all activations are kept; all that count where there are fewer.
        attributed: Windows that levels are attributed on, of `attributed_tokens` each.
        attributed_tokens: T of those.
    """

    top: int = 6
    mixtures: int = 64
    contexts: int = 8
    drawn: int = 1024
    attributed: int = 12
    attributed_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Context:
    """A place where a neuron fires.

    Attributes:
        activation: There.
        before: The text before the token.
        token: Its text.
        behind: The text behind it.
    """

    activation: float
    before: str
    token: str
    behind: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of one neuron.

    Attributes:
        neuron: As `LAYER.NEURON`.
        tokens: By projection, which way (`+` or `-`), by how much, and the likeliest tokens.
        highest: Where it fires most.
        lowest: Where it is most negative.
        mean: Activation on average.
        deviation: Standard deviation of it.
        share_above_half: Share of tokens above half of its maximum.
        drives: Signed contribution to each transmitter's levels, and its rank among all neurons.
    """

    neuron: str
    tokens: dict[str, dict[str, Any]]
    highest: tuple[Context, ...]
    lowest: tuple[Context, ...]
    mean: float
    deviation: float
    share_above_half: float
    drives: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Cards:
    """All of a model's.

    Attributes:
        decoded: Neurons as tokens.
        mixtures: (L, P, n) scores of random mixtures of a layer's neurons.
        contexts: Where they fire.
        drives: What they contribute to levels.
    """

    decoded: Decoded
    mixtures: Tensor
    contexts: Contexts
    drives: Drives

    @property
    def shape(self) -> tuple[int, int]:
        """L and F."""
        n_layers, width = self.contexts.mean.shape
        return n_layers, width

    @property
    def model(self) -> str:
        """What the model is called."""
        return str(self.decoded.facts["model"])

    @cached_property
    def deviation(self) -> Tensor:
        """(L, F) standard deviation of activations over the tokens that count."""
        own = self.contexts
        return (own.mean_square - own.mean.square()).clamp_min(0).sqrt()

    @cached_property
    def share_above_half(self) -> Tensor:
        """(L, F) share of tokens above half of the neuron's maximum."""
        return self.contexts.share_above(0.5)

    @classmethod
    def load(cls, folder: Path) -> Cards:
        """Read what `make_cards` left.

        Raises:
            DataError: It is not all there, or damaged.
        """
        if missing := [name for name in _PARTS if not (folder / name).is_dir()]:
            raise DataError(
                f"{folder} has no {missing[0]}: it holds no finished cards; vesicle neurons report "
                "makes them"
            )
        return cls(
            decoded=Decoded.load(folder / _DECODED),
            mixtures=load_mixtures(folder / _MIXTURES),
            contexts=Contexts.load(folder / _CONTEXTS),
            drives=Drives.load(folder / _DRIVES),
        )

    def check_text(self, text: Text) -> None:
        """Refuse tokens of another model.

        Raises:
            DataError: There are fewer than are told of.
        """
        most = max(int(self.decoded.ids.max()), int(self.contexts.tokens.max()))
        if most >= text.vocab_size:
            raise DataError(
                f"these cards are of {self.model} and name token {most}; this model's tokens are "
                f"0 to {text.vocab_size - 1}"
            )

    def card(self, neuron: Neuron, text: Text) -> Card:
        """One neuron's.

        Args:
            neuron: Which.
            text: The model's tokens.
        """
        at = neuron.layer, neuron.index
        tokens = {}
        for place, kind in enumerate(self.decoded.kinds):
            scores = self.decoded.scores[neuron.layer, place, neuron.index]
            way = int(scores.argmax())
            ids = self.decoded.ids[neuron.layer, place, neuron.index, way].tolist()
            tokens[kind] = {
                "way": "+-"[way],
                "score": round(float(scores[way]), 3),
                "likeliest": text.pieces(ids),
            }
        return Card(
            neuron=str(neuron),
            tokens=tokens,
            highest=self._contexts(neuron, text, low=False),
            lowest=self._contexts(neuron, text, low=True),
            mean=float(self.contexts.mean[at]),
            deviation=float(self.deviation[at]),
            share_above_half=float(self.share_above_half[at]),
            drives={
                name: {
                    "drive": float(self.drives.drive[name][at]),
                    "rank": 1 + int((size > size[at]).sum()),
                }
                for name, size in self.drives.size.items()
            },
        )

    def _contexts(self, neuron: Neuron, text: Text, *, low: bool) -> tuple[Context, ...]:
        values, places = self.contexts.extremes(low=low)
        found = []
        for value, (window, token) in zip(
            values[neuron.layer, neuron.index].tolist(),
            places[neuron.layer, neuron.index].tolist(),
            strict=True,
        ):
            own = own_texts(self.contexts.tokens[window].tolist(), text)
            found.append(
                Context(
                    activation=value,
                    before="".join(own[max(0, token - AROUND) : token]),
                    token=own[token],
                    behind="".join(own[token + 1 : token + 1 + AROUND]),
                )
            )
        return tuple(found)


def make_cards(
    hooked: Hooked,
    windows: Tensor,
    out: Path,
    settings: CardSettings,
    *,
    name: str,
    show: Show | None = None,
) -> Cards:
    """Make the cards of all neurons, going on where a run was cut off.

    Args:
        hooked: A model in fp32, with a modulator below rest if drives are wanted.
        windows: (N, T) token ids of a text.
        out: Folder that keeps all.
        settings: How.
        name: What the model is called.
        show: Told of progress.

    Raises:
        DataError: The text is too short.
        VesicleError: The folder holds what was made otherwise; or the modulator's levels follow
            from no activation.
    """
    # Before minutes of work.
    released(hooked)
    read = _context_settings(windows, settings)
    read.check(windows)
    n_layers = hooked.shape.n_layers

    def told(what: str, total: int) -> Callable[[int, str], None] | None:
        return None if show is None else lambda done, note: show(what, done, total, note)

    def told_drives(transmitter: str, done: int, note: str) -> None:
        if show is not None:
            show(f"drives of {transmitter}", done, len(texts), note)

    decoded = decode_all(
        hooked.model, out / _DECODED, name=name, k=settings.top, show=told("decoding", n_layers)
    )
    mixtures = score_mixtures(
        hooked.model, out / _MIXTURES, count=settings.mixtures, show=told("mixtures", n_layers)
    )
    contexts = collect(
        Hooked(hooked.model, check=False),
        windows,
        read,
        out / _CONTEXTS,
        show=told("reading", len(windows)),
    )
    texts = _spans(windows, settings)
    drives = find_drives(hooked, texts, out / _DRIVES, show=told_drives)
    return Cards(decoded=decoded, mixtures=mixtures, contexts=contexts, drives=drives)


def _context_settings(windows: Tensor, settings: CardSettings) -> ContextSettings:
    n, t = windows.shape
    own = ContextSettings(k=settings.contexts)
    return replace(own, drawn=max(1, min(settings.drawn, n * (t - own.skip))))


def _spans(windows: Tensor, settings: CardSettings) -> Tensor:
    """The beginnings of windows, evenly spread over the text."""
    count = min(settings.attributed, len(windows))
    at = torch.linspace(0, len(windows) - 1, count).round().long()
    return windows[at, : settings.attributed_tokens].contiguous()
