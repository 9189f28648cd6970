"""Rows of a Plan: what is decided for each token in each layer.

`ROW` is a structured type made from `layout.FIELDS`; a table of T tokens by L layers has one row
for each. `resting_rows` gives the table that changes nothing, and `check_rows` is the one place
that refuses what an executor must not see.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.plan.layout import FIELDS, FULL, N_NUMBERS, SMALLEST, VISIBLE, places
from vesicle.plan.windows import visible_blocks
from vesicle.shapes import ModelShape

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]
Rows = NDArray[np.void]
"""A structured array of `ROW`."""

SITES = ("attention_in", "attention_out", "ffn_in", "ffn_out")
FFN_SKIP, FFN_SMALL, FFN_BIG = 0, 1, 2

ROW = np.dtype([(f.name, np.int32, (f.width,) if f.width > 1 else ()) for f in FIELDS])
PLACES = places()
BY_NAME = {field.name: field for field in FIELDS}
OF_HEAD = tuple(field.name for field in FIELDS if field.last_layer)
"""What is decided about the LM head; 0 is rest."""
_WITH_ATTENTION = [
    *(PLACES[name] + site for name in ("channels", "bits") for site in (0, 1)),
    PLACES["attention"],
    PLACES["kv_blocks"],
]


def of_attention(rows: Rows) -> IntArray:
    """(T, n) a copy of the numbers in rows (T,) that are due before attention runs."""
    found: IntArray = numbers(rows)[:, _WITH_ATTENTION]
    return found


def check_kept(rows: Rows, before: IntArray, layer: int) -> None:
    """Refuse rows (T,) whose attention is no longer what `of_attention` gave before it ran.

    Raises:
        VesicleError: Naming the layer.
    """
    if (of_attention(rows) != before).any():
        raise VesicleError(
            f"the attention of layer {layer} is changed after it has run; an author writes "
            "channels and bits of sites 0 and 1, attention and kv_blocks in `attention`"
        )


def numbers(rows: Rows) -> IntArray:
    """(T, L, N) the numbers of rows (T, L), which share memory with them."""
    return rows[..., None].view(np.int32)


def resting_rows(shape: ModelShape, positions: IntArray) -> Rows:
    """(T, L) rows that change nothing, for tokens at `positions` (T,)."""
    rows = np.empty((len(positions), shape.n_layers), ROW)
    numbers(rows)[:] = _values("rest", shape, positions, np.arange(shape.n_layers))
    return rows


def rest_head(rows: Rows, but: str = "") -> None:
    """Have rows run the whole LM head, as far as all fields but one say."""
    for name in OF_HEAD:
        if name != but:
            rows[name] = 0


def bounds(
    shape: ModelShape, positions: IntArray, layers: Iterable[int] | None = None
) -> tuple[IntArray, IntArray]:
    """The least and the most that every number of a row may be, (T, L, N) each.

    Args:
        shape: Of the model.
        positions: (T,) of the tokens.
        layers: Of which; all by default.
    """
    chosen = np.arange(shape.n_layers) if layers is None else np.array(list(layers))
    low, high = (_values(which, shape, positions, chosen) for which in ("lowest", "highest"))
    return low, high


def check_rows(
    rows: Rows,
    shape: ModelShape,
    positions: IntArray,
    layers: Iterable[int] | None = None,
    limits: tuple[IntArray, IntArray] | None = None,
) -> None:
    """Refuse rows that no executor may see, whoever wrote them.

    Args:
        rows: (T, L) of tokens at `positions` in `layers`.
        shape: Of the model.
        positions: (T,), rising.
        layers: Of the columns; all by default.
        limits: What `bounds` gives for them, where it is known.

    Raises:
        VesicleError: With the field, the value, where it is, and what is allowed.
    """
    found = numbers(rows)
    chosen = list(range(shape.n_layers) if layers is None else layers)
    low, high = limits or bounds(shape, positions, chosen)
    bad = (found < low) | (found > high)
    for field in FIELDS:
        if field.values:
            part = slice(PLACES[field.name], PLACES[field.name] + field.width)
            bad[..., part] |= ~_ALLOWED[field.name][np.clip(found[..., part], 0, field.values[-1])]
    if bad.any():
        token, column, at = (int(i) for i in np.argwhere(bad)[0])
        field = next(f for f in reversed(FIELDS) if PLACES[f.name] <= at)
        where: tuple[int, ...] = (int(positions[token]), int(chosen[column]))
        where += (at - PLACES[field.name],) if field.width > 1 else ()
        allowed = f"{low[token, column, at]} to {high[token, column, at]}"
        if field.values:
            allowed = ", ".join(map(str, field.values))
        raise VesicleError(
            f"plan field {field.name!r} is {found[token, column, at]} at {where}; "
            f"allowed: {allowed}"
        )


def _values(
    which: str, shape: ModelShape, positions: IntArray, layers: NDArray[np.int_]
) -> IntArray:
    """(T, len(layers), N) an attribute of every field, as numbers."""
    table = np.zeros((len(positions), len(layers), N_NUMBERS), np.int32)
    windows = shape.layer_windows[layers]
    visible = visible_blocks(positions[:, None], windows)[..., None]
    for field in FIELDS:
        part = table[..., PLACES[field.name] :][..., : field.width]
        number = _number(getattr(field, which), shape, visible)
        of_layer = (layers == shape.n_layers - 1)[:, None]
        part[:] = np.where(of_layer, number, 0) if field.last_layer else number
    return table


def _number(bound: int | str, shape: ModelShape, visible: IntArray) -> int | IntArray:
    if not isinstance(bound, str):
        return bound
    if bound == FULL:
        return np.array(shape.site_widths, np.int32)
    if bound == VISIBLE:
        return visible
    return np.minimum(visible, 2) if bound == SMALLEST else shape.vocabulary


_ALLOWED = {
    field.name: np.isin(np.arange(field.values[-1] + 1), field.values)
    for field in FIELDS
    if field.values
}
