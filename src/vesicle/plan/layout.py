"""The fields of a Plan's rows: the one list that everything about them is made from.

This file imports nothing of the package, nor NumPy: `setup.py` runs it alone to write the same
layout for the C++ side (`engine/core/plan_row.h`). Whoever adds a decision adds a line to `FIELDS`;
saving, checking, replay, rest, the native core's buffers and the tests' random Plans follow.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

FULL, SMALLEST, VISIBLE, WORDS = "full", "smallest", "visible", "words"
"""Bounds that depend on the model or on the token: the channels of the field's site, two blocks or
all that are visible, the blocks visible to the token, the words of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One kind of decision, in each token's row of each layer.

    Attributes:
        name: Of the field.
        width: How many numbers it has: 1, or 4 where each site has one.
        lowest: Least value allowed: a number, or one of the names above.
        highest: Most, likewise.
        rest: The value that changes nothing, likewise.
        axis: The transmitter that decides it.
        values: All that are allowed, where not all between the two are.
        last_layer: Whether it is of the last layer alone, and 0 in the others.
    """

    name: str
    lowest: int | str
    highest: int | str
    rest: int | str
    axis: str
    width: int = 1
    values: tuple[int, ...] = ()
    last_layer: bool = False


FIELDS = (
    Field(name="channels", width=4, lowest=1, highest=FULL, rest=FULL, axis="dopamine"),
    Field(
        name="bits",
        width=4,
        lowest=2,
        highest=16,
        rest=16,
        axis="dopamine",
        values=(2, 3, 4, 8, 16),
    ),
    Field(name="ffn", lowest=0, highest=2, rest=2, axis="serotonin"),
    Field(name="attention", lowest=0, highest=1, rest=1, axis="serotonin"),
    Field(name="kv_blocks", lowest=SMALLEST, highest=VISIBLE, rest=VISIBLE, axis="gaba"),
    Field(name="head", lowest=0, highest=WORDS, rest=0, axis="dopamine", last_layer=True),
    Field(name="likeliest", lowest=0, highest=WORDS, rest=0, axis="gaba", last_layer=True),
    Field(name="logits", lowest=0, highest=WORDS, rest=0, axis="gaba", last_layer=True),
)
N_NUMBERS = sum(field.width for field in FIELDS)
"""32-bit numbers of a row."""


def places() -> dict[str, int]:
    """Where each field begins in a row, in numbers."""
    found, at = {}, 0
    for field in FIELDS:
        found[field.name] = at
        at += field.width
    return found


def digest() -> int:
    """64 bits that tell this layout from another, by names, places and widths."""
    text = ",".join(f"{field.name}@{places()[field.name]}x{field.width}" for field in FIELDS)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def header() -> str:
    """The same layout in C++."""
    members = "".join(
        f"  int32_t {field.name}{f'[{field.width}]' if field.width > 1 else ''};\n"
        for field in FIELDS
    )
    return (
        "// Written by setup.py from vesicle/plan/layout.py, which says what the fields are.\n"
        "#pragma once\n\n#include <cstdint>\n\n"
        f"struct VesiclePlanRow {{\n{members}}};\n\n"
        f"constexpr uint64_t kPlanLayout = {digest():#x}u;\n"
    )
