"""The k highest values of each of many columns, over rows that come window by window: exact, cheap.

Sorting every window would cost a third of the forward pass that made it. So each window is cut into
chunks of rows, of which only the maxima are computed; rows of a chunk are looked at where its
maximum is above the k-th value that a column has. After w windows that is about k / w rows a
column. In the first window the k-th highest of the chunks' maxima is the bound: at least k rows
reach it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 16


class RunningTop:
    """The highest values of columns, and at which rows they stand.

    Attributes:
        values: (F, k) falling; minus infinity where there are no rows yet.
        places: (F, k) int32 numbers of rows; -1 where there are none. Of equal values the earlier
            row stands first, and stays.
    """

    def __init__(self, values: Tensor, places: Tensor, *, lowest: bool = False) -> None:
        """Go on with (F, k) values and places, which are written to.

        Args:
            values: As the attribute.
            places: As the attribute.
            lowest: Keep the lowest values: signs are turned, those of `values` too.
        """
        self.values, self.places, self._lowest = values, places, lowest

    def update(self, x: Tensor, first: int) -> None:
        """Take rows in.

        Args:
            x: (T, F).
            first: Number of the first row; above all that were taken before.
        """
        neuron, value, place = self._candidates(x)
        if not len(neuron):
            return
        # By column, the highest first, the earliest of equals first.
        order = value.argsort(descending=True, stable=True)
        order = order[neuron[order].argsort(stable=True)]
        neuron, value, place = neuron[order], value[order], place[order]
        counts = neuron.bincount(minlength=x.shape[1])
        rank = torch.arange(len(neuron)) - (counts.cumsum(0) - counts)[neuron]
        k = self.values.shape[1]
        kept = rank < k
        neuron, value, place, rank = neuron[kept], value[kept], place[kept], rank[kept]
        touched = counts.nonzero()[:, 0]
        row = torch.empty_like(counts)
        row[touched] = torch.arange(len(touched))
        more = self.values.new_full((len(touched), int(rank.max()) + 1), -torch.inf)
        where = torch.full(more.shape, -1, dtype=torch.int32)
        more[row[neuron], rank] = value
        where[row[neuron], rank] = (place + first).int()
        values, taken = torch.cat([self.values[touched], more], 1).sort(
            dim=1, descending=True, stable=True
        )
        places = torch.cat([self.places[touched], where], 1).gather(1, taken)
        self.values[touched], self.places[touched] = values[:, :k], places[:, :k]

    def _candidates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Columns (N,), values (N,) and rows (N,) of all that may be among the highest."""
        (t, width), k = x.shape, self.values.shape[1]
        whole = t // _CHUNK * _CHUNK
        parts = [x[:whole].view(-1, _CHUNK, width)] if whole else []
        parts += [x[None, whole:]] if whole < t else []
        if self._lowest:
            highest = -torch.cat([part.amin(1) for part in parts])
        else:
            highest = torch.cat([part.amax(1) for part in parts])  # (chunks, F)
        bound = self.values[:, -1]
        new = bound == -torch.inf
        # What only equals the k-th value stays out: it is later.
        bound = bound.nextafter(bound.new_full((), torch.inf))
        if bool(new.any()):
            least = highest.topk(k, dim=0).values[-1] if len(highest) >= k else -torch.inf
            bound = bound.where(~new, least)
        chunk, neuron = (highest >= bound).nonzero(as_tuple=True)
        rows = chunk[:, None] * _CHUNK + torch.arange(_CHUNK)
        found = x[rows.clamp(max=t - 1), neuron[:, None]]
        found = -found if self._lowest else found
        kept = (rows < t) & (found >= bound[neuron, None])
        return neuron[:, None].expand(-1, _CHUNK)[kept], found[kept], rows[kept]
