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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.plan.events import ALL_HEADS, EVENT, FORGET, Events, table_of
from vesicle.plan.rows import IntArray
from vesicle.plan.windows import BLOCK
from vesicle.shapes import Overhead

if TYPE_CHECKING:
    from vesicle.plan.author import Author


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the n entries that each of G KV heads of a layer holds.

    Attributes:
        positions: (G, n) of the entries, rising.
        received: (G, n) fp32, attention probability that each received since the layer was last
            asked about, summed over the queries and over the query heads of each KV head; zeros
            unless the forgetter `reads_attention`. Queries that skip the layer's attention, and
            blocks that a query did not read, add nothing.
        attention: (G, w, n) fp32, attention probability that each of the newest w queries, in order
            of position, pays to each entry, mean over the query heads of each KV head; w is what
            the forgetter `observes`. Of entries after the query's own it is 0, and of queries that
            skipped the layer's attention. It is what a query pays that reads all that is held: one
            that chose blocks has read fewer.
    """

    positions: IntArray
    received: NDArray[np.float32]
    attention: NDArray[np.float32]


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
    """

    interval: int
    reads_attention: bool = False
    observes: int = 0

    @abstractmethod
    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        """Which entries of a layer no query from here on may read.

        At a time all KV heads of a layer forget as many, and a multiple of 16 stay: `all_but`
        makes such events.

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
        interval=forgetter.interval,
    )


def ask(
    forgetter: Forgetter,
    layer: int,
    length: int,
    positions: IntArray,
    received: NDArray[np.floating] | None,
    attention: NDArray[np.floating] | None,
) -> tuple[Events, IntArray]:
    """Ask about a layer; the events, checked, and what is left (G, n') of `positions` (G, n).

    Args:
        forgetter: Whom.
        layer: Of the entries.
        length: Tokens read.
        positions: Of the entries held, rising.
        received: (G, n) as `Evidence` has it; None if nobody gathered it.
        attention: (G, w, n) likewise.

    Raises:
        VesicleError: If the events are of another layer or position, or do not fit pages.
    """
    told = np.zeros(positions.shape, np.float32)
    if received is not None:
        told[:] = received
    shown, (g, n) = positions.copy(), positions.shape
    paid = np.zeros((g, 0, n), np.float32) if attention is None else attention.astype(np.float32)
    told.flags.writeable = shown.flags.writeable = paid.flags.writeable = False
    evidence = Evidence(positions=shown, received=told, attention=paid)
    events = forgetter.forget(layer, length, evidence)
    if isinstance(events, np.ndarray):
        events = events.copy()  # the forgetter's own may change
    return events, _left(events, layer, length, positions)


def all_but(layer: int, length: int, positions: IntArray, stays: NDArray[np.bool_]) -> Events:
    """Events by which a layer forgets its entries but for those that are to stay.

    What stays is rounded up to what pages can hold (see `rounded_up`).

    Args:
        layer: Of the entries.
        length: Tokens read, the events' position.
        positions: (G, n) of the entries held, rising; n a multiple of 16.
        stays: (G, n) bool, which of them stay.

    Raises:
        VesicleError: If `stays` is of another shape or kind.
    """
    if not isinstance(stays, np.ndarray) or stays.dtype != bool or stays.shape != positions.shape:
        kind = f"{stays.dtype} of {stays.shape}" if isinstance(stays, np.ndarray) else repr(stays)
        raise VesicleError(f"stays is {kind}; allowed: an array of bool of {positions.shape}")
    gone = ~rounded_up(stays)
    together = len(gone) == 1 or bool(
        (gone == gone[:1]).all() and (positions == positions[:1]).all()
    )
    tables = []
    for head in range(1 if together else len(gone)):
        edges = np.diff(gone[head].astype(np.int8), prepend=0, append=0)
        first, last = np.nonzero(edges == 1)[0], np.nonzero(edges == -1)[0] - 1
        which = ALL_HEADS if together else head
        tables.append((positions[head, first], positions[head, last], np.full(len(first), which)))
    firsts, lasts, heads = (np.concatenate(column) for column in zip(*tables, strict=True))
    return table_of(position=length, layer=layer, first=firsts, last=lasts, kv_head=heads)


def rounded_up(stays: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(G, n) what stays, as many in each KV head and a multiple of 16.

    The most that any head was to keep, rounded up; the last entries that were to go fill a head up.
    """
    n = stays.shape[1]
    counts = stays.sum(1)
    target = min(n, -(-int(counts.max(initial=0)) // BLOCK) * BLOCK)
    stays = stays.copy()
    for row, count in zip(stays, counts.tolist(), strict=True):
        spare = np.nonzero(~row)[0]
        row[spare[len(spare) - (target - count) :]] = True
    return stays


def _left(events: Events, layer: int, length: int, positions: IntArray) -> IntArray:
    """What is left (G, n') of the entries held, once events that may happen here have happened."""
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
    gone = np.zeros((len(positions), positions.shape[1] + 1), np.int64)
    for head, row in enumerate(gone):
        mine = events[(events["kv_head"] == ALL_HEADS) | (events["kv_head"] == head)]
        np.add.at(row, np.searchsorted(positions[head], mine["first"]), 1)
        np.add.at(row, np.searchsorted(positions[head], mine["last"], "right"), -1)
    stays = gone.cumsum(1)[:, :-1] <= 0
    counts = stays.sum(1)
    if (counts != counts[0]).any() or counts[0] % BLOCK:
        raise VesicleError(
            f"forget leaves {counts.tolist()} entries in the KV heads of layer {layer}; allowed: "
            f"as many in each, a multiple of {BLOCK}"
        )
    return positions[stays].reshape(len(positions), -1)
