"""Reading a GGUF file's header without trusting it.

Every length and offset is checked against the file's size before it is used, so that a truncated
or corrupt file is one clear line, whatever its numbers say. Nothing here reads weights, and arrays
are measured, not built, until one is asked for (`read_array`): memory stays small however large a
length the file claims.

The format (version 3): magic, version, number of tensors, number of metadata entries; the entries
(key, type, value); the tensors' names, dimensions, types and offsets; padding; the tensors' data.
"""

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from vesicle.errors import ModelError
from vesicle.models.safetensors_header import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_KEY_BYTES = 65_535
_MAX_NAME_BYTES = 127
_MAX_ARRAY = 1 << 24
_MAX_DEPTH = 4
_MAX_DIMS = 4
_ALIGNMENTS = tuple(1 << power for power in range(3, 17))
# The shortest possible entry: a length, one character, a type, and what follows it.
_LEAST_ENTRY_BYTES = 8 + 1 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GgufArray:
    """An array among the metadata.

    Attributes:
        item_type: Its items' type number.
        length: How many there are.
        start: First byte of the first item, from the beginning of the file.
    """

    item_type: int
    length: int
    start: int = field(default=0, compare=False)

    @property
    def is_text(self) -> bool:
        """Whether the items are strings."""
        return self.item_type == _STRING


Value = int | float | bool | str | GgufArray


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies in the file.

    Attributes:
        shape: Outermost dimension first, as in PyTorch (the file has them the other way round).
        kind: Name of its storage type, such as "Q4_1".
        start: First byte, from the beginning of the file.
        n_bytes: Its size.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """All that a GGUF file says about itself.

    Attributes:
        metadata: By key, in the file's order.
        tensors: By name, in the file's order.
    """

    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    @property
    def n_weights(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def check_magic(path: Path) -> None:
    """Refuse a file that is no GGUF file at all, reading four bytes of it.

    Args:
        path: The file.

    Raises:
        ModelError: It cannot be read or does not start with the GGUF magic bytes.
    """
    head = _magic(path)
    if head != MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it starts with {head!r}, not with {MAGIC!r}")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever it is called.

    Raises:
        ModelError: It cannot be read.
    """
    return _magic(path) == MAGIC


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Args:
        path: The file.

    Returns:
        Its metadata and tensors, all of which lie inside the file and apart from each other.

    Raises:
        ModelError: It cannot be read, is no GGUF file, or is truncated or damaged.
    """
    check_magic(path)
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Parser(path, data).header()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def read_array(path: Path, array: GgufArray) -> list[str] | list[int | float]:
    """Read the items of an array among a file's metadata.

    Args:
        path: The file whose header has been read.
        array: What its header says about the array.

    Returns:
        The items in order.

    Raises:
        ModelError: The file cannot be read, a string is not UTF-8, or the items are arrays.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if code := _NUMBERS.get(array.item_type):
                return list(struct.unpack_from(f"<{array.length}{code}", data, array.start))
            if array.is_text:
                return _strings(data, array)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is damaged: a string of a list is not UTF-8 text") from error
    raise ModelError(f"{path} is damaged: a list of lists stands where one of items is expected")


def _strings(data: mmap.mmap, array: GgufArray) -> list[str]:
    items, at, unpack = list[str](), array.start, struct.Struct("<Q").unpack_from
    for _ in range(array.length):
        (length,) = unpack(data, at)
        items.append(data[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return items


class _Parser:
    """A cursor over the mapped file that never passes its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = len(MAGIC)

    def header(self) -> GgufHeader:
        version = self._number("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            big_endian = " (it is big-endian)" if swapped in VERSIONS else ""
            allowed = ", ".join(map(str, VERSIONS))
            raise ModelError(
                f"{self._path} is GGUF version {version}{big_endian}; supported: {allowed}"
            )
        n_tensors = self._count("the number of tensors", _LEAST_TENSOR_BYTES)
        n_entries = self._count("the number of metadata entries", _LEAST_ENTRY_BYTES)
        metadata: dict[str, Value] = {}
        for number in range(n_entries):
            key = self._text(f"metadata key {number}", _MAX_KEY_BYTES)
            if key in metadata:
                raise self._damaged(f"the metadata key {shown(key)} is there twice")
            metadata[key] = self._value(f"the value of {shown(key)}")
        infos = [self._tensor_info(number) for number in range(n_tensors)]
        return GgufHeader(metadata=metadata, tensors=self._place(infos, self._alignment(metadata)))

    def _value(self, what: str) -> Value:
        kind = int(self._number("I", f"the type of {what}"))
        if kind == _STRING:
            return self._text(what, self._size, least=0)
        if kind == _ARRAY:
            return self._array(what, 0)
        if kind not in _NUMBERS:
            raise self._damaged(f"{what} has the unknown type {kind}")
        number = self._number(_NUMBERS[kind], what)
        if kind == _BOOL:
            if number > 1:
                raise self._damaged(f"{what} is the truth value {number}; allowed: 0, 1")
            return bool(number)
        return number

    def _array(self, what: str, depth: int) -> GgufArray:
        """Step over an array: its items are checked to lie inside the file, and not kept."""
        kind = int(self._number("I", f"the item type of {what}"))
        code = _NUMBERS.get(kind)
        least = struct.calcsize(code) if code else 8 if kind == _STRING else 12
        length = self._count(f"the number of items in {what}", least)
        if length > _MAX_ARRAY:
            raise self._damaged(f"{what} has {length:,} items; allowed: up to {_MAX_ARRAY:,}")
        start = self._at
        if code:
            self._skip(length * least, what)
        elif kind == _STRING:
            self._skip_strings(length, what)
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            for _ in range(length):
                self._array(what, depth + 1)
        else:
            raise self._damaged(f"{what} has items of the unknown type {kind}")
        return GgufArray(kind, length, start)

    def _skip_strings(self, count: int, what: str) -> None:
        # Vocabularies have hundreds of thousands of them: this loop is kept short.
        data, at, size, unpack = self._data, self._at, self._size, struct.Struct("<Q").unpack_from
        for number in range(count):
            if at + 8 > size:
                self._at = at
                raise self._too_long(8, f"{what}, string {number}")
            (length,) = unpack(data, at)
            at += 8 + length
            if at > size:
                self._at = at - length
                raise self._too_long(length, f"{what}, string {number}")
        self._at = at

    def _tensor_info(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, dimensions (innermost first), type number and offset in the data."""
        name = self._text(f"the name of tensor {number}", _MAX_NAME_BYTES)
        n_dims = int(self._number("I", f"the number of dimensions of {name!r}"))
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._damaged(f"{name!r} has {n_dims} dimensions; allowed: 1 to {_MAX_DIMS}")
        dims = tuple(int(self._number("Q", f"a dimension of {name!r}")) for _ in range(n_dims))
        if min(dims) < 1:
            raise self._damaged(f"{name!r} has the dimensions {dims}; allowed: 1 or more each")
        kind = int(self._number("I", f"the type of {name!r}"))
        return name, dims, kind, int(self._number("Q", f"the offset of {name!r}"))

    def _alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment", 32)
        if isinstance(value, bool) or value not in _ALIGNMENTS:
            raise self._damaged(
                f"general.alignment is {value}; allowed: powers of two from {_ALIGNMENTS[0]} to "
                f"{_ALIGNMENTS[-1]}"
            )
        assert isinstance(value, int)
        return value

    def _place(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """Check that the tensors follow each other without overlap or gap, up to the file's end."""
        from gguf.constants import GGML_QUANT_SIZES

        kinds = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
        data_start = _aligned(self._at, alignment)
        tensors: dict[str, GgufTensor] = {}
        for name, dims, number, offset in infos:
            if name in tensors:
                raise self._damaged(f"the tensor {name!r} is there twice")
            if number not in kinds:
                raise self._damaged(f"{name!r} has the unknown storage type {number}")
            kind, block, block_bytes = kinds[number]
            if dims[0] % block:
                raise self._damaged(
                    f"{name!r} has rows of {dims[0]}; allowed for {kind}: multiples of {block}"
                )
            tensors[name] = GgufTensor(
                shape=dims[::-1],
                kind=kind,
                start=data_start + offset,
                n_bytes=prod(dims) // block * block_bytes,
            )
        expected = data_start
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start != expected:
                raise self._damaged(
                    f"{name!r} starts at byte {tensor.start:,}, and {expected:,} is expected"
                )
            end = tensor.start + tensor.n_bytes
            if end > self._size:
                raise ModelError(
                    f"{self._path} is truncated or damaged: {name!r} ends at byte {end:,}, and "
                    f"the file has {self._size:,}; download or copy it again"
                )
            expected = _aligned(end, alignment)
        return tensors

    def _number(self, code: str, what: str) -> int | float:
        size = struct.calcsize(code)
        self._need(size, what)
        (number,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += size
        return number

    def _count(self, what: str, least_bytes: int) -> int:
        """A number of things of which each takes at least so many bytes."""
        count = int(self._number("Q", what))
        if count * least_bytes > self._size - self._at:
            raise self._damaged(
                f"{what} is {count:,}, which cannot fit in the {self._size - self._at:,} bytes left"
            )
        return count

    def _text(self, what: str, most: int, least: int = 1) -> str:
        length = int(self._number("Q", f"the length of {what}"))
        self._need(length, what)
        if not least <= length <= most:
            raise self._damaged(f"{what} has {length:,} bytes; allowed: {least} to {most:,}")
        raw = self._data[self._at : self._at + length]
        self._at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 text") from error

    def _skip(self, size: int, what: str) -> None:
        self._need(size, what)
        self._at += size

    def _need(self, size: int, what: str) -> None:
        if size > self._size - self._at:
            raise self._too_long(size, what)

    def _too_long(self, size: int, what: str) -> ModelError:
        return ModelError(
            f"{self._path} is truncated or damaged: {what} takes {size:,} bytes from byte "
            f"{self._at:,} on, and the file has {self._size:,}; download or copy it again"
        )

    def _damaged(self, problem: str) -> ModelError:
        return ModelError(f"{self._path} is damaged: {problem}")


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
