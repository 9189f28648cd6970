"""Forgetting as a text goes on: who decides it, and from what.

A `Forgetter` belongs to an author (`Author.forgetter`) and is asked by whoever executes, layer by
layer, each time that `interval` more tokens have been read: which of the entries that the layer
holds are to go? It may have seen what attention they received meanwhile, or what each of the newest
queries pays to them. Its answer is a table of events, checked here, which becomes part of the Plan;
so a Plan that was made this way is replayed like any other.

It is asked at lengths that depend on nothing but the text, so what is forgotten does not depend on
how a text is cut into passes. A layer is asked about in order of length. Executors differ in which
layer comes first (the engine asks about all layers at each length, the reference about all lengths
of a pass in each layer), so a forgetter keeps what it remembers layer by layer. Only where it
raised an error, or was interrupted, is it asked once more about a layer at the same length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vesicle.errors import VesicleError
from vesicle.plan.events import ALL_HEADS, EVENT, FORGET, Events, table_of
from vesicle.plan.rows import IntArray
from vesicle.plan.windows import BLOCK
from vesicle.shapes import Overhead

if TYPE_CHECKING:
    from vesicle.plan.author import Author


Entries = tuple[Sequence[NDArray[np.floating]], Sequence[NDArray[np.floating]]]
"""Keys and values (m, K) of each KV head."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the entries that each of the KV heads of a layer holds, n of them in each.

    Heads may hold different numbers, so that there is one array for each.

    Attributes:
        positions: (n,) of a head's entries, rising.
        received: (n,) fp32, attention probability that each received since the layer was last asked
            about, summed over the queries and over the query heads of the KV head; zeros unless the
            forgetter `reads_attention`. Queries that skip the layer's attention, and blocks that a
            query did not read, add nothing.
        attention: (w, n) fp32, attention probability that each of the newest w queries, in order of
            position, pays to each entry, mean over the query heads of the KV head; w is what the
            forgetter `observes`. Of entries after the query's own it is 0, and of queries that
            skipped the layer's attention. It is what a query pays that reads all that is held: one
            that chose blocks has read fewer.
        keys: (m, K) fp32, of the newest m entries, before rotary phases; m is the `interval` of a
            forgetter that `reads_entries`, so they are all that came since the layer was last
            asked about, and 0 for others.
        values: (m, K) fp32, of the same entries.
    """

    positions: Sequence[IntArray]
    received: Sequence[NDArray[np.float32]]
    attention: Sequence[NDArray[np.float32]]
    keys: Sequence[NDArray[np.float32]]
    values: Sequence[NDArray[np.float32]]


class Forgetter(ABC):
    """Decides which entries a sequence forgets as it goes on.

    Attributes:
        interval: Tokens between the lengths at which it is asked, a multiple of 16; read once, when
            a sequence starts.
        reads_attention: Whether it needs to know what attention entries received; likewise. The
            engine works out every score twice then; `Overhead.reads_attention` prices it.
        observes: Of how many of the newest queries it needs to know what attention they pay, 0 to
            `interval`; likewise. The scores of these are worked out anew when it is asked;
            `Overhead.observes` prices it.
        reads_entries: Whether it needs to know the keys and values of new entries; likewise.
            `Overhead.reads_entries` prices it.
    """

    interval: int
    reads_attention: bool = False
    observes: int = 0
    reads_entries: bool = False

    @abstractmethod
    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        """Which entries of a layer no query from here on may read.

        A multiple of 16 stays in each KV head: `all_but` makes such events.

        Args:
            layer: Its number.
            length: Tokens read, a multiple of `interval`.
            evidence: Of the entries that are held.

        Returns:
            Events of kind `FORGET` of this layer at this position; an empty table for none.
        """

    def prompt(self, start: int, stop: int) -> None:
        """Be told that the coming tokens `start` to `stop` are prompt, as an author is.

        Forgetters to whom it does not matter how long a text will be have no use for it.
        """
        return None

    def fork(self, n_tokens: int) -> Forgetter:
        """A forgetter of its own that knows what this one knew after `n_tokens`.

        By default refused; one that remembers nothing between its answers may return itself.

        Raises:
            VesicleError: If it cannot tell what it knew then.
        """
        raise VesicleError(
            f"a sequence with a {type(self).__name__} cannot be forked; give it a method "
            "fork(n_tokens), or start a new sequence"
        )


def forgetter_of(author: Author) -> Forgetter | None:
    """An author's forgetter, which both executors can ask.

    Raises:
        VesicleError: If its interval is no multiple of 16, it observes more queries than lie in
            one, or the author forgets beforehand too.
    """
    found = author.forgetter
    if found is None:
        return None
    if not isinstance(found, Forgetter):
        raise VesicleError(f"forgetter is {found!r}; allowed: an instance of a Forgetter, or None")
    if author.evict_after is not None:
        raise VesicleError("an author has evict_after and a forgetter; allowed: one of the two")
    check_interval(getattr(found, "interval", None), type(found).__name__)
    observes = found.observes
    if not _whole(observes) or not 0 <= observes <= found.interval:
        raise VesicleError(
            f"observes of {type(found).__name__} is {observes!r}; allowed: 0 to {found.interval}"
        )
    return found


def check_interval(interval: object, whose: str) -> None:
    """Refuse an interval that is no multiple of 16.

    Raises:
        VesicleError: Naming it.
    """
    if not _whole(interval) or interval < BLOCK or interval % BLOCK:
        raise VesicleError(
            f"interval of {whose} is {interval}; allowed: multiples of {BLOCK} from {BLOCK}"
        )


def _whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def fork_of(forgetter: Forgetter, n_tokens: int) -> Forgetter:
    """A forgetter's fork, which is one.

    Raises:
        VesicleError: If it is none, or the forgetter cannot be forked.
    """
    fork = forgetter.fork(n_tokens)
    if not isinstance(fork, Forgetter):
        raise VesicleError(
            f"fork of {type(forgetter).__name__} gives {fork!r}; allowed: a Forgetter"
        )
    return fork


def with_evidence(overhead: Overhead, author: Author) -> Overhead:
    """What a method adds to the model, with what gathering evidence for its author adds to it."""
    forgetter = author.forgetter
    if forgetter is None:
        return overhead
    return replace(
        overhead,
        reads_attention=forgetter.reads_attention,
        observes=forgetter.observes,
        reads_entries=forgetter.reads_entries,
        interval=forgetter.interval,
    )


def ask(
    forgetter: Forgetter,
    layer: int,
    length: int,
    positions: Sequence[IntArray],
    received: Sequence[NDArray[np.floating]] | None = None,
    attention: Sequence[NDArray[np.floating]] | None = None,
    entries: Entries | None = None,
) -> tuple[Events, list[IntArray]]:
    """Ask about a layer; the events, checked, and what is left of the `positions` of each KV head.

    Args:
        forgetter: Whom.
        layer: Of the entries.
        length: Tokens read.
        positions: (n,) of the entries held by each KV head, rising.
        received: As `Evidence` has it; None if nobody gathered it.
        attention: Likewise.
        entries: Keys and values, likewise.

    Raises:
        VesicleError: If the events are of another layer or position, or do not fit pages.
    """
    if received is None:
        received = [np.zeros(head.shape, np.float32) for head in positions]
    if attention is None:
        attention = [np.zeros((0, len(head)), np.float32) for head in positions]
    if entries is None:
        nothing = [np.zeros((0, 0), np.float32)] * len(positions)
        entries = nothing, nothing
    keys, values = entries
    evidence = Evidence(
        positions=[_shown(head, np.int32) for head in positions],
        received=[_shown(head, np.float32) for head in received],
        attention=[_shown(head, np.float32) for head in attention],
        keys=[_shown(head, np.float32) for head in keys],
        values=[_shown(head, np.float32) for head in values],
    )
    events = forgetter.forget(layer, length, evidence)
    if isinstance(events, np.ndarray):
        events = events.copy()  # the forgetter's own may change
    return events, _left(events, layer, length, positions)


def _shown(numbers: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """A copy that nobody can write to."""
    copy = numbers.astype(dtype)
    copy.flags.writeable = False
    return copy


def all_but(
    layer: int,
    length: int,
    positions: Sequence[IntArray],
    stays: Sequence[NDArray[np.bool_]],
) -> Events:
    """Events by which a layer forgets its entries but for those that are to stay.

    What stays is rounded up to what pages can hold (see `rounded_up`).

    Args:
        layer: Of the entries.
        length: Tokens read, the events' position.
        positions: (n,) of the entries held by each KV head, rising; n a multiple of 16.
        stays: (n,) bool for each KV head, which of them stay.

    Raises:
        VesicleError: If `stays` is of another shape or kind.
    """
    if len(stays) != len(positions):
        raise VesicleError(f"stays is of {len(stays)} KV heads; allowed: {len(positions)}")
    for held, row in zip(positions, stays, strict=True):
        if not isinstance(row, np.ndarray) or row.dtype != bool or row.shape != held.shape:
            kind = f"{row.dtype} of {row.shape}" if isinstance(row, np.ndarray) else repr(row)
            raise VesicleError(
                f"stays is {kind} in a KV head; allowed: an array of bool of {held.shape}"
            )
    runs = []
    for held, row in zip(positions, stays, strict=True):
        edges = np.diff((~rounded_up(row)).astype(np.int8), prepend=0, append=0)
        runs.append((held[np.nonzero(edges == 1)[0]], held[np.nonzero(edges == -1)[0] - 1]))
    together = all(
        np.array_equal(first, runs[0][0]) and np.array_equal(last, runs[0][1])
        for first, last in runs
    )
    heads = [ALL_HEADS] if together else list(range(len(runs)))
    tables = [(*runs[max(0, head)], head) for head in heads]
    return table_of(
        position=length,
        layer=layer,
        first=np.concatenate([first for first, _, _ in tables]),
        last=np.concatenate([last for _, last, _ in tables]),
        kv_head=np.concatenate([np.full(len(first), head) for first, _, head in tables]),
    )


def rounded_up(stays: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n,) what stays in a KV head, a multiple of 16: the last that were to go fill it up."""
    count = int(stays.sum())
    stays, spare = stays.copy(), np.nonzero(~stays)[0]
    stays[spare[len(spare) - min(len(spare), -count % BLOCK) :]] = True
    return stays


def _left(events: Events, layer: int, length: int, positions: Sequence[IntArray]) -> list[IntArray]:
    """What is left (n',) of each head's entries, once events that may happen here have happened."""
    if not isinstance(events, np.ndarray) or events.dtype != EVENT or events.ndim != 1:
        raise VesicleError(
            f"forget gives {type(events).__name__}; allowed: a table of events, as all_but makes it"
        )
    bounds = {
        "position": (length, length),
        "layer": (layer, layer),
        "kind": (FORGET, FORGET),
        "first": (0, length - 1),
        "last": (0, length - 1),
        "kv_head": (ALL_HEADS, len(positions) - 1),
        "value": (0, 0),
    }
    for name, (low, high) in bounds.items():
        values = events[name]
        bad = (values < low) | (values > high)
        if bad.any():
            allowed = str(low) if low == high else f"{low} to {high}"
            raise VesicleError(
                f"an event of forget has {name} {values[bad][0]}; allowed: {allowed}"
            )
    falls = events[events["last"] < events["first"]]
    if len(falls):
        first, last = int(falls["first"][0]), int(falls["last"][0])
        raise VesicleError(f"an event of forget has last {last}; allowed: {first} and above")
    left = []
    for head, held in enumerate(positions):
        mine = events[(events["kv_head"] == ALL_HEADS) | (events["kv_head"] == head)]
        gone = np.zeros(len(held) + 1, np.int64)
        np.add.at(gone, np.searchsorted(held, mine["first"]), 1)
        np.add.at(gone, np.searchsorted(held, mine["last"], "right"), -1)
        left.append(held[gone.cumsum()[:-1] <= 0])
    counts = [len(head) for head in left]
    if any(count % BLOCK for count in counts):
        raise VesicleError(
            f"forget leaves {counts} entries in the KV heads of layer {layer}; allowed: multiples "
            f"of {BLOCK}"
        )
    return left
