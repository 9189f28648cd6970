"""Weights that are NaN or infinite are refused when they are loaded, by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import SHAPE, tiny_model, tiny_modulator
from vesicle.engine import Engine
from vesicle.errors import ModelError
from vesicle.models.finite import check_finite
from vesicle.modulator import Modulator

BAD = (float("nan"), float("inf"), -float("inf"))
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_number_anywhere_is_found(dtype: torch.dtype, bad: float):
    for place in (0, 7, 29):
        tensor = torch.ones(5, 6, dtype=dtype)
        tensor.view(-1)[place] = bad
        with pytest.raises(ModelError) as caught:
            check_finite("some.weight", tensor, "model.safetensors")
        assert str(caught.value) == (
            "model.safetensors is damaged: some.weight holds NaN or infinity in 1 of its 30 "
            f"numbers, first {bad} as number {place}"
        )
    both = torch.tensor([1, torch.inf, -torch.inf], dtype=dtype)  # their sum is NaN
    with pytest.raises(ModelError, match="in 2 of its 3 numbers, first inf as number 1"):
        check_finite("some.weight", both, "a model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_numbers_are_finite(dtype: torch.dtype):
    check_finite("some.weight", torch.full((100,), torch.finfo(dtype).max, dtype=dtype), "a model")
    check_finite("some.weight", torch.empty(0, dtype=dtype), "a model")


@pytest.mark.parametrize("weights", [None, "int4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_model_is_refused(name: str, bad: float, weights: str | None, tmp_path: Path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[5] = bad
    told = f"{name} holds NaN or infinity in 1 of its"
    with pytest.raises(ModelError, match=f"^the model is damaged: {told}"):
        Engine.from_model(model, weights=weights)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[5] = bad
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"^{path} is damaged: {told}"):
        Engine.from_pretrained(tmp_path, weights=weights)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_damaged_modulator_is_refused(bad: float, tmp_path: Path):
    modulator = tiny_modulator(SHAPE)
    modulator.save_pretrained(tmp_path)
    path = tmp_path / "modulator.safetensors"
    for name, tensor in load_file(path).items():
        tensors = load_file(path)
        if not tensor.numel():
            continue
        tensors[name].view(-1)[-1] = bad
        save_file(tensors, path)
        with pytest.raises(ModelError, match=f"{path} is damaged: {name} holds NaN or infinity"):
            Modulator.from_pretrained(tmp_path)
        tensors[name].view(-1)[-1] = 0
        save_file(tensors, path)
    Modulator.from_pretrained(tmp_path)
