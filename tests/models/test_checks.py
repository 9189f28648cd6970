"""What is wrong with a model folder is told in one line, before its weights are loaded."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.tiny_folder import CONFIG, SHARDS, tensors, write_folder
from tests.tiny import CONFIGS, tiny_model
from vesicle.errors import ModelError
from vesicle.models import memory
from vesicle.models.checks import check_weights, read_config, read_tensors
from vesicle.models.resolve import check_folder
from vesicle.models.safetensors_header import read_safetensors_header

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("sharded", [False, True])
def test_good_folders(tmp_path: Path, sharded: bool):
    folder = write_folder(tmp_path / "model", sharded=sharded)
    found, weights = check_weights(folder, read_config(folder)), tensors()
    assert found.keys() == weights.keys()
    for name, stored in found.items():
        raw = stored.file.read_bytes()[stored.start : stored.start + stored.n_bytes]
        assert stored.shape == weights[name].shape
        assert raw == weights[name].tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_passes(tmp_path: Path, name: str):
    tiny_model(name).save_pretrained(tmp_path)
    assert check_folder(tmp_path) == tmp_path


ABSURD = [
    ("model_type", "mamba", "model type 'mamba' is not supported; supported: llama"),
    ("model_type", ["llama"], "names no model_type"),
    ("num_hidden_layers", 0, "num_hidden_layers 0; allowed: whole numbers from 1 to 4096"),
    ("num_hidden_layers", -3, "num_hidden_layers -3"),
    ("num_hidden_layers", 10**12, "num_hidden_layers 1000000000000; allowed"),
    ("num_hidden_layers", 3, "weights lack 'model.layers.2"),
    ("num_hidden_layers", "2", "num_hidden_layers"),
    ("num_hidden_layers", True, "num_hidden_layers"),
    ("num_hidden_layers", 2.5, "num_hidden_layers"),
    ("hidden_size", 32, r"query weight is \(16, 16\)|norm is \(16,\); the config asks for \(32,\)"),
    ("hidden_size", 2**40, "hidden_size 1099511627776; allowed"),
    ("num_attention_heads", 3, "num_key_value_heads 2 and num_attention_heads 3; num_key_value_he"),
    ("num_key_value_heads", 0, "num_key_value_heads 0; allowed: whole numbers from 1 to 4"),
    ("num_key_value_heads", 4, r"layer 0's key weight is \(8, 16\); the config asks for \(16, 16"),
    ("head_dim", 0, "head_dim 0; allowed"),
    ("head_dim", 5, "rotates 5 of 5 dimensions of a head; allowed: even numbers"),
    ("head_dim", 8, r"query weight is \(16, 16\); the config asks for \(32, 16\)"),
    ("intermediate_size", 25, r"FFN gate weight is \(24, 16\); the config asks for \(25, 16\)"),
    ("vocab_size", 21, r"the embedding is \(20, 16\); the config asks for \(21, 16\)"),
    ("vocab_size", 0, "vocab_size 0; allowed"),
    ("max_position_embeddings", 0, "max_position_embeddings 0; allowed"),
    ("max_position_embeddings", 2**40, "max_position_embeddings 1099511627776; allowed"),
    ("rms_norm_eps", -1e-5, "rms_norm_eps -1e-05; allowed: from 0 to below 1"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps nan; allowed"),
    ("hidden_act", "swish9", "activation 'swish9' is not supported"),
    ("sliding_window", 8, "sliding window of 8 of its 64 positions"),
    ("layer_types", ["full_attention"], "has 1 layer_types; allowed: one for each of its 2 layers"),
    ("rope_parameters", "x", "rope_parameters"),
    ("rope_parameters", {"rope_type": "spiral"}, "rotary scaling 'spiral' is not supported"),
    ("rope_parameters", {"rope_theta": 0.0}, "frequencies are not positive numbers"),
    ("rope_parameters", {"rope_theta": -10.0}, "frequencies are not positive numbers"),
    ("rope_parameters", {"rope_theta": "big"}, "that make no sense"),
    (
        "rope_parameters",
        {"rope_theta": 1e4, "partial_rotary_factor": 2.0},
        "rotates 8 of 4 dimensions",
    ),
    (
        "rope_parameters",
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0},
        "rope_parameters|frequencies",
    ),
    ("tie_word_embeddings", False, "weights lack the head"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings"),
    ("attention_bias", True, "layer 0's query weight has no bias, against what the config says"),
    ("quantization_config", {"quant_method": "gptq"}, r"are quantised \('gptq'\)"),
]


@pytest.mark.parametrize(("name", "value", "message"), ABSURD)
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers warns before it is told
def test_absurd_configs(tmp_path: Path, name: str, value: Any, message: str):
    folder = write_folder(tmp_path / "model", {**CONFIG, name: value})
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


def test_heads_must_divide_the_width(tmp_path: Path):
    config = {**CONFIG, "num_attention_heads": 6, "head_dim": None}
    with pytest.raises(ModelError, match="num_attention_heads 6 and hidden_size 16; num_attention"):
        check_folder(write_folder(tmp_path / "model", config))


def test_a_config_may_leave_defaults_out(tmp_path: Path):
    config = {k: v for k, v in CONFIG.items() if k not in ("rope_parameters", "attention_bias")}
    assert check_folder(write_folder(tmp_path / "model", config))
    config = {**CONFIG, "rope_parameters": {"rope_type": "default"}}
    assert check_folder(write_folder(tmp_path / "other", config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q0: None}, f"weights lack '{Q0}'"),
        ({Q0: np.zeros((16, 15), np.float32)}, r"query weight is \(16, 15\); the config asks for"),
        ({Q0: np.zeros((16, 16), np.int8)}, f"{Q0} is stored as I8; allowed: F64, F32, F16, BF16"),
        ({Q0.replace("weight", "bias"): np.zeros(16, np.float32)}, "query weight has a bias, agai"),
        ({"model.norm.weight": np.full(16, np.nan, np.float32)}, "model.norm.weight holds NaN"),
        ({"model.norm.weight": np.full(16, np.inf, np.float16)}, "model.norm.weight holds NaN"),
        ({"model.norm.weight": None}, "weights lack 'model.norm.weight'"),
        ({"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}, "query norm is there"),
    ],
)
def test_wrong_tensors(tmp_path: Path, change: dict[str, Any], message: str):
    weights = {name: value for name, value in (tensors() | change).items() if value is not None}
    with pytest.raises(ModelError, match=message):
        check_folder(write_folder(tmp_path / "model", weights=weights))


def test_tensors_that_no_one_asks_for_may_be_of_any_type(tmp_path: Path):
    weights = {**tensors(), "model.rotary_emb.inv_freq": np.zeros(2, np.int64)}
    assert check_folder(write_folder(tmp_path / "model", weights=weights))


def test_a_fused_projection_of_the_wrong_size(tmp_path: Path):
    tiny_model("gpt_neox_parallel").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    save_file({**weights, name: weights[name][:-5]}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="layer 1's tensors do not have the shapes"):
        check_folder(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path):
    folder = write_folder(tmp_path / "model", sharded=True)
    twice = load_file(folder / SHARDS[0]) | {Q0: np.zeros((16, 16), np.float32)}
    save_file({**load_file(folder / SHARDS[1]), Q0: twice[Q0]}, folder / SHARDS[1])
    with pytest.raises(ModelError, match=f"{SHARDS[1]} holds '{Q0}', and so does {SHARDS[0]}"):
        read_tensors(folder)


@pytest.mark.parametrize("name", ["", "..", "a\0b", "x" * 5000, "a/b", 3])
def test_shards_of_impossible_names(tmp_path: Path, name: Any):
    folder = write_folder(tmp_path / "model", sharded=True)
    index = {"weight_map": {Q0: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"not a file name|lacks"):
        read_tensors(folder)


def test_too_large_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_folder(tmp_path / "model")
    monkeypatch.setattr(memory, "memory_bytes", lambda: 10_000)
    config = read_config(folder)
    assert check_weights(folder, config)
    with pytest.raises(ModelError, match=r"loading .* GB of memory or more, and this machine has"):
        check_weights(folder, config, weight_bytes=4)
    monkeypatch.setattr(memory, "memory_bytes", lambda: None)
    assert check_weights(folder, config, weight_bytes=4)


def test_this_machine_has_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = memory.memory_bytes()
    assert whole is None or whole > 1 << 28
    (tmp_path / "limit").write_text("1000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "none", tmp_path / "limit"))
    assert memory.memory_bytes() == 1000


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = [
    ({"a": TENSOR | {"dtype": "F31"}}, "'a' has the unknown dtype 'F31'"),
    ({"a": TENSOR | {"dtype": ["F32"]}}, "unknown dtype"),
    ({"a": TENSOR | {"shape": [3]}}, r"'a' has 8 bytes; F32 of the shape \[3\] takes 12"),
    ({"a": TENSOR | {"shape": [-2]}}, r"'a' has the shape \[-2\]"),
    ({"a": TENSOR | {"shape": [2.0]}}, "has the shape"),
    ({"a": TENSOR | {"shape": [True, 2]}}, "has the shape"),
    ({"a": TENSOR | {"shape": [2**62, 2**62]}}, "takes inf"),
    ({"a": TENSOR | {"shape": [2**64]}}, "has the shape"),
    ({"a": TENSOR | {"data_offsets": [8, 0]}}, "has the data_offsets"),
    ({"a": TENSOR | {"data_offsets": [0, 8, 16]}}, "has the data_offsets"),
    ({"a": TENSOR | {"data_offsets": [-8, 0]}}, "has the data_offsets"),
    ({"a": TENSOR | {"data_offsets": [8, 16]}}, "'a' starts at byte .* is expected"),
    ({"a": TENSOR, "b": TENSOR}, "'b' starts at byte"),
    ({"a": TENSOR, "b": TENSOR | {"data_offsets": [4, 12]}}, "'b' starts at byte"),
    ({"a": TENSOR, "__metadata__": {"x": 1}}, "__metadata__"),
    ({"a": TENSOR, "__metadata__": "x"}, "__metadata__"),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_lying_headers(tmp_path: Path, header: dict[str, Any], message: str):
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ModelError, match=message):
        read_safetensors_header(path)


def test_a_name_twice(tmp_path: Path):
    text = json.dumps({"a": TENSOR, "b": TENSOR | {"data_offsets": [8, 16]}}).replace('"b"', '"a"')
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(16))
    with pytest.raises(ModelError, match="twice"):
        read_safetensors_header(path)


@pytest.mark.parametrize("kept", [8, 20])
def test_deep_json_is_told(tmp_path: Path, kept: int):
    path = tmp_path / "x.safetensors"
    text = b"[" * 200_000 if kept == 8 else b'{"a":' + b"9" * 9000 + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelError, match="header is damaged"):
        read_safetensors_header(path)
