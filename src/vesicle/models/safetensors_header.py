"""Reading a safetensors file's header without trusting it.

The format: the header's length (8 bytes, little-endian), the header (JSON: for each tensor its
dtype, shape and first and last byte, counted from the header's end), and the tensors' data, which
leaves no gaps. Whatever the header says is checked against the file's size before it is believed.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vesicle.errors import ModelError

# The limit that the safetensors library itself sets.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 8
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "C64": 64,
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": 8,
}
"""Bits of one number of each storage type."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
        file: The file.
        key: Its name there.
        dtype: Key of `BITS`.
        shape: Its sizes.
        start: First byte, from the beginning of the file.
        n_bytes: Its size.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


def shown(value: object) -> str:
    """Quote a value from a file in a message, cut short: damage makes long names."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        Its tensors by name. Together they fill the file, without overlap or gap.

    Raises:
        ModelError: It cannot be read, is no safetensors file, or is truncated or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path} ({size:,} bytes) is not a safetensors file{_lfs_hint(prefix)}"
                )
            header = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if len(header) < length:
        raise _truncated(path, size, 8 + length)
    tensors = {
        name: _entry(path, name, value, 8 + length) for name, value in _parse(path, header).items()
    }
    expected = _contiguous_end(path, tensors, 8 + length)
    if size < expected:
        raise _truncated(path, size, expected)
    if size > expected:
        raise ModelError(f"{path} is damaged: it has {size:,} bytes instead of {expected:,}")
    return tensors


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    """The header's JSON object without its free-form part."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(entries, dict):
        raise _damaged(path, "it is not a JSON object")
    about = entries.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise _damaged(path, "its __metadata__ is not a JSON object of strings")
    return entries


def _entry(path: Path, name: str, value: Any, data_start: int) -> StoredTensor:
    """One tensor, whose bytes are as many as its shape and dtype ask for."""
    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{shown(name)} lacks a dtype, a shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"{shown(name)} has the unknown dtype {shown(dtype)}")
    if not _sizes(shape) or len(shape) > _MAX_DIMS:
        raise _damaged(path, f"{shown(name)} has the shape {shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{shown(name)} has the data_offsets {shown(offsets)}")
    bits = prod(shape) * BITS[dtype]
    n_bytes = offsets[1] - offsets[0]
    if bits != 8 * n_bytes:
        raise _damaged(
            path,
            f"{shown(name)} has {n_bytes:,} bytes; {dtype} of the shape {shown(shape)} takes "
            f"{bits / 8 if bits < 2**63 else float('inf'):,.0f}",
        )
    return StoredTensor(
        file=path,
        key=name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + offsets[0],
        n_bytes=n_bytes,
    )


def _contiguous_end(path: Path, tensors: dict[str, StoredTensor], start: int) -> int:
    """The byte where the last tensor ends, once each starts where the one before it ended."""
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].start, item[1].start + item[1].n_bytes)
    ):
        if tensor.start != start:
            raise _damaged(
                path, f"{shown(name)} starts at byte {tensor.start:,}, and {start:,} is expected"
            )
        start += tensor.n_bytes
    return start


def _sizes(value: Any) -> bool:
    """Whether a value is a list of whole numbers that a file's sizes can be."""
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _damaged(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} is not a usable safetensors file: its header is damaged: {problem}")


def _truncated(path: Path, size: int, expected: int) -> ModelError:
    return ModelError(
        f"{path} is truncated: it has {size:,} bytes of {expected:,}; download or copy it again"
    )


def _lfs_hint(prefix: bytes) -> str:
    return ", but a Git LFS pointer: run git lfs pull" if prefix == b"version " else ""
