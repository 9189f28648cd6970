"""Adaptive Tensor Tiling in a decoder: an importance network says where a layer's tiles are small.

The network is acetylcholine's predictor, shared with the modulator: from a layer's hidden states
and the budget it releases a level for each position, and the level says how large a tile the
position may lie in. So one model serves every budget, and at rest it is dense. Tiles are made anew
in each layer.

What else may say what is important, for comparison: `norm` (keys of small norm matter), `received`
(attention that a position got until it was tiled), `surprise` (how unlikely the token was after the
one before it, by counts in the training text), `random`, and `fixed` (tiles of one size). Of these
all but the last split each block of 64 into as many tiles as the budget allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.predictors import Predictor
from vesicle.scratch.patterns.base import Pattern
from vesicle.tiling.attention import tiled_before
from vesicle.tiling.cache import TileCache
from vesicle.tiling.partition import LARGEST, SIZES, split_to_budget
from vesicle.tiling.soft import SINKS, soft_tiled_attention, thresholds

IMPORTANCES = ("learnt", "norm", "received", "surprise", "random", "fixed")


@dataclass
class TilesState:
    """What all layers of a decoder have in common in one pass.

    Attributes:
        predictor: Acetylcholine's; None where nothing is learnt.
        budget: Share of dense attention's reads, which a predictor takes as its dial.
        temperature: Of the edges of tiles.
        surprise: (B, T) of the tokens that are read, for that importance.
        levels: (B, T) that each layer released in the last pass.
    """

    predictor: Predictor | None = None
    budget: float = 1.0
    temperature: float = 0.0
    surprise: Tensor | None = None
    levels: list[Tensor] = field(default_factory=list)


class Tiles(Pattern):
    """Tiles of unlike sizes."""

    kind = "att"

    def __init__(
        self,
        layer: int,
        state: TilesState,
        width: int,
        n_groups: int,
        *,
        importance: str = "learnt",
        sizes: Sequence[int] = SIZES,
        recent: int = 32,
        pools: bool = True,
        corrects: bool = True,
        one_pattern: bool = False,
        fixed: int = 16,
        per_block: int | None = None,
    ) -> None:
        """The pattern.

        Args:
            layer: Its number.
            state: Shared with the other layers.
            width: D.
            n_groups: G.
            importance: One of `IMPORTANCES`.
            sizes: Of tiles.
            recent: Newest positions that are read one by one, at least.
            pools: Whether what a member weighs in its tile's summary is learnt.
            corrects: Whether a tile's logit gets the logarithm of its size.
            one_pattern: Whether all layers have the tiles of the first.
            fixed: Size of the tiles of importance `fixed`.
            per_block: Tiles of a block of 64 where importance is not learnt; what the budget allows
                in a text of the length by default, which makes tiles depend on it.

        Raises:
            ValueError: If there is no such importance.
        """
        super().__init__()
        if importance not in IMPORTANCES:
            raise ValueError(f"importance is {importance!r}; allowed: {', '.join(IMPORTANCES)}")
        self.layer, self.importance, self.sizes = layer, importance, tuple(sizes)
        self.recent, self.corrects, self.fixed = recent, corrects, fixed
        self.one_pattern, self.per_block = one_pattern, per_block
        self.state = state  # no module, so that what is shared is no parameter of each layer
        self._cache: TileCache | None = None
        self.pool: nn.Parameter | None = None
        if pools:
            self.pool = nn.Parameter(torch.zeros(n_groups, width))

    def begin(self) -> None:
        """Hold tiles, and execute them: of one text, at a learnt or fixed importance."""
        super().begin()
        self._cache = None

    def end(self) -> None:
        """See the base class."""
        super().end()
        self._cache = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of tiles and newest positions."""
        return 0 if self._cache is None else self._cache.nbytes

    def read(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """`forward`, or the same executed on tiles that are held."""
        if not self._remembers:
            return self(hidden, query, key, value, scale)
        if self._cache is None:
            self._cache = TileCache(
                key.shape[1],
                key.shape[3],
                sizes=self.sizes,
                recent=self.recent,
                corrects=self.corrects,
                dtype=key.dtype,
            )
        if self.layer == 0:
            self.state.levels.clear()
        level = self._level(hidden, query, key, scale, self._cache.length)
        self.state.levels.append(level)
        pool = self.pool_logits(hidden)
        out = self._cache.extend(
            query[0], key[0], value[0], level[0], scale, None if pool is None else pool[0]
        )
        self.reads = torch.tensor(float(self._cache.held))
        return out[None]

    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See the base class."""
        if self.layer == 0:
            self.state.levels.clear()
        level = self._level(hidden, query, key, scale)
        self.state.levels.append(level)
        found = soft_tiled_attention(
            query,
            key,
            value,
            level,
            scale,
            sizes=self.sizes,
            temperature=self.state.temperature,
            recent=self.recent,
            pool=self.pool_logits(hidden),
            corrects=self.corrects,
        )
        self.reads = found.reads.mean()
        return found.output

    def pool_logits(self, hidden: Tensor) -> Tensor | None:
        """(B, G, T) what positions weigh in their tile's summary, before the softmax."""
        if self.pool is None:
            return None
        return torch.einsum("btd,gd->bgt", hidden, self.pool)

    def level(self, hidden: Tensor, first: int = 0) -> Tensor:
        """(B, T) that the importance network releases for positions from `first` on."""
        assert self.state.predictor is not None
        batch, length = hidden.shape[:2]
        return self.state.predictor.release(
            self.layer,
            hidden,
            torch.arange(first, first + length, device=hidden.device).expand(batch, length),
            torch.full((batch,), self.state.budget, device=hidden.device),
            {},
        )[..., 0]

    def _level(
        self, hidden: Tensor, query: Tensor, key: Tensor, scale: float, first: int = 0
    ) -> Tensor:
        if self.one_pattern and self.layer > 0:
            return self.state.levels[0]
        if self.state.budget >= 1:
            return torch.ones(hidden.shape[:2], device=hidden.device)
        if self.importance == "learnt":
            return self.level(hidden, first)
        if self.importance == "fixed":
            return torch.full(hidden.shape[:2], self._inside(self.fixed), device=hidden.device)
        scores = self._scores(query.detach(), key.detach(), scale)
        return self._split(scores)

    def _inside(self, size: int) -> float:
        """A level whose position may lie in tiles of up to `size`."""
        edges = [1.0, *thresholds(self.sizes), 0.0]
        place = self.sizes.index(size)
        return (edges[place] + edges[place + 1]) / 2

    def _scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """(B, T) of importance, by what is known when a position is tiled."""
        if self.importance == "random":
            generator = torch.Generator().manual_seed(self.layer)
            return torch.rand(key.shape[0], key.shape[2], generator=generator)
        if self.importance == "surprise":
            assert self.state.surprise is not None
            return self.state.surprise
        if self.importance == "norm":
            return -key.norm(dim=-1).mean(1)
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scale
        place = torch.arange(length, device=key.device)
        chances = logits.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
        # Paid by queries for whom it is not tiled yet.
        near = place >= tiled_before(place, self.recent)[:, None]
        return (chances * near).sum(-2).mean(1)

    def _split(self, scores: Tensor) -> Tensor:
        """Levels under which each block of 64 has as many tiles as the budget allows."""
        batch, length = scores.shape
        whole = length // LARGEST * LARGEST
        n_tiles = self.per_block or tiles_a_block(self.state.budget, length, self.recent)
        levels = torch.ones(batch, length)
        inside = {size: self._inside(size) for size in self.sizes}
        blocks = scores[:, :whole].reshape(-1, LARGEST).cpu().numpy()
        sizes = np.stack([split_to_budget(block, n_tiles) for block in blocks])
        found = torch.tensor([[inside[int(s)] for s in row] for row in sizes])
        levels[:, :whole] = found.view(batch, whole)
        return levels.to(scores.device)


def tiles_a_block(budget: float, length: int, recent: int) -> int:
    """Tiles of a block of 64 with which a text is read at a budget, from 1 to 64.

    Args:
        budget: Share of dense attention's reads.
        length: T.
        recent: Newest positions that are read one by one, at least.
    """
    place = torch.arange(length)
    edge = tiled_before(place, recent)
    near, blocks = float((place + 1 - edge).sum()), float((edge // LARGEST).sum())
    if blocks == 0:
        return LARGEST
    sinks = SINKS * float((edge > 0).sum())  # the first block has them in any case
    left = budget * length * (length + 1) / 2 - near - sinks
    return int(min(LARGEST, max(1, left / blocks)))
