"""Scales and lows of the groups that weights were stored in are kept beside what they unpack to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.tiny_gguf import HEADS, packed, write_gguf
from vesicle.errors import ModelError
from vesicle.models import gguf_groups
from vesicle.models.gguf import MANIFEST, convert_once
from vesicle.models.gguf_groups import read_blocks
from vesicle.models.gguf_header import GgufTensor, read_gguf_header
from vesicle.models.groups import BITS, GROUPS_FILE, describe_kinds, read_groups

EVERY_KIND = {
    "token_embd": Kind.Q6_K,
    "attn_q": Kind.Q4_K,
    "attn_k": Kind.Q5_K,
    "attn_v": Kind.Q8_0,
    "attn_output": Kind.Q4_0,
    "ffn_gate": Kind.Q4_1,
    "ffn_up": Kind.Q5_0,
    "ffn_down": Kind.Q5_1,
}
NAMES = {
    "token_embd": "model.embed_tokens.weight",
    "attn_q": "model.layers.0.self_attn.q_proj.weight",
    "attn_k": "model.layers.0.self_attn.k_proj.weight",
    "attn_v": "model.layers.0.self_attn.v_proj.weight",
    "attn_output": "model.layers.0.self_attn.o_proj.weight",
    "ffn_gate": "model.layers.0.mlp.gate_proj.weight",
    "ffn_up": "model.layers.0.mlp.up_proj.weight",
    "ffn_down": "model.layers.0.mlp.down_proj.weight",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_every_kind(path: Path, settings: Mapping[str, Any] | None = None) -> Path:
    return write_gguf(path, EVERY_KIND, settings, width=256, ffn=256, kv_heads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama with grouped heads, converted; each of its matrices is of another kind."""
    return convert_once(write_every_kind(tmp_path / "tiny.gguf"))


def assert_given_back(weight: Tensor, scale: Tensor, low: Tensor, bits: int) -> None:
    """Codes are whole, within their range, and give every weight back."""
    assert scale.shape == low.shape == (weight.shape[0], weight.shape[1] // 32)
    assert scale.dtype == low.dtype == torch.float32
    grouped, step, start = weight.unflatten(1, (-1, 32)), scale[..., None], low[..., None]
    codes = torch.where(step == 0, 0.0, (grouped - start) / step)
    whole = codes.round()
    assert float((codes - whole).abs().max()) < 1e-3
    assert 0 <= float(whole.min())
    assert float(whole.max()) <= 2**bits - 1
    error = (whole * step + start - grouped).abs()
    assert bool((error <= 1e-6 * (step.abs() * 2**bits + start.abs())).all())


@pytest.mark.parametrize("kind", BITS)
def test_blocks_of_every_kind(tmp_path: Path, kind: str):
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((48, 512)).astype(np.float32)
    weights[3, 32:64] = 0
    weights[:, 256:] *= 0.01
    raw = packed(weights, Kind[kind], rng)
    (tmp_path / "raw").write_bytes(b"before" + raw.tobytes())
    tensor = GgufTensor(shape=weights.shape, kind=kind, start=6, n_bytes=raw.nbytes)
    scale, low = (torch.from_numpy(x) for x in read_blocks(tmp_path / "raw", tensor))
    unpacked = torch.from_numpy(gguf.quants.dequantize(raw, Kind[kind]))
    assert_given_back(unpacked, scale, low, BITS[kind])


def test_all_bits_of_factors_are_read():
    """Of the six-bit numbers of Q4_K and Q5_K, whose upper two lie apart from the others."""
    rng = np.random.default_rng(2)
    raw = packed(np.zeros((64, 256), np.float32), Kind.Q4_K, rng).reshape(64, -1)
    factors, offsets = gguf_groups._six_bits(raw[:, 4:16])
    expected = gguf.quants.Q4_K.get_scale_min(raw[:, 4:16])
    assert np.array_equal(factors, expected[0])
    assert np.array_equal(offsets, expected[1])
    assert factors.max() == offsets.max() == 63


def test_a_conversion_keeps_the_groups_of_every_kind(folder: Path):
    weights, groups = load_file(folder / "model.safetensors"), read_groups(folder)
    assert groups is not None
    assert groups.kinds == {NAMES[name]: kind.name for name, kind in EVERY_KIND.items()}
    for name, kind in groups.kinds.items():
        found = groups.get(name)
        if kind == "Q6_K":
            assert found is None
            continue
        assert found is not None
        assert (found.kind, found.bits) == (kind, BITS[kind])
        assert_given_back(weights[name], found.scale, found.low, found.bits)
    assert groups.get("model.norm.weight") is None
    assert describe_kinds(folder) == (
        "Q4_0 1, Q4_1 1, Q4_K 1, Q5_0 1, Q5_1 1, Q5_K 1, Q6_K 1, Q8_0 1"
    )
    assert json.loads((folder / MANIFEST).read_text())["model_files"].keys() >= {GROUPS_FILE}


def test_numbers_are_halves_where_halves_hold_them(folder: Path):
    stored = load_file(folder / GROUPS_FILE)
    for name, tensor in stored.items():
        matrix = name.rpartition(".")[0]
        long = matrix in (NAMES["attn_q"], NAMES["attn_k"])  # products of two numbers
        assert tensor.dtype == (torch.float32 if long else torch.float16), name


def test_rows_follow_those_of_the_weights(folder: Path, tmp_path: Path):
    """Transformers puts the rows of queries and keys of a Llama in another order than llama.cpp."""
    path, groups = tmp_path / "tiny.gguf", read_groups(folder)
    header = read_gguf_header(path)
    assert groups is not None
    for name, heads in (("attn_q", HEADS), ("attn_k", 2)):
        scale = torch.from_numpy(read_blocks(path, header.tensors[f"blk.0.{name}.weight"])[0])
        found = groups.get(NAMES[name])
        assert found is not None
        assert not torch.equal(found.scale, scale)
        # Within a head, rows 2 n are in the first half and rows 2 n + 1 in the second.
        by_head = scale.unflatten(0, (heads, -1))
        halves = torch.cat([by_head[:, ::2], by_head[:, 1::2]], 1).flatten(0, 1)
        assert torch.equal(found.scale, halves)


def test_rows_in_another_order_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Should a version of transformers unpack in another order, no wrong scales are kept."""
    monkeypatch.setattr(gguf_groups, "_interleaved_heads", lambda header, name: 0)
    with pytest.raises(ModelError, match=r"the groups of .*q_proj.weight do not give its weights"):
        convert_once(write_every_kind(tmp_path / "tiny.gguf"))


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path):
    path = write_every_kind(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    at = read_gguf_header(path).tensors["blk.0.ffn_up.weight"].start
    content[at : at + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight \(scale of its groups\) holds NaN"):
        convert_once(path)


def test_a_folder_without_groups(folder: Path):
    (folder / GROUPS_FILE).unlink()
    assert read_groups(folder) is None
    assert describe_kinds(folder) is None


def rewrite(
    folder: Path, change: dict[str, Tensor | None], kinds: object = None, told: bool = True
) -> None:
    """Change the file of groups: tensors by name, or None to leave one out; or its kinds."""
    path = folder / GROUPS_FILE
    with safe_open(path, "pt") as opened:
        before = opened.metadata()["kinds"]
    tensors = load_file(path) | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    text = before if kinds is None else json.dumps(kinds)
    save_file(kept, path, {"kinds": text} if told else None)


UP = NAMES["ffn_up"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.low": None}, "lacks 'model.layers.0.mlp.up_proj.weight.low'"),
        ({"x.scale": torch.zeros(1, 1)}, "holds, without a kind, 'x.scale'"),
        ({f"{UP}.scale": torch.zeros(256, 7)}, r"is \(256, 7\), and its weight is \(256, 256\)"),
        ({f"{UP}.scale": torch.zeros(8)}, r"is \(8,\), and its weight is \(256, 256\)"),
        ({f"{UP}.scale": torch.zeros(256, 8).double()}, "stored as F64; allowed: F16, F32"),
    ],
)
def test_damaged_groups(folder: Path, change: dict[str, Tensor | None], message: str):
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        read_groups(folder)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([], "not an object of strings"),
        ({UP: 3}, "not an object of strings"),
        ({}, "holds, without a kind, "),
        ({"z": "F16"}, "holds, without a kind, "),
    ],
)
def test_damaged_kinds(folder: Path, kinds: object, message: str):
    rewrite(folder, {}, kinds)
    with pytest.raises(ModelError, match=message):
        read_groups(folder)
    rewrite(folder, {}, told=False)
    with pytest.raises(ModelError, match="does not tell its kinds"):
        read_groups(folder)


def test_groups_of_other_weights(folder: Path):
    rewrite(folder, {}, dict.fromkeys(NAMES.values(), "F16") | {"z": "F16"})
    with pytest.raises(ModelError, match="holds, without a kind"):
        read_groups(folder)
    none = dict.fromkeys(load_file(folder / GROUPS_FILE))
    rewrite(folder, none, {"z": "F16"})
    with pytest.raises(ModelError, match="speaks of 'z', which the folder does not hold"):
        read_groups(folder)


def test_a_number_that_is_none_is_told_when_it_is_read(folder: Path):
    numbers = torch.ones(256, 8)
    numbers[3, 4] = float("inf")
    rewrite(folder, {f"{UP}.low": numbers})
    groups = read_groups(folder)
    assert groups is not None
    with pytest.raises(ModelError, match=r"up_proj.weight.low holds NaN or infinity in 1 of"):
        groups.get(UP)
    (folder / GROUPS_FILE).unlink()
    with pytest.raises(ModelError, match="cannot read"):
        groups.get(UP)
