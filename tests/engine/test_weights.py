"""How weights are stored: chosen by name, or by what loses nothing; counted as they are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny import random_plan, tiny_model, tiny_modulator
from vesicle.cost import price, price_tokens
from vesicle.engine import Engine
from vesicle.engine.linear import ChannelMajor
from vesicle.engine.packed import PackedHead, PackedPair, PackedWeight
from vesicle.engine.weights import FORMATS, build, from_folder, from_model
from vesicle.errors import ModelError
from vesicle.plan import Replay

ALIKE = 0.99
"""Least correlation of logits: 8-bit activations visibly move those of large random weights."""


def alike(first: Tensor, second: Tensor) -> None:
    pair = torch.stack([first.flatten().float(), second.flatten().float()])
    assert torch.corrcoef(pair)[0, 1] > ALIKE


def from_four_bits(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose matrices 4-bit groups give back exactly, and 8-bit ones its embedding."""
    model = tiny_model(name, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                weight = module.weight
                weight.copy_(PackedHead.pack(weight, 8).rows(torch.arange(len(weight))))
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("_proj" in key or "dense" in key or "query" in key):
                parameter.copy_(PackedWeight.pack(parameter, 4).dequantize(4).t())
    return model.to(dtype)


def test_four_bits_where_they_lose_nothing(family: str, tmp_path: Path):
    model = from_four_bits(family)
    model.save_pretrained(tmp_path)
    for loaded in (from_model(model), from_folder(tmp_path)):
        assert (loaded.format, loaded.packed, loaded.dtype) == ("int4", True, torch.float32)
        shape = loaded.config.shape
        assert (shape.stored_bits, shape.head_bits, shape.weight_bytes) == (4, 8, 4)
        dense = from_model(model, torch.float32)
        for layer, full in zip(loaded.layers, dense.layers, strict=True):
            assert isinstance(layer.attention_in, PackedPair)
            assert layer.attention_in.parts[0].n_out == 2 * shape.kv_width
            for packed, plain in zip(layer.projections, full.projections, strict=True):
                assert isinstance(plain, ChannelMajor)
                assert torch.equal(packed.dequantize(16), plain.weight)
            for norm, plain_norm in zip(layer.norms, full.norms, strict=True):
                assert torch.equal(norm.weight, plain_norm.weight)


def test_one_other_weight_in_the_last_layer_keeps_the_model_dense(tmp_path: Path):
    model = from_four_bits("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    assert from_folder(tmp_path).format == from_model(model).format == "fp32"
    assert from_folder(tmp_path, weights="int4").format == "int4"


def test_a_dense_store_has_the_files_own_numbers(tmp_path: Path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert from_folder(tmp_path).format == "bf16"
    assert from_folder(tmp_path, torch.float64).format == "fp64"
    assert from_folder(tmp_path, weights="fp32").dtype == torch.float32
    half = tiny_model("llama", dtype=torch.float16)
    half.save_pretrained(tmp_path)
    assert from_folder(tmp_path).format == "fp32"
    assert from_model(half, weights="int8").format == "int8"
    with pytest.raises(ModelError, match=r"dtype is torch.float16; allowed: torch.bfloat16"):
        from_model(half)


def test_too_large_to_pack_is_dense_unless_asked_for():
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = 1e6
    assert from_model(model).format == "fp32"
    with pytest.raises(ModelError, match="a weight's magnitude is 1000000"):
        from_model(model, weights="int4")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_computes_the_model(family: str, ids: Tensor, form: str):
    model = from_four_bits(family)
    engine = Engine.from_model(model, weights=form, kv="fp32")
    (logits,) = engine.forward([(engine.start(), ids[0].tolist())], logits="all")
    with torch.no_grad():
        expected = model(ids).logits[0]
    if form in ("fp32", "fp64"):
        assert (logits - expected).abs().max() < 2e-3
    else:
        alike(logits, expected)


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_steps_and_passes_agree(ids: Tensor, form: str):
    """Many tokens share one product of unrounded activations; steps round theirs to 8 bits."""
    engine = Engine.from_model(from_four_bits("llama"), weights=form, kv="fp32")
    (whole,) = engine.forward([(engine.start(), ids[0].tolist())], logits="all")
    sequence = engine.start()
    steps = [engine.forward([(sequence, [i])])[0] for i in ids[0].tolist()]
    alike(torch.cat(steps), whole)


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_what_is_counted_is_what_is_priced(ids: Tensor, rng: np.random.Generator, form: str):
    engine = Engine.from_model(from_four_bits("llama"), weights=form)
    plan = random_plan(engine.shape, 70, rng)
    sequence = engine.start(Replay(plan, tiny_modulator(engine.shape).stand_ins))
    row = ids[0].tolist()
    for start, stop in ((0, 50), (50, 51), (51, 70)):
        engine.forward([(sequence, row[start:stop])], logits="all")
    assert sequence.plan.equals(plan)
    for name, values in price_tokens(plan, engine.shape, sequence.overhead).items():
        np.testing.assert_array_equal(sequence.token_costs[name], values, err_msg=name)
    assert sequence.cost == price(plan, engine.shape, sequence.overhead)


def test_a_pass_at_rest_reads_what_is_held():
    """But for the embedding's row and the norms, one token at rest reads every byte once."""
    model = from_four_bits("mistral")  # whose sizes are whole groups and tiles but for the FFN
    engine = Engine.from_model(model, weights="int8")
    sequence = engine.start()
    engine.forward([(sequence, [5])])
    shape = engine.shape
    numbers = (
        sum(w * o for w, o in zip(shape.site_widths, shape.site_outputs, strict=True))
        * shape.n_layers
        + shape.width * shape.vocabulary
    )
    assert sequence.cost.weight_bytes == numbers * 9 // 8


def test_bytes_held():
    model = from_four_bits("llama")  # 48 wide, 80 in the FFN; tied
    n = {name: from_model(model, weights=name).bytes_held for name in FORMATS}
    parameters = sum(p.numel() for p in model.parameters())
    assert n["fp32"] == 4 * parameters
    assert n["fp64"] == 8 * parameters
    assert n["bf16"] == 2 * parameters
    # 48 and 80 channels are 2 and 3 groups; 48, 24 + 24 and 160 outputs are 64, 64 and 192 wide.
    groups = 2 * 64 + 2 * 64 + 2 * 64 + 2 * 192 + 3 * 64
    head, norms = 112 * 2 * (32 * 8 + 32) // 8, 7 * 48 * 4
    assert n["int4"] == 3 * groups * 20 + head + norms
    assert n["int8"] == 3 * groups * 36 + head + norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_untied_embedding(dtype: torch.dtype):
    model = tiny_model("mistral", dtype=dtype)
    loaded = from_model(model, weights="int4")
    assert isinstance(loaded.head, PackedHead)
    ids, exact = torch.tensor([3, 96, 0]), model.get_input_embeddings().weight.detach().float()
    assert loaded.embed(ids).dtype == torch.float32
    if dtype != torch.bfloat16:
        assert isinstance(loaded.embedding, PackedHead)
        assert (loaded.embed(ids) - exact[ids]).abs().max() < 0.01
    else:
        assert isinstance(loaded.embedding, Tensor)
        assert loaded.embedding.dtype == dtype
        assert torch.equal(loaded.embed(ids), exact[ids])
    held = loaded.bytes_held
    assert held > from_model(from_four_bits("llama"), weights="int4").bytes_held


def test_what_is_not_allowed_is_one_line(tmp_path: Path):
    model = tiny_model("llama", dtype=torch.float32)
    allowed = "int4, int8, mixed, bf16, fp32, fp64"
    with pytest.raises(ModelError, match=f"weights is 'int3'; allowed: {allowed}"):
        from_model(model, weights="int3")
    with pytest.raises(ModelError, match=r"weights 'int4' and dtype torch.float32 do not agree"):
        from_model(model, torch.float32, "int4")
    assert from_model(model, torch.bfloat16, "bf16").format == "bf16"
    with pytest.raises(ModelError, match=r"dtype is torch.float16; allowed: torch.bfloat16, torch"):
        from_model(model, torch.float16)
    whole = {k: v for k, v in model.state_dict().items() if "lm_head" not in k}
    key = "model.layers.1.mlp.up_proj.weight"
    for bad in (whole[key][:-1], whole[key].t(), whole[key].int()):
        with pytest.raises(ModelError):
            build(model.config, {**whole, key: bad}.get)
    model.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack 'model.layers.0"):
        from_folder(tmp_path)


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_loaded_model_holds_no_file(tmp_path: Path, form: str | None):
    """What is kept is a copy: the file may be replaced while the model runs."""
    model = from_four_bits("qwen2")
    model.save_pretrained(tmp_path)
    loaded = from_folder(tmp_path, weights=form)
    before = loaded.logits(loaded.embed(torch.tensor([5])))
    path = tmp_path / "model.safetensors"
    zeros = {k: torch.zeros_like(v) for k, v in load_file(path).items()}
    offset = path.stat().st_size
    save_file(zeros, tmp_path / "other", metadata={"format": "pt"})
    with path.open("r+b") as file:
        file.write((tmp_path / "other").read_bytes())
    assert path.stat().st_size == offset
    assert torch.equal(loaded.logits(loaded.embed(torch.tensor([5]))), before)
    norms = [n.weight for layer in loaded.layers for n in layer.norms]
    assert all((weight != 0).any() for weight in norms)
    biases = [p.parts[0].bias for p in (layer.attention_in for layer in loaded.layers)]
    assert all((bias != 0).any() for bias in biases)
