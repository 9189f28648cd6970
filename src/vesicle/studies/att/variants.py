"""The variants of a decoder that are compared, and how each is made to read a wanted share.

One that cannot move its share after training is made for each share anew. All have the decoder's
own parameters; tiles have an importance network and pooling weights besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from vesicle.predictors import MlpPredictor, PredictorConfig
from vesicle.scratch.patterns import (
    Dense,
    Linear,
    Lsh,
    Pattern,
    Selected,
    Sliding,
    Strided,
    Tiles,
    TilesState,
    patterned,
)

GLOBAL, ROUNDS = 16, 2


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What stands in the place of dense attention.

    Attributes:
        name: In tables.
        kind: What it is: `dense`, `att`, `selected` or another pattern.
        what: In a line.
        options: Of the pattern.
        per_share: Whether it is trained for one share.
        dials: Whether one model serves every share.
    """

    name: str
    kind: str
    what: str
    options: dict[str, Any] = field(default_factory=dict)
    per_share: bool = False
    dials: bool = False


def _tiles(name: str, what: str, **options: Any) -> Variant:
    # All but one size for all take a budget.
    dials = options.get("importance") != "fixed"
    return Variant(name=name, kind="att", what=what, options=options, dials=dials)


COMPARED = (
    Variant(name="dense", kind="dense", what="every query reads all that is before it"),
    _tiles("att", "tiles of 1, 4, 16, 64 where a learnt importance network puts them"),
    Variant(
        name="longformer",
        kind="longformer",
        what="the newest positions and the first 16",
        per_share=True,
    ),
    Variant(name="reformer", kind="reformer", what="what hashes alike", per_share=True),
    Variant(
        name="block-sparse",
        kind="block-sparse",
        what="the own block of 64 and the ends of those before",
        per_share=True,
    ),
    Variant(name="linear", kind="linear", what="a state of fixed size"),
)
IN_TASKS = ("dense", "att", "longformer", "reformer")
"""Those that are compared in every task."""

ABLATIONS = (
    _tiles("random", "blocks are split at random", importance="random"),
    _tiles("key norm", "split where keys are small", importance="norm"),
    _tiles("received", "split where attention was received", importance="received"),
    _tiles("surprise", "split at tokens that were unlikely", importance="surprise"),
    _tiles("fixed 4", "all tiles of 4", importance="fixed", fixed=4),
    _tiles("fixed 16", "all tiles of 16", importance="fixed", fixed=16),
    _tiles("fixed 64", "all tiles of 64", importance="fixed", fixed=64),
    _tiles("one pattern", "all layers have the first one's tiles", one_pattern=True),
    _tiles("no size term", "a tile counts as one position in the softmax", corrects=False),
    _tiles("mean pooling", "members weigh the same in a summary", pools=False),
    _tiles("1 and 16", "tiles of 1 and 16 alone", sizes=(1, 16)),
    _tiles("1 and 64", "tiles of 1 and 64 alone", sizes=(1, 64)),
)

SELECTED = {
    "quest": "pages of 16 by bounds, the rest unread",
    "twilight": "pages of 16 up to a share of the mass, the rest unread",
    "multipole": "pages of 16 by mean keys, mean values for the rest",
}
"""Ways of running the dense model, without training."""


class Decoder(nn.Module):
    """A decoder and what its pattern learns besides.

    Attributes:
        model: The decoder.
        patterns: Of its layers.
        state: What tiles share; None for other patterns.
    """

    def __init__(self, model: LlamaForCausalLM, variant: Variant, share: float, recent: int):
        """Give the model the variant's pattern.

        Args:
            model: A decoder as it was made.
            variant: Which pattern.
            share: Of dense attention's reads, for one that is made for a share.
            recent: Newest positions that tiles leave alone, at least.
        """
        super().__init__()
        self.model, self.variant = model, variant
        config = model.config
        self.importance: MlpPredictor | None = None
        self.state: TilesState | None = None
        if variant.kind == "att":
            if variant.options.get("importance", "learnt") == "learnt":
                self.importance = MlpPredictor(
                    PredictorConfig(
                        n_layers=config.num_hidden_layers,
                        width=config.hidden_size,
                        transmitters=("acetylcholine",),
                        hidden=8,
                    )
                )
            self.state = TilesState(self.importance)
        make = _maker(variant, self.state, model, share, recent)
        self.patterns = patterned(model, make)

    @property
    def needs_surprise(self) -> bool:
        """Whether its state has to be told the surprise of tokens."""
        return self.variant.options.get("importance") == "surprise"

    def reads(self) -> torch.Tensor:
        """Entries that a query of a layer read in the last pass, on average."""
        return torch.stack([pattern.reads for pattern in self.patterns]).mean()


def _maker(
    variant: Variant,
    state: TilesState | None,
    model: LlamaForCausalLM,
    share: float,
    recent: int,
) -> Callable[[int], Pattern]:
    config = model.config
    length = int(config.max_position_embeddings)
    wanted = share * (length + 1) / 2
    if variant.kind == "att":
        assert state is not None
        return lambda layer: Tiles(
            layer,
            state,
            config.hidden_size,
            int(config.num_key_value_heads or config.num_attention_heads),
            recent=recent,
            **variant.options,
        )
    if variant.kind == "longformer":
        window = _most(lambda n: _mean_reads(Sliding(n, GLOBAL), length), 1, length, wanted)
        return lambda layer: Sliding(window, GLOBAL)
    if variant.kind == "block-sparse":
        columns = _most(lambda n: _mean_reads(Strided(64, n), length), 0, 64, wanted)
        return lambda layer: Strided(64, columns)
    if variant.kind == "reformer":
        return lambda layer: Lsh(buckets_for(share), ROUNDS, recent, seed=layer)
    if variant.kind == "selected":
        return lambda layer: Selected(recent=recent, **variant.options)
    if variant.kind == "linear":
        return lambda layer: Linear()
    return lambda layer: Dense()


def buckets_for(share: float) -> int:
    """Buckets with which vectors at random meet in one of the rounds with this chance."""
    meet = 1 - (1 - share) ** (1 / ROUNDS)
    return max(2, 2 * round(1 / meet / 2))


def _mean_reads(pattern: Pattern, length: int) -> float:
    empty = torch.zeros(1, 1, length, 1)
    pattern(empty, empty, empty, empty, 1.0)
    return float(pattern.reads)


def _most(reads: Callable[[int], float], low: int, high: int, wanted: float) -> int:
    """The largest number, from `low` to `high`, that reads no more than is wanted."""
    while low < high:
        middle = (low + high + 1) // 2
        if reads(middle) <= wanted:
            low = middle
        else:
            high = middle - 1
    return low
