"""What is wrong with a GGUF file is told in one line, before anything trusts the file."""

import struct
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.models.tiny_gguf import FFN, WIDTH, write_gguf
from vesicle.errors import ModelError
from vesicle.models import memory
from vesicle.models.gguf import convert_gguf
from vesicle.models.gguf_checks import check_gguf_model
from vesicle.models.gguf_header import GgufArray, read_gguf_header

Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
N_TENSORS_AT, N_ENTRIES_AT = 8, 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", {"ffn_up": Q4_1, "token_embd": Q8_0})


def after(content: bytes, name: str) -> int:
    """Where the file goes on after a key or a tensor's name."""
    text = struct.pack("<Q", len(name)) + name.encode()
    assert content.count(text) == 1
    return content.index(text) + len(text)


def overwrite(path: Path, at: int, form: str, *values: Any) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(f"<{form}", content, at, *values)
    path.write_bytes(content)


def check(path: Path) -> None:
    check_gguf_model(path, read_gguf_header(path))


def test_a_good_file_is_described(path: Path):
    check(path)
    header = read_gguf_header(path)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.block_count"] == 1
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray(8, 260)
    reader = gguf.GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert found.kind == tensor.tensor_type.name
        assert found.shape == tuple(tensor.shape.tolist()[::-1])
        assert (found.start, found.n_bytes) == (tensor.data_offset, tensor.n_bytes)
    assert header.n_weights == sum(tensor.n_elements for tensor in reader.tensors)


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (4, "I", 1, "is GGUF version 1; supported: 2, 3$"),
        (4, "I", 3 << 24, r"version 50331648 \(it is big-endian\)"),
        (
            N_TENSORS_AT,
            "Q",
            2**64 - 1,
            "number of tensors is 18,446,744,073,709,551,615, which can",
        ),
        (N_TENSORS_AT, "Q", 13, "is damaged|is truncated"),
        (N_ENTRIES_AT, "Q", 2**63, "number of metadata entries is .* which cannot fit in"),
        (N_ENTRIES_AT, "Q", 3, "is damaged|is truncated"),
        (24, "Q", 2**63, "metadata key 0 takes 9,223,372,036,854,775,808 bytes from byte 32 on"),
        (24, "Q", 0, "metadata key 0 has 0 bytes; allowed: 1 to 65,535"),
        (32, "B", 0xFF, "metadata key 0 is not UTF-8"),
    ],
)
def test_damaged_beginnings(path: Path, at: int, form: str, value: int, message: str):
    overwrite(path, at, form, value)
    with pytest.raises(ModelError, match=message):
        check(path)


# A key, then the offset of what is overwritten after its name: 0 is the value's type, 4 the value
# (of an array: 4 its items' type, 8 its length, 16 its first item).
METADATA = [
    ("llama.block_count", 0, "I", 99, "'llama.block_count' has the unknown type 99"),
    ("llama.block_count", 0, "I", 6, "block_count is 1.40.*; allowed"),
    ("llama.block_count", 0, "I", 10, "is truncated or damaged"),
    ("llama.block_count", 4, "I", 0, "llama.block_count is 0; allowed: whole numbers from 1 to 40"),
    ("llama.block_count", 4, "I", 4000, "block_count is 4,000, and the file's 11 tensors are too"),
    ("llama.block_count", 4, "I", 2**32 - 1, "block_count is 4294967295; allowed"),
    ("llama.embedding_length", 4, "I", 64, r"dimension_count is 8; allowed: 16 \(the head size"),
    ("llama.attention.head_count", 4, "I", 5, "head_count_kv is 4; allowed: divisors of 5"),
    ("llama.attention.head_count", 4, "I", 12, "head_count is 12; allowed: divisors of 32"),
    ("llama.attention.head_count_kv", 4, "I", 3, "head_count_kv is 3; allowed: divisors of 4"),
    ("llama.attention.head_count_kv", 4, "I", 8, "head_count_kv is 8; allowed: .* from 1 to 4"),
    ("llama.context_length", 4, "I", 0, "context_length is 0; allowed"),
    ("llama.rope.freq_base", 4, "f", nan, "freq_base is nan; allowed: numbers above 0"),
    ("llama.rope.freq_base", 4, "f", -1.0, "freq_base is -1.0; allowed: numbers above 0"),
    ("llama.rope.dimension_count", 4, "I", 4, r"dimension_count is 4; allowed: 8 \(the head size"),
    ("llama.vocab_size", 4, "I", 261, r"vocab_size is 261; allowed: 260 \(its tokens\)"),
    ("tokenizer.ggml.bos_token_id", 4, "I", 260, "bos_token_id is 260; allowed: .* 0 to 259"),
    ("tokenizer.ggml.tokens", 4, "I", 13, "items of the unknown type 13"),
    ("tokenizer.ggml.tokens", 8, "Q", 2**60, "number of items in .* cannot fit in the"),
    ("tokenizer.ggml.tokens", 16, "Q", 2**60, "string 0 takes 1,152,921,504,606,846,976 bytes"),
    ("general.architecture", 12, "5s", b"falco", "is 'falco'; allowed: llama, qwen2, qwen3, "),
]


@pytest.mark.parametrize(("key", "skip", "form", "value", "message"), METADATA)
def test_absurd_metadata(path: Path, key: str, skip: int, form: str, value: Any, message: str):
    overwrite(path, after(path.read_bytes(), key) + skip, form, value)
    with pytest.raises(ModelError, match=message):
        check(path)


@pytest.mark.parametrize(
    "key", ["llama.block_count", "general.architecture", "tokenizer.ggml.tokens"]
)
def test_missing_metadata(path: Path, key: str):
    overwrite(path, after(path.read_bytes(), key) - 1, "B", ord("x"))
    with pytest.raises(ModelError, match=f"it has no {key}; expected"):
        check(path)


# After a tensor's name: number of dimensions, dimensions (innermost first), type, offset.
MATRIX = {"dims": 0, "inner": 4, "outer": 12, "kind": 20, "offset": 24}
TENSORS = [
    ("dims", "I", 0, "has 0 dimensions; allowed: 1 to 4"),
    ("dims", "I", 2**31, "has 2147483648 dimensions"),
    ("inner", "Q", 0, r"has the dimensions \(0, 64\); allowed: 1 or more"),
    ("inner", "Q", 2**62, "is truncated or damaged: 'blk.0.ffn_gate.weight' ends at byte"),
    ("inner", "Q", 2**64 - 1, "ends at byte"),
    ("outer", "Q", FFN - 8, "starts at byte|asks for"),
    ("kind", "I", 77, "unknown storage type 77"),
    ("kind", "I", 4, "unknown storage type 4"),  # withdrawn from the format
    ("kind", "I", 12, "has rows of 32; allowed for Q4_K: multiples of 256"),
    ("kind", "I", 26, "stored as I32, which is no weight type"),
    ("offset", "Q", 8, "starts at byte"),
    ("offset", "Q", 0, "starts at byte"),
    ("offset", "Q", 2**64 - 32, "starts at byte"),
]


@pytest.mark.parametrize(("field", "form", "value", "message"), TENSORS)
def test_absurd_tensors(path: Path, field: str, form: str, value: int, message: str):
    at = after(path.read_bytes(), "blk.0.ffn_gate.weight")
    overwrite(path, at + MATRIX[field], form, value)
    with pytest.raises(ModelError, match=message):
        check(path)


def test_swapped_sizes_are_refused(path: Path):
    at = after(path.read_bytes(), "blk.0.ffn_down.weight")
    overwrite(path, at + MATRIX["inner"], "QQ", WIDTH, FFN)
    with pytest.raises(ModelError, match=r"ffn_down.weight is \(64, 32\); .* asks for \(32, 64\)"):
        check(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("blk.0.attn_k.weight", "blk.0.attn_q.weight", "'blk.0.attn_q.weight' is there twice"),
        ("blk.0.attn_k.weight", "blk.0.attn_z.weight", "lacks the tensor blk.0.attn_k.weight"),
        ("output_norm.weight", "output_norm.weighs", "lacks the tensor output_norm.weight"),
        ("llama.context_length", "llama.rope.freq_base", "'llama.rope.freq_base' is there twice"),
    ],
)
def test_wrong_names(path: Path, old: str, new: str, message: str):
    content = path.read_bytes()
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))
    with pytest.raises(ModelError, match=message):
        check(path)


def write_with(path: Path, change: Callable[[gguf.GGUFWriter], None]) -> Path:
    """The tiny file, with something more in it."""
    finish = gguf.GGUFWriter.write_header_to_file

    def patched(writer: gguf.GGUFWriter) -> None:
        change(writer)
        finish(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", patched)
        return write_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(WIDTH, np.float32)),
            "'blk.0.attn_q.bias', which has no place in its architecture",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
            "scales its rotary frequencies",
        ),
        (
            lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                       w.add_rope_scaling_factor(4.0)),
            "scales its rotary frequencies",
        ),
        (lambda w: w.add_expert_count(4), "is a mixture of experts"),
        (lambda w: w.add_uint32("general.alignment", 24), "general.alignment is 24; allowed: pow"),
        (lambda w: w.add_token_scores([0.0]), "scores is a list of 1 items; allowed: a list as lo"),
        (lambda w: w.add_key_length(7), "attention.value_length|dimension_count is 8; allowed: 7"),
    ],
)  # fmt: skip
def test_what_conversion_would_lose(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], message: str
):
    with pytest.raises(ModelError, match=message):
        check(write_with(tmp_path / "changed.gguf", change))


def test_another_alignment_is_read(tmp_path: Path):
    check(write_with(tmp_path / "wide.gguf", lambda writer: writer.add_custom_alignment(128)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_norms(path: Path, value: float):
    at = read_gguf_header(path).tensors["output_norm.weight"].start
    overwrite(path, at + 4, "f", value)
    with pytest.raises(ModelError, match=r"output_norm.weight holds NaN or infinity"):
        check(path)


def test_empty_and_missing_files(tmp_path: Path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="is not a GGUF file: it starts with b''"):
        read_gguf_header(tmp_path / "empty.gguf")
    with pytest.raises(ModelError, match=r"cannot read .*none.gguf"):
        read_gguf_header(tmp_path / "none.gguf")
    (tmp_path / "magic.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="the version takes 4 bytes from byte 4 on, and the file"):
        read_gguf_header(tmp_path / "magic.gguf")


def test_too_large_for_this_machine(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 50_000)
    with pytest.raises(ModelError, match=r"needs 0.0 GB of memory or more, and this machine has"):
        convert_gguf(path, tmp_path / "out", "tiny", "0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["MemoryError", "PanicException"])
def test_failing_libraries_leave_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    import transformers

    kind = {"MemoryError": MemoryError, "PanicException": type(name, (BaseException,), {})}[name]

    def fail(*arguments: object, **settings: object) -> None:
        raise kind("no\nluck")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"too little memory free|\(PanicException: no luck\)"):
        convert_gguf(path, tmp_path / "out", "tiny", "0")
    assert sorted(tmp_path.iterdir()) == [path]
