"""A cache of tiles: attention over mixed tiles as it is executed, in prompts and token by token.

What has left the recent window is held as its tiles and no longer as its positions: cost and memory
grow with the number of tiles. A block of 64 positions is tiled once, by the levels of its own
positions, when it leaves the window; so a text that comes in parts gives what it gives whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vesicle.tiling.attention import tiled_before
from vesicle.tiling.partition import LARGEST, SIZES, tile_sizes
from vesicle.tiling.soft import SINKS, wanted_sizes


class TileCache:
    """Keys and values of one text in one layer: tiles, and the newest positions.

    Attributes:
        length: Positions read so far, T.
        n_tiles: Tiles that stand, those of one position included.
    """

    def __init__(
        self,
        n_groups: int,
        head_size: int,
        *,
        sizes: Sequence[int] = SIZES,
        recent: int = 64,
        corrects: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """An empty cache.

        Args:
            n_groups: G.
            head_size: K.
            sizes: Of tiles.
            recent: Newest positions that are held one by one, at least.
            corrects: Whether a tile's logit gets the logarithm of its size.
            dtype: Of keys and values.
        """
        self.sizes, self.recent, self.corrects = tuple(sizes), recent, corrects
        self.length = self.n_tiles = 0
        self._tiles = torch.zeros(2, n_groups, 0, head_size, dtype=dtype)  # room for more
        self._bias = torch.zeros(0, dtype=dtype)
        self._near = torch.zeros(2, n_groups, 0, head_size, dtype=dtype)
        self._level = torch.zeros(0)
        self._pool: Tensor | None = None

    @property
    def held(self) -> int:
        """Keys and values that are held, of a KV head: tiles and newest positions."""
        return self.n_tiles + self._near.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are held, without room for tiles that are to come."""
        return 2 * self._near.shape[1] * self.held * self._near.shape[3] * self._near.itemsize

    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        level: Tensor,
        scale: float,
        pool: Tensor | None = None,
    ) -> Tensor:
        """Read new positions, and what their queries attend to.

        Args:
            query: (H, t, K), rotated.
            key: (G, t, K), rotated.
            value: (G, t, K).
            level: (t,) of acetylcholine.
            scale: Of the attention logits.
            pool: (G, t) logits of each position's share in its summary.

        Returns:
            (H, t, K).
        """
        outs, done, new = [], 0, query.shape[1]
        while done < new:
            # The next queries that see the same tiles.
            edge = int(tiled_before(torch.tensor(self.length), self.recent))
            stop = min(new, done + edge + LARGEST + self.recent - 1 - self.length)
            self._tile(edge)
            part = slice(done, stop)
            self._near = torch.cat([self._near, torch.stack([key[:, part], value[:, part]])], 2)
            self._level = torch.cat([self._level, level[part].float()])
            if pool is not None:
                before = key.new_zeros(key.shape[0], 0) if self._pool is None else self._pool
                self._pool = torch.cat([before, pool[:, part]], 1)
            self.length += stop - done
            outs.append(self._attend(query[:, part], scale))
            done = stop
        return torch.cat(outs, 1)

    def _attend(self, query: Tensor, scale: float) -> Tensor:
        n, group = query.shape[1], query.shape[0] // self._near.shape[1]
        both = torch.cat([self._tiles[:, :, : self.n_tiles], self._near], 2)
        bias = torch.zeros(n, both.shape[2], dtype=both.dtype)
        bias[:, : self.n_tiles] = self._bias[: self.n_tiles]
        if n > 1:
            later = torch.ones(n, n, dtype=torch.bool).triu(1)
            bias[:, both.shape[2] - n :].masked_fill_(later, -torch.inf)
        # Query heads that share keys are queries of the same ones.
        grouped = query.unflatten(0, (-1, group)).flatten(1, 2)  # (G, R t, K)
        out = scaled_dot_product_attention(
            grouped[None],
            both[:1],
            both[1:],
            attn_mask=bias.repeat(group, 1)[None, None],
            scale=scale,
        )
        return out[0].unflatten(1, (group, n)).flatten(0, 1)

    def _tile(self, edge: int) -> None:
        """Tile all blocks before `edge`."""
        first = self.length - self._near.shape[2]
        count = edge - first
        if count <= 0:
            return
        # Sinks are the first of the text, which only its first block has.
        sinks = max(0, SINKS - first)
        wanted = wanted_sizes(self._level[:count], self.sizes).numpy()
        tiles = torch.from_numpy(tile_sizes(wanted, sinks, self.sizes))
        # The tile that each position lies in, in order.
        begins = torch.arange(count) % tiles == 0
        owner = begins.cumsum(0) - 1
        n = int(begins.sum())
        members = self._near[:, :, :count]
        if self._pool is None:
            shares = (1 / tiles).to(members.dtype).expand(members.shape[1], -1)
        else:
            paid = self._pool[:, :count]
            most = torch.full((paid.shape[0], n), -torch.inf, dtype=paid.dtype)
            most.scatter_reduce_(1, owner.expand(paid.shape), paid, "amax")
            raised = (paid - most[:, owner]).exp()
            sums = torch.zeros_like(most).index_add_(1, owner, raised)
            shares = raised / sums[:, owner]
            self._pool = self._pool[:, count:]
        means = members.new_zeros(*members.shape[:2], n, members.shape[3])
        means.index_add_(2, owner, members * shares[None, :, :, None])
        self._room(n)
        added = slice(self.n_tiles, self.n_tiles + n)
        self._tiles[:, :, added] = means
        if self.corrects:
            self._bias[added] = tiles[begins].to(self._bias.dtype).log()
        self.n_tiles += n
        self._near = self._near[:, :, count:].clone()
        self._level = self._level[count:].clone()

    def _room(self, more: int) -> None:
        have, need = self._tiles.shape[2], self.n_tiles + more
        if need <= have:
            return
        size = max(need, 2 ** math.ceil(math.log2(need)))
        grown = self._tiles.new_zeros(*self._tiles.shape[:2], size, self._tiles.shape[3])
        grown[:, :, :have] = self._tiles
        self._tiles = grown
        self._bias = torch.cat([self._bias, self._bias.new_zeros(size - have)])
