"""Refuses stored numbers that are none: one NaN or infinity spoils every answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vesicle.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 22
"""Numbers that are looked at one by one at a time, once something has been found."""


def check_finite(name: str, tensor: Tensor, source: object) -> None:
    """Refuse a tensor that holds NaN or infinity.

    A sum is finite only if all its terms are, and takes no longer than reading them once. Where it
    is not, every number is looked at: large ones may add up to infinity.

    Args:
        name: Of the tensor.
        tensor: Of any shape and floating-point type, on any device.
        source: The file that it is from, or what else to call it.

    Raises:
        ModelError: Naming source, tensor, how many numbers are bad, and the first of them.
    """
    import torch

    values = tensor.detach()
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    if total.isfinite():
        return
    flat, bad, first = values.reshape(-1), 0, -1
    for start in range(0, len(flat), _CHUNK):
        found = (~flat[start : start + _CHUNK].isfinite()).nonzero()
        if len(found) and first < 0:
            first = start + int(found[0])
        bad += len(found)
    if bad:
        raise ModelError(
            f"{source} is damaged: {name} holds NaN or infinity in {bad} of its {len(flat)} "
            f"numbers, first {float(flat[first])} as number {first}"
        )
