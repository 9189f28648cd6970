"""Sliding windows of a config: which layers have one, and how long it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vesicle.errors import ModelError
from vesicle.families.checks import whole
from vesicle.shapes import MOST_POSITIONS

SLIDING = "sliding_attention"


def windows_of(config: Any, kinds: Sequence[str], context: int) -> tuple[int, ...]:
    """As `ModelShape.windows` has it.

    A window that spans the whole context is none.

    Args:
        config: The Hugging Face config, of which `sliding_window` is read.
        kinds: The kind of attention of each layer.
        context: Positions that the model was made for.

    Raises:
        ModelError: If a layer slides and there is no window, or it is no whole number from 1.
    """
    if SLIDING not in kinds:
        return ()
    if getattr(config, "sliding_window", None) is None:
        raise ModelError(
            f"the model's config has {SLIDING!r} among its layer_types, and no sliding_window for "
            "it (or use_sliding_window false)"
        )
    window = whole(config, "sliding_window", MOST_POSITIONS)
    if window >= context:
        return ()
    return tuple(window if kind == SLIDING else 0 for kind in kinds)
