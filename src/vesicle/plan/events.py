"""Events of a Plan: what happens between its tokens, in order of position.

An event of kind `FORGET` at position p is the end of entries `first` to `last` of the cache, the
keys and values of those tokens in one layer and KV head: queries before p may read them, those from
p on may not, and their memory is free. `kv_head` is -1 where all KV heads forget them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vesicle.errors import VesicleError
from vesicle.plan.rows import IntArray
from vesicle.plan.windows import BLOCK
from vesicle.shapes import ModelShape

FOREVER = 2**31 - 1
"""Of an entry that is never forgotten."""
FORGET = 0
ALL_HEADS = -1

_NAMES = ("position", "layer", "first", "last", "kv_head", "kind", "value")
EVENT = np.dtype([(name, np.int32) for name in _NAMES])
N_EVENT = len(_NAMES)
Events = NDArray[np.void]
"""A structured array of `EVENT`, sorted."""


def table_of(**columns: ArrayLike) -> Events:
    """A table of events, given by columns in any order; those that are left out are 0."""
    given = dict(zip(columns, np.broadcast_arrays(*columns.values()), strict=True))
    some = next(iter(given.values()))
    whole = [given.get(name, np.zeros_like(some)) for name in _NAMES]
    table = np.empty(len(some), EVENT)
    order = np.lexsort(whole[::-1])
    for name, column in zip(_NAMES, whole, strict=True):
        table[name] = column[order]
    return table


def joined(tables: list[Events]) -> Events:
    """One table of all the events of several."""
    whole = np.concatenate([np.zeros(0, EVENT), *tables])
    return table_of(**{name: whole[name] for name in _NAMES})


def forgetting(evict_after: IntArray) -> Events:
    """The events that forget entries.

    Args:
        evict_after: (S, L, G or 1) the last position whose query may read each entry; `FOREVER` for
            those that stay.
    """
    tables = []
    for layer in np.nonzero((evict_after != FOREVER).any((0, 2)))[0].tolist():
        table = evict_after[:, layer]
        together = bool((table == table[:, :1]).all())
        for head in range(1 if together else table.shape[1]):
            column = table[:, head]  # an event for every run of entries that end together
            first = np.concatenate([[0], np.nonzero(np.diff(column))[0] + 1])
            last = np.append(first[1:], len(column)) - 1
            ends = column[first] != FOREVER
            tables.append(
                table_of(
                    position=column[first[ends]] + 1,
                    layer=layer,
                    first=first[ends],
                    last=last[ends],
                    kv_head=ALL_HEADS if together else head,
                )
            )
    return joined(tables)


def evict_after_of(
    events: Events, n_tokens: int, n_layers: int, n_heads: int | None = None
) -> IntArray:
    """(T, L, G or 1) the last position whose query may read each entry.

    The inverse of `forgetting`. G is `n_heads`, by default as many as events name; 1 where they
    name none. Where nothing is forgotten it takes no memory.
    """
    forget = events[events["kind"] == FORGET]
    named = int(forget["kv_head"].max(initial=ALL_HEADS))
    # A model of one KV head names none, and one column would stand for all.
    heads = 1 if named == ALL_HEADS else n_heads or max(named + 1, 2)
    whole = np.broadcast_to(np.int32(FOREVER), (n_tokens, n_layers, heads))
    if not len(forget):
        return whole
    evict_after = whole.copy()
    for position, layer, first, last, head, _, _ in forget.tolist():
        chosen = slice(None) if head == ALL_HEADS else head
        entries = evict_after[first : last + 1, layer, chosen]
        np.minimum(entries, position - 1, out=entries)
    return evict_after


def check_events(events: Events, n_tokens: int, n_layers: int, n_heads: int) -> None:
    """Refuse events that no cache of pages can follow.

    Entries are forgotten a page at a time: an entry outlives its own block of 16, and at a time a
    KV head forgets a multiple of 16 entries.

    Raises:
        VesicleError: With the field, the value and what is allowed.
    """
    bounds: dict[str, tuple[int, int]] = {
        "kind": (FORGET, FORGET),
        "position": (1, FOREVER),
        "layer": (0, n_layers - 1),
        "first": (0, n_tokens - 1),
        "last": (0, n_tokens - 1),
        "kv_head": (ALL_HEADS, n_heads - 1),
        "value": (0, 0),
    }
    for name, (low, high) in bounds.items():
        values = events[name]
        bad = (values < low) | (values > high)
        if bad.any():
            raise VesicleError(
                f"plan event {name!r} is {values[bad][0]} at {int(bad.argmax())}; "
                f"allowed: {low} to {high}"
            )
    falls = events["last"] < events["first"]
    if falls.any():
        at = int(falls.argmax())
        raise VesicleError(
            f"plan event 'last' is {events['last'][at]} at {at}; "
            f"allowed: {events['first'][at]} and above, its 'first'"
        )
    check_evict_after(evict_after_of(events, n_tokens, n_layers, n_heads))


def check_windows(forgets: NDArray[np.bool_], shape: ModelShape) -> None:
    """Refuse to forget entries of windowed layers: their window alone says what they hold.

    Args:
        forgets: (L,) of which layers entries are forgotten.
        shape: Of the model.

    Raises:
        VesicleError: Naming the layer.
    """
    bad = np.nonzero(forgets & (shape.layer_windows > 0))[0]
    if len(bad):
        raise VesicleError(
            f"entries of layer {bad[0]} are to be forgotten, which attends through a window of "
            f"{shape.windows[bad[0]]} positions; allowed: layers that see all entries"
        )


def check_evict_after(evict_after: IntArray) -> None:
    """Refuse ends of entries (T, L, G) that pages cannot follow; see `check_events`.

    Raises:
        VesicleError: With the value and what is allowed.
    """
    t, name = len(evict_after), "plan field 'evict_after'"
    own = np.arange(t, dtype=np.int32) // BLOCK * BLOCK + BLOCK - 1
    bad = evict_after < own[:, None, None]
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise VesicleError(
            f"{name} is {evict_after[where]} at {where}; allowed: {own[where[0]]} and above, the "
            f"end of its block of {BLOCK}"
        )
    # What is forgotten after the last token has no effect here, and may be a part of its kind.
    ends = np.sort(np.where(evict_after < t, evict_after, FOREVER), axis=0)
    ends = np.concatenate([ends, np.full((-t % BLOCK, *ends.shape[1:]), FOREVER, np.int32)])
    groups = ends.reshape(-1, BLOCK, *ends.shape[1:])
    torn = (groups != groups[:, :1]).any((0, 1, 3))
    if torn.any():
        raise VesicleError(
            f"{name} does not fit pages in layer {int(torn.argmax())}; allowed: at a time, "
            f"a KV head forgets a multiple of {BLOCK} entries"
        )
