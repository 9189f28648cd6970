"""The Plan: the discrete decisions of one sequence, in two tables.

`rows` has one row for each of T tokens in each of L layers; its fields are listed in `layout.py`.
`events` holds what happens between tokens: entries of the cache that end; see `events.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.files import atomic_path
from vesicle.plan.events import (
    EVENT,
    N_EVENT,
    Events,
    check_events,
    check_windows,
    evict_after_of,
    forgetting,
)
from vesicle.plan.rows import (
    BY_NAME,
    OF_HEAD,
    ROW,
    IntArray,
    Rows,
    check_rows,
    numbers,
    resting_rows,
)
from vesicle.shapes import ModelShape

_FORMAT, _OLD_FORMAT = "vesicle-plan-2", "vesicle-plan-1"
_EVENTS = "events"
_TURN = 1
"""A kind of event that was written once, and tells nothing that matters any more."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The discrete decisions of one sequence of T tokens.

    Every field of its rows is an attribute as well: `plan.channels` is (T, L, 4), `plan.ffn`
    (T, L), and `plan.head` (T,), as all that are of the last layer alone.

    Attributes:
        rows: (T, L) of type `ROW`.
        events: (n,) of type `EVENT`, sorted.
    """

    rows: Rows
    events: Events = field(default_factory=lambda: np.zeros(0, EVENT))

    @classmethod
    def of(cls, evict_after: IntArray | None = None, **fields: NDArray[Any]) -> Plan:
        """A Plan from the arrays of its fields.

        Args:
            evict_after: As the attribute; nothing is forgotten by default.
            fields: Each as the attribute of that name; those of the LM head rest by default.

        Raises:
            VesicleError: If a shape is not that of the others, or numbers are not int32.
        """
        shape = fields["ffn"].shape
        if len(shape) != 2:
            raise VesicleError(f"plan field 'ffn' has shape {shape}")
        rows = np.zeros(shape, ROW)
        for name in BY_NAME:
            if name in fields or name not in OF_HEAD:
                _fill(rows, name, fields[name])
        plan = cls(rows=rows)
        return plan if evict_after is None else plan.with_fields(evict_after=evict_after)

    def with_fields(self, **fields: NDArray[Any]) -> Plan:
        """This Plan with other values of some fields, or another `evict_after`."""
        rows, events = self.rows.copy(), self.events
        if "evict_after" in fields:
            events = forgetting(_whole(fields.pop("evict_after"), "evict_after", rows.shape))
        for name, values in fields.items():
            _fill(rows, name, values)
        return Plan(rows=rows, events=events)

    def __getattr__(self, name: str) -> IntArray:
        """A field of the rows: (T, L, width), (T, L) for one number, (T,) of the last layer."""
        if name not in BY_NAME:
            raise AttributeError(f"a Plan has no field {name!r}; its fields: {', '.join(BY_NAME)}")
        values: IntArray = self.rows[name]
        return values[:, -1] if BY_NAME[name].last_layer else values

    @cached_property
    def evict_after(self) -> IntArray:
        """(T, L, G or 1) the last position whose query may read each entry, by KV head."""
        return evict_after_of(self.events, self.n_tokens, self.n_layers)

    @property
    def forgets(self) -> bool:
        """Whether any entry is ever forgotten."""
        return len(self.events) > 0

    @property
    def n_tokens(self) -> int:
        """T, the tokens that are decided about."""
        return int(self.rows.shape[0])

    @property
    def n_layers(self) -> int:
        """L, the layers of the model."""
        return int(self.rows.shape[1])

    @classmethod
    def rest(cls, shape: ModelShape, n_tokens: int) -> Plan:
        """The Plan of the dense model for a sequence that starts at position 0."""
        return cls(rows=resting_rows(shape, np.arange(n_tokens, dtype=np.int32)))

    def tokens(self, start: int, stop: int | None = None) -> Plan:
        """The rows `start:stop`, whose entries end at the positions at which they end here."""
        start, stop, _ = slice(start, stop).indices(self.n_tokens)
        plan = Plan(rows=self.rows[start:stop])
        return plan.with_fields(evict_after=self.evict_after[start:stop]) if self.forgets else plan

    def equals(self, other: Plan) -> bool:
        """Whether every decision is the same."""
        if not np.array_equal(numbers(self.rows), numbers(other.rows)):
            return False
        if not self.forgets and not other.forgets:
            return True
        heads = max(self.evict_after.shape[2], other.evict_after.shape[2])
        mine, others = (
            evict_after_of(plan.events, plan.n_tokens, plan.n_layers, heads)
            for plan in (self, other)
        )
        return bool((mine == others).all())  # one column stands for all heads

    def check(self, shape: ModelShape) -> None:
        """Refuse a Plan that does not fit a model.

        Raises:
            VesicleError: With the field, the value and what is allowed.
        """
        if self.n_layers != shape.n_layers:
            raise VesicleError(f"plan has {self.n_layers} layers; this model has {shape.n_layers}")
        check_rows(self.rows, shape, np.arange(self.n_tokens, dtype=np.int32))
        if len(self.events):
            check_events(self.events, self.n_tokens, self.n_layers, shape.n_kv_heads)
            layers = np.isin(np.arange(self.n_layers), self.events["layer"])
            check_windows(layers, shape)

    def save(self, path: Path | str) -> None:
        """Write the Plan to a safetensors file, atomically: a tensor for each field."""
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(self.rows[name]) for name in BY_NAME}
        if len(self.events):
            tensors[_EVENTS] = numbers(self.events)
        data = save(tensors, metadata={"format": _FORMAT})
        # Not by the library's own `save_file`, which replaces a device by a regular file.
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a Plan that `save` wrote, of this format or the one before.

        Raises:
            VesicleError: If the file is missing, corrupt or not a Plan.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                written = (file.metadata() or {}).get("format")
                if written not in (_FORMAT, _OLD_FORMAT):
                    raise VesicleError(f"{path} is not a vesicle plan")
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise VesicleError(f"cannot read {path} as a plan: {error}") from error
        if any(a.dtype != np.int32 for a in arrays.values()):
            raise VesicleError(f"plan {path} must hold int32 arrays")
        missing = [name for name in BY_NAME if name not in arrays and name not in OF_HEAD]
        unknown = set(arrays) - {*BY_NAME, _EVENTS, "retained", "turns"}
        if missing or unknown:
            what = f"no {missing[0]!r}" if missing else f"an unknown field {min(unknown)!r}"
            raise VesicleError(f"plan {path} has {what}")
        # Where passes had to end was once of consequence.
        arrays.pop("turns", None)
        if written == _OLD_FORMAT:  # an array for when entries end; the whole head by default
            return Plan.of(evict_after=arrays.pop("retained", None), **arrays)
        events = arrays.pop(_EVENTS, np.zeros((0, N_EVENT), np.int32))
        if events.ndim != 2 or events.shape[1] != N_EVENT:
            raise VesicleError(f"plan field {_EVENTS!r} has shape {events.shape}")
        for name in OF_HEAD:
            if name in arrays and arrays[name].ndim == 2:
                arrays[name] = arrays[name][:, -1]
        found = np.ascontiguousarray(events).view(EVENT)[:, 0]
        found = found[found["kind"] != _TURN]
        return Plan(rows=Plan.of(**arrays).rows, events=np.sort(found, order=EVENT.names))


def _fill(rows: Rows, name: str, values: NDArray[Any]) -> None:
    """Set a field of rows (T, L) to what the attribute of that name is to be."""
    field = BY_NAME.get(name)
    if field is None:
        raise VesicleError(f"a Plan has no field {name!r}; its fields: {', '.join(BY_NAME)}")
    target = rows[name][:, -1] if field.last_layer else rows[name]
    if values.shape != target.shape:
        raise VesicleError(f"plan field {name!r} has shape {values.shape}")
    target[...] = values


def _whole(values: IntArray, name: str, shape: tuple[int, ...]) -> IntArray:
    """(T, L, G), where it is that long."""
    if values.ndim != 3 or values.shape[:2] != shape:
        raise VesicleError(f"plan field {name!r} has shape {values.shape}")
    return values
