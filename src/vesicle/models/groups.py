"""The groups in which a model's weights were stored before they were unpacked.

In most storage types of GGUF files 32 input channels have a scale and a low (an offset) in common:
w[o, i] = scale[o, i // 32] code[o, i] + low[o, i // 32], with whole codes from 0 to 2^bits - 1.
From the unpacked weights alone the two can only be guessed: a group need not reach its extremes.
So a conversion keeps them in `groups.safetensors`, as `NAME.scale` and `NAME.low` of (out, in / 32)
for the tensor NAME of the folder, in fp16 where that holds the numbers and in fp32 elsewhere. A
scale may be negative. The file's metadata names the storage type of every matrix, also of those
that have no scales here (`Q6_K`, whose groups hold 16 channels; `F16`; `F32`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.errors import ModelError
from vesicle.models.checks import read_tensors
from vesicle.models.finite import check_finite
from vesicle.models.safetensors_header import StoredTensor, read_safetensors_header, shown

if TYPE_CHECKING:
    from torch import Tensor

GROUPS_FILE = "groups.safetensors"
GROUP = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}
"""Bits of a code in each storage type that has such groups."""
PARTS = ("scale", "low")


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Scales and lows of one matrix.

    Attributes:
        kind: How it was stored, a key of `BITS`.
        scale: (out, in / 32) fp32; may be negative or 0.
        low: (out, in / 32) fp32: the weight of code 0.
    """

    kind: str
    scale: Tensor
    low: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.kind]


@dataclass(frozen=True, kw_only=True)
class StoredGroups:
    """What a folder knows of the groups of its weights.

    Attributes:
        file: Where they are.
        kinds: How each matrix was stored, by its name in the folder.
    """

    file: Path
    kinds: dict[str, str]

    @property
    def quantised(self) -> bool:
        """Whether any matrix had fewer than 16 bits."""
        return any(kind not in ("F64", "F32", "F16", "BF16") for kind in self.kinds.values())

    def get(self, name: str) -> Groups | None:
        """Read the groups of one matrix.

        Args:
            name: Of the matrix in the folder, such as `model.layers.0.mlp.up_proj.weight`.

        Returns:
            None where there are none: it was stored in another way, or is not known.

        Raises:
            ModelError: The file cannot be read, or a number is not finite.
        """
        from safetensors import SafetensorError, safe_open

        kind = self.kinds.get(name)
        if kind not in BITS:
            return None
        numbers = []
        try:
            with safe_open(self.file, framework="pt") as opened:
                for part in PARTS:
                    tensor: Tensor = opened.get_tensor(f"{name}.{part}").float()
                    check_finite(f"{name}.{part}", tensor, self.file)
                    numbers.append(tensor)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {self.file}: {error}") from error
        return Groups(kind=str(kind), scale=numbers[0], low=numbers[1])


def read_groups(folder: Path) -> StoredGroups | None:
    """Find the groups that a folder's weights were stored in, and check names and shapes.

    Args:
        folder: The model's folder.

    Returns:
        None for a folder that was not converted from a GGUF file, or by an older version.

    Raises:
        ModelError: The file is damaged or is not of these weights.
    """
    file = folder / GROUPS_FILE
    if not file.is_file():
        return None
    found, weights = read_safetensors_header(file), read_tensors(folder)
    kinds = _read_kinds(file)
    expected = {f"{name}.{part}" for name, kind in kinds.items() if kind in BITS for part in PARTS}
    if found.keys() != expected:
        odd = min(found.keys() ^ expected)
        problem = "lacks" if odd in expected else "holds, without a kind,"
        raise ModelError(f"{file} {problem} {shown(odd)}")
    for name, kind in kinds.items():
        if name not in weights:
            raise ModelError(f"{file} speaks of {shown(name)}, which the folder does not hold")
        if kind in BITS:
            for part in PARTS:
                _check_shape(found[f"{name}.{part}"], weights[name].shape)
    return StoredGroups(file=file, kinds=kinds)


def describe_kinds(folder: Path) -> str | None:
    """How a folder's matrices were stored, the most frequent type first.

    Args:
        folder: The model's folder.

    Returns:
        Such as "Q5_0 81, Q4_K 27, Q8_0 10, Q6_K 9"; None where that is not known.

    Raises:
        ModelError: As `read_groups`.
    """
    groups = read_groups(folder)
    if groups is None:
        return None
    counts = Counter(groups.kinds.values())
    return ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items(), key=lambda c: (-c[1], c)))


def _read_kinds(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            kinds = json.loads((opened.metadata() or {})["kinds"])
    except (OSError, SafetensorError, LookupError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} does not tell its kinds: {error}") from error
    if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
        raise ModelError(f"{file} does not tell its kinds: they are not an object of strings")
    return kinds


def _check_shape(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.dtype not in ("F16", "F32"):
        raise ModelError(
            f"{stored.file}: {shown(stored.key)} is stored as {stored.dtype}; allowed: F16, F32"
        )
    if len(stored.shape) != 2 or shape != (stored.shape[0], GROUP * stored.shape[1]):
        raise ModelError(
            f"{stored.file}: {shown(stored.key)} is {stored.shape}, and its weight is {shape}; "
            f"expected: a number for each row and {GROUP} columns"
        )
