"""What a sequence's queries still see of a layer's entries, in the reference.

Nothing is freed here: entries that were forgotten are left out of what later queries are shown. A
pass is cut at the lengths where something is forgotten, so that a forgetter is asked in the middle
of a pass as it would be between two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.families.base import Rotation
from vesicle.plan import FOREVER, Events, Forgetter, IntArray
from vesicle.plan.events import evict_after_of
from vesicle.plan.forgetting import Entries, ask
from vesicle.retention import eviction_lengths, held_entries


class Memory:
    """The entries of one layer of one sequence.

    Attributes:
        reads_attention: Whether `receive` is to be told what entries receive.
        observes: How many of the newest queries `observe` is to be shown.
        reads_entries: Whether `show` is to be shown keys and values.
    """

    def __init__(
        self,
        evict_after: IntArray,
        layer: int = 0,
        forgetter: Forgetter | None = None,
        note: Callable[[Events], None] | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        """Know when entries end, or ask somebody.

        Args:
            evict_after: (S, G) the last position whose query may read each of the first entries.
            layer: Whose entries they are.
            forgetter: Is asked at its interval; then `evict_after` is (0, G).
            note: Takes the events that it decides on.
            rotation: Of the layer's keys, None for none; for a forgetter that reads them.
        """
        self._evict_after, self._layer = evict_after, layer
        self._forgetter, self._note = forgetter, note
        self._interval = 0 if forgetter is None else forgetter.interval
        self.reads_attention = forgetter is not None and forgetter.reads_attention
        self.observes = 0 if forgetter is None else forgetter.observes
        self._sums = np.zeros((evict_after.shape[1], 0))
        self._newest: _Newest | None = None
        self.reads_entries = forgetter is not None and forgetter.reads_entries
        self._rotation = rotation
        self._entries: tuple[Tensor, Tensor] | None = None

    def periods(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut the tokens `start` to `stop` where something is forgotten; ask as they go by."""
        if self._forgetter is None:
            ends = [n for n in eviction_lengths(self._evict_after[:, None]) if start < n < stop]
        else:
            interval = self._interval
            ends = list(range((start // interval + 1) * interval, stop, interval))
        for first, last in zip([start, *ends], [*ends, stop], strict=True):
            yield first, last
            if self._forgetter is not None and last % self._interval == 0:
                self._ask(self._forgetter, last)

    def held(self, length: int) -> list[IntArray]:
        """For each KV head the positions (n,) below `length`, rising, that the query there sees."""
        return held_entries(self._evict_after[:, None], 0, length)

    def receive(self, heads: slice, entries: IntArray, received: NDArray[np.floating]) -> None:
        """Add what entries (heads, n) of some KV heads received."""
        self._make_room(int(entries.max(initial=-1)) + 1)
        rows = np.arange(heads.start, heads.stop)[:, None]
        self._sums[rows, entries] += received

    def _make_room(self, length: int) -> None:
        more = length - self._sums.shape[1]
        if more > 0:
            self._sums = np.pad(self._sums, ((0, 0), (0, more)))

    @torch.no_grad()
    def observe(self, queries: Tensor, attends: Tensor, keys: Tensor, scale: float) -> None:
        """Remember the newest queries, and all keys.

        Args:
            queries: (H, T, K) of the next T tokens.
            attends: (T,) which of them run.
            keys: (G, S, K) by position, those of these tokens included.
            scale: Of the attention logits.
        """
        if self._newest is not None:
            queries = torch.cat([self._newest.queries, queries], dim=1)
            attends = torch.cat([self._newest.attends, attends])
        last = slice(-self.observes, None)
        self._newest = _Newest(
            queries=queries[:, last], attends=attends[last], keys=keys, scale=scale
        )

    def show(self, keys: Tensor, values: Tensor) -> None:
        """Remember all keys, rotated, and values (G, S, K) by position."""
        self._entries = keys.detach(), values.detach()

    def _new(self, length: int) -> Entries | None:
        """Keys, before rotary phases, and values (m, K) of each head's newest entries."""
        if self._entries is None:
            return None
        positions = torch.arange(length - self._interval, length)
        keys, values = (x[:, positions].cpu() for x in self._entries)
        exact = torch.promote_types(keys.dtype, torch.float32)
        if self._rotation is not None:
            keys = self._rotation.undone(keys.to(exact), positions)
        return list(keys.to(exact).numpy()), list(values.to(exact).numpy())

    def _ask(self, forgetter: Forgetter, length: int) -> None:
        held, received, attention = self.held(length), None, None
        if self.reads_attention:
            self._make_room(length)
            received = [sums[head] for sums, head in zip(self._sums, held, strict=True)]
            self._sums[:] = 0
        if self._newest is not None:
            attention = self._newest.attention(held, length)
        new = self._new(length)
        events, _ = ask(forgetter, self._layer, length, held, received, attention, new)
        assert self._note is not None
        self._note(events)
        whole = np.full((length, len(held)), FOREVER, np.int32)
        whole[: len(self._evict_after)] = self._evict_after
        mine = events.copy()
        mine["layer"] = 0
        ends = np.broadcast_to(evict_after_of(mine, length, 1, len(held))[:, 0], whole.shape)
        # What is gone already does not come back, whatever a run of events covers.
        self._evict_after = np.minimum(whole, ends).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class _Newest:
    """The newest queries of a layer, as `Memory.observe` takes them."""

    queries: Tensor
    attends: Tensor
    keys: Tensor
    scale: float

    @torch.no_grad()
    def attention(self, held: list[IntArray], length: int) -> list[NDArray[np.floating]]:
        """For each KV head (w, n) as `Evidence` has it, of the entries it holds at `length`."""
        device = self.keys.device
        positions = torch.arange(length - len(self.attends), length, device=device)
        found = []
        for head, queries in enumerate(self.queries.unflatten(0, (len(held), -1))):  # (R, w, K)
            places = torch.from_numpy(held[head]).to(device).long()
            scores = (queries @ self.keys[head, places].T) * self.scale  # (R, w, n)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            later = places > positions[:, None]  # (w, n)
            chances = scores.masked_fill(later, -torch.inf).softmax(-1).mean(0)
            found.append((chances * self.attends[:, None]).cpu().numpy())
        return found
