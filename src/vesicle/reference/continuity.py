"""Whether a pass is one that the reference can follow: padded on the left, its cache as it was.

Authors write a Plan row by row and forwards only. So three things would give wrong results, and are
refused: masks that hide anything but padding on the left, caches that were cut back (assisted
decoding), and caches whose rows were reordered (beam search). Nothing is patched to notice the last
two: keys of the first layer depend on a token and its slot alone, so what they hold says which
sequence a row is. Caches that do not show their keys (quantised ones) are checked by length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vesicle.errors import VesicleError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Entries:
    """What a cache held at the end of a pass."""

    def __init__(self, cache: Any) -> None:
        """Look at a Hugging Face cache; None holds nothing."""
        self._length = 0 if cache is None else int(cache.get_seq_length(0))
        self._marks = _marks(cache, self._length)

    def check(self, cache: Any, past: int) -> None:
        """See whether a cache of `past` entries is still what it was.

        Raises:
            VesicleError: If it was cut back, filled meanwhile, or its rows changed places.
        """
        if past != self._length:
            raise VesicleError(
                f"the cache holds {past} entries a row, after {self._length} of which the method "
                "knows; a cache cut back (assisted decoding) or filled elsewhere cannot be "
                "continued while attached"
            )
        marks = _marks(cache, past)
        if marks is None or self._marks is None:
            return
        moved = (marks != self._marks).any(dim=1).nonzero().flatten().tolist()
        if moved:
            raise VesicleError(
                f"row {moved[0]} of the cache now holds another sequence; beam search, and other "
                "decoding that reorders or swaps caches, is not supported while attached"
            )


def _marks(cache: Any, length: int) -> Tensor | None:
    """A number (B, S) for each entry of the first layer, equal only for equal keys.

    None if the cache does not show its keys. Bits are summed as integers, so that the order in
    which they are summed changes nothing.
    """
    if not length:
        return None
    if cache.offloading:
        torch.accelerator.synchronize()  # the first layer may be on its way back
    layer = cache.layers[0]
    keys = layer.keys
    if keys is None or keys.ndim != 4:
        return None
    if keys.shape[2] < length and not getattr(layer, "is_sliding", False):
        return None
    keys = keys.detach()[:, :, :length]
    return keys.view(_INTEGERS[keys.element_size()]).sum((1, 3), dtype=torch.int64).cpu()


def check_mask(mask: Any, offsets: Sequence[int], past: int, t: int) -> None:
    """See whether a model's attention mask hides padding on the left, and nothing else.

    Args:
        mask: As the model was given it: None, (B, S) of 1 and 0, (B, 1, T, S) of booleans or of
            0 and large negative numbers, or these by kind of layer.
        offsets: Slots of padding before each row's first token, by its positions.
        past: Entries in the cache before this pass.
        t: Slots in this pass.

    Raises:
        VesicleError: If it hides anything else, or disagrees with the positions.
    """
    if isinstance(mask, Mapping):
        for kind, part in mask.items():
            if kind != "sliding_attention":  # made from the same padding, with the window added
                check_mask(part, offsets, past, t)
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        rows = mask.bool().expand(len(offsets), -1).tolist()
        for row, (seen, offset) in enumerate(zip(rows, offsets, strict=True)):
            _check_row(row, seen, offset, past + t)
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask == 0
        slots = torch.arange(seen.shape[-1], device=seen.device)
        queries = torch.arange(past, past + t, device=seen.device)[:, None]
        first = torch.tensor(offsets, device=seen.device)[:, None, None, None]
        expected = (first <= slots) & (slots <= queries)  # (B, 1, T, S)
        if bool(((seen != expected) & (queries >= first)).any()):
            raise VesicleError(
                "the attention mask of four dimensions is not causal with padding on the left, "
                "which is all that can be followed while attached"
            )


def _check_row(row: int, seen: list[bool], offset: int, length: int) -> None:
    """See whether one row (S,) of a mask shows its slots from `offset` on, and no others."""
    if len(seen) < length:
        raise VesicleError(
            f"row {row} of the attention mask has {len(seen)} slots; cache and tokens have {length}"
        )
    seen = seen[:length]  # a static cache may have a mask for slots to come
    padding = seen.index(True) if True in seen else length
    if not all(seen[padding:]):
        hidden = seen.index(False, padding)
        raise VesicleError(
            f"row {row} of the attention mask hides slot {hidden} after showing slot {padding}; "
            "pad batches on the left, or not at all"
        )
    if padding == length:
        raise VesicleError(
            f"row {row} of the attention mask hides all {length} slots; each row needs a token"
        )
    if padding != offset:
        raise VesicleError(
            f"row {row} of the attention mask hides {padding} slots on the left, but its positions "
            f"begin after {offset}; pass position_ids that begin at 0 after the padding"
        )
