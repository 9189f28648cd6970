"""Damaged files: whatever a byte turns into, the outcome is one clear line, or a correct load.

Damage is drawn from fixed seeds. "Correct" is what another reader of the same bytes finds: the
gguf package, the safetensors library, transformers. Damage that leaves a file whole and sane (a bit
of a weight, a letter of a token) cannot be told, and is not asked to be.
"""

import copy
import json
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.numpy import load_file

from tests.models.tiny_folder import CONFIG, SHARDS, write_folder
from tests.models.tiny_gguf import write_gguf
from vesicle.errors import ModelError
from vesicle.models.checks import check_weights, read_config, read_tensors
from vesicle.models.gguf import convert_gguf
from vesicle.models.gguf_checks import check_gguf_model
from vesicle.models.gguf_header import GgufHeader, read_gguf_header
from vesicle.models.resolve import check_folder

LENGTHS = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
MOST_S = 1.0
"""For one check of a tiny file; it takes a few milliseconds."""
MOST_BYTES = 8 << 20
"""Of memory that one check may hold: the file has 50 KB, a corrupt length says gigabytes."""
NONSENSE = (
    None,
    True,
    -1,
    0,
    1,
    3,
    7,
    2**31,
    10**30,
    0.5,
    1e300,
    "",
    "x",
    [],
    [1, 2],
    {},
    {"a": 1},
)


@contextmanager
def bounded(number: int = 0) -> Iterator[None]:
    """Fail when the body takes long or, for every eighth one (tracing is slow), much memory."""
    traced = number % 8 == 0
    if traced:
        tracemalloc.start()
    held_bytes, start = 0, time.perf_counter()
    try:
        yield
    finally:
        took_s = time.perf_counter() - start
        if traced:
            held_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert took_s < MOST_S
    assert held_bytes < MOST_BYTES


def one_line(error: ModelError, *names: Path) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 700
    assert any(str(name) in text for name in names)


def tiny_gguf(folder: Path) -> Path:
    kinds = {"ffn_up": gguf.GGMLQuantizationType.Q4_1, "attn_q": gguf.GGMLQuantizationType.Q8_0}
    return write_gguf(folder / "tiny.gguf", kinds)


def damage(content: bytes, header_end: int, rng: random.Random) -> bytes:
    """A copy with one to three things wrong in the header, or at its end."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(header_end)
        match rng.randrange(6):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at] = rng.randrange(256)
            case 3:
                struct.pack_into("<Q", data, min(at, len(data) - 8), rng.choice(LENGTHS))
            case 4:
                del data[at : at + rng.choice((1, 4, 8, 100))]
            case _:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
    return bytes(data)


def checked(path: Path, number: int) -> GgufHeader | None:
    """The header, or None where it was refused in the right way."""
    try:
        with bounded(number):
            header = read_gguf_header(path)
            check_gguf_model(path, header)
            return header
    except ModelError as error:
        one_line(error, path)
        return None


def agrees(path: Path, header: GgufHeader) -> bool:
    """Whether the gguf package finds the same tensors in the same places."""
    reader = gguf.GGUFReader(path)
    theirs = {
        t.name: (tuple(t.shape.tolist()[::-1]), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    ours = {n: (t.shape, t.kind, t.start, t.n_bytes) for n, t in header.tensors.items()}
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    return ours == theirs and header.metadata.keys() == keys


def damaged_ggufs(folder: Path, n: int, seed: int) -> Iterator[tuple[Path, GgufHeader]]:
    """Damage a file in `n` ways; yields what passes the checks."""
    source = tiny_gguf(folder)
    content, whole = source.read_bytes(), read_gguf_header(source)
    header_end = min(tensor.start for tensor in whole.tensors.values())
    path = folder / "damaged.gguf"
    rng = random.Random(seed)
    for number in range(n):
        path.write_bytes(damage(content, header_end, rng))
        header = checked(path, number)
        if header is not None:
            assert agrees(path, header)
            yield path, header


def test_damaged_gguf_headers(tmp_path: Path):
    passed = sum(1 for _ in damaged_ggufs(tmp_path, 400, seed=1))
    # Letters of tokens may change; most of the header's bytes are those.
    assert 0 < passed < 250


def test_truncated_ggufs(tmp_path: Path):
    path = tiny_gguf(tmp_path)
    tensors = read_gguf_header(path).tensors.values()
    edges = {edge for t in tensors for edge in (t.start, t.start + t.n_bytes)}
    end = max(edges)
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    lengths = near | set(range(400)) | set(range(400, end, 97))
    size = path.stat().st_size
    for length in sorted(lengths, reverse=True):
        if length > size:
            continue
        with path.open("r+b") as file:
            file.truncate(length)
        header = checked(path, length)
        # Only the padding after the last tensor may be missing.
        assert (header is not None) == (length >= end), length


def converts(path: Path, header: GgufHeader, out: Path) -> bool:
    """Convert a damaged file that passed the checks: all of it is right, or nothing is left."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert_gguf(path, out, "tiny", "0")
    except ModelError as error:
        one_line(error, path)
        assert not out.exists()
        return False
    assert check_folder(out) == out
    weights, raw = load_file(out / "model.safetensors"), path.read_bytes()
    for theirs, ours in (
        ("output_norm.weight", "model.norm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ):
        tensor = header.tensors[theirs]
        if tensor.kind == "F32":
            part = raw[tensor.start : tensor.start + tensor.n_bytes]
            assert weights[ours].tobytes() == part
    return True


def test_some_damaged_ggufs_are_converted(tmp_path: Path):
    tried = 0
    for path, header in damaged_ggufs(tmp_path, 100, seed=2):
        converts(path, header, tmp_path / "out")
        if (tried := tried + 1) == 4:
            break
    assert tried


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_ggufs_are_converted(tmp_path: Path):
    outcomes = [
        converts(path, header, tmp_path / "out")
        for path, header in damaged_ggufs(tmp_path, 3000, seed=3)
    ]
    assert any(outcomes)


def accepted(folder: Path, number: int = 1) -> bool:
    """Check a damaged folder; where it passes, the safetensors library must read the same."""
    try:
        with bounded(number):
            found = check_weights(folder, read_config(folder))
    except ModelError as error:
        one_line(error, folder)
        return False
    for file in {stored.file for stored in found.values()}:
        raw = file.read_bytes()
        for name, value in load_file(file).items():
            stored = found[name]
            assert stored.shape == value.shape
            assert raw[stored.start : stored.start + stored.n_bytes] == value.tobytes()
    return True


@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_safetensors(tmp_path: Path, sharded: bool):
    folder = write_folder(tmp_path / "model", sharded=sharded)
    assert accepted(folder)  # imports what the clock must not count
    path = folder / (SHARDS[1] if sharded else "model.safetensors")
    content = path.read_bytes()
    header_end = 8 + struct.unpack_from("<Q", content)[0]
    rng = random.Random(4)
    for number in range(200):
        path.write_bytes(damage(content, header_end, rng))
        accepted(folder, number)
    for length in (*range(0, 64), *range(64, len(content), 331), len(content) - 1):
        path.write_bytes(content[:length])
        assert not accepted(folder)


def test_damaged_indices(tmp_path: Path):
    folder = write_folder(tmp_path / "model", sharded=True)
    assert accepted(folder)
    path = folder / "model.safetensors.index.json"
    content = path.read_bytes()
    rng = random.Random(5)
    for number in range(100):
        path.write_bytes(damage(content, len(content) - 8, rng))
        accepted(folder, number)


def damaged_config(rng: random.Random) -> dict[str, Any]:
    """The config with nonsense in one or two places, or without them."""
    config = copy.deepcopy(CONFIG)
    for _ in range(rng.choice((1, 1, 2))):
        part = config
        key = rng.choice(sorted(config))
        if isinstance(config.get(key), dict) and config[key] and rng.random() < 0.8:
            part, key = config[key], rng.choice(sorted(config[key]))
        if rng.random() < 0.15:
            part.pop(key, None)
        else:
            part[key] = copy.deepcopy(rng.choice(NONSENSE))
    return config


def loads(folder: Path) -> None:
    """Transformers must be able to run what passed, and give numbers."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except StrictDataclassError:  # it wants 0.0 where 0 is meant as well
        return
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape[1:] == (3, model.config.vocab_size)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("n", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_configs(tmp_path: Path, n: int):
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_parameters": None}))
    assert read_config(folder)  # imports transformers, which the clock must not count
    rng = random.Random(6)
    for number in range(n):
        (folder / "config.json").write_text(json.dumps(damaged_config(rng)))
        if accepted(folder, number):
            loads(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_safetensors(tmp_path: Path):
    folder = write_folder(tmp_path / "model")
    assert accepted(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    rng = random.Random(7)
    header_end = 8 + struct.unpack_from("<Q", content)[0]
    for number in range(5000):
        path.write_bytes(damage(content, header_end if number % 2 else 16, rng))
        accepted(folder, number)


def test_a_claim_of_gigabytes_costs_nothing(tmp_path: Path):
    """A sparse file as large as its header says: refused from the header alone."""
    shape = [1 << 20, 1 << 16]
    n_bytes = 4 * shape[0] * shape[1]
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": shape}}
    header["model.embed_tokens.weight"]["data_offsets"] = [0, n_bytes]
    text = json.dumps(header).encode()
    folder = write_folder(tmp_path / "model")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + n_bytes)
        except OSError:
            pytest.skip("this file system has no sparse files of this size")
    with bounded():
        assert read_tensors(folder)["model.embed_tokens.weight"].n_bytes == n_bytes
    with pytest.raises(ModelError, match="lack"):
        check_folder(folder)
