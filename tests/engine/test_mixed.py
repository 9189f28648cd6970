"""Weights of quantised GGUF files: each projection in the file's bits, on the file's own grid."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor

from tests.models.tiny_gguf import write_gemma, write_gguf
from tests.tiny import random_plan, tiny_model, tiny_modulator
from vesicle.cost import price
from vesicle.engine import Engine, core
from vesicle.engine.encoding import Grid
from vesicle.engine.packed import PackedHead, PackedWeight
from vesicle.engine.weights import from_folder, from_model
from vesicle.models.gguf import convert_once
from vesicle.plan import Replay

KINDS = {
    "attn_q": Kind.Q5_0,
    "attn_k": Kind.Q5_1,
    "attn_v": Kind.Q8_0,
    "attn_output": Kind.Q4_0,
    "ffn_gate": Kind.Q4_1,
    "ffn_up": Kind.Q4_1,
    "ffn_down": Kind.Q5_0,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    with torch.no_grad():
        yield


def converted(tmp_path: Path) -> Path:
    kinds = KINDS | {"token_embd": Kind.Q8_0}
    return convert_once(write_gguf(tmp_path / "own.gguf", kinds))


def test_each_projection_has_the_bits_of_its_file(tmp_path: Path):
    folder = converted(tmp_path)
    weights = from_folder(folder)
    assert weights.format == "mixed"
    assert weights.packed
    assert weights.config.shape.stored_bits == ((8, 4, 4, 8),)
    stored = load_file(folder / "model.safetensors")
    (layer,) = weights.layers
    p = "model.layers.0."
    joined = {
        "attention_in": [f"self_attn.{n}_proj" for n in "vkq"],
        "attention_out": ["self_attn.o_proj"],
        "ffn_in": ["mlp.gate_proj", "mlp.up_proj"],
        "ffn_out": ["mlp.down_proj"],
    }
    for name, parts in joined.items():
        expected = torch.cat([stored[f"{p}{part}.weight"] for part in parts]).t()
        assert torch.equal(getattr(layer, name).dequantize(16), expected), name
    rows = torch.arange(len(stored["model.embed_tokens.weight"]))
    assert isinstance(weights.head, PackedHead)
    assert torch.equal(weights.head.rows(rows), stored["model.embed_tokens.weight"])
    assert [(m.kinds, m.bits, m.error) for m in weights.packing] == [
        (("Q8_0", "Q5_1"), 8, 0),
        (("Q5_0",), 8, 0),
        (("Q4_0",), 4, 0),
        (("Q4_1", "Q4_1"), 4, 0),
        (("Q5_0",), 8, 0),
        (("Q8_0",), 8, 0),
    ]


def test_what_is_asked_for_is_done(tmp_path: Path):
    folder = converted(tmp_path)
    assert from_folder(folder, weights="fp32").format == "fp32"
    eight = from_folder(folder, weights="int8")
    assert (eight.format, eight.config.shape.stored_bits) == ("int8", 8)
    assert {m.error for m in eight.packing} == {0}
    assert max(m.error for m in from_folder(folder, weights="int4").packing) > 0


def test_a_file_of_four_bits_is_int4(tmp_path: Path):
    kinds = dict.fromkeys(KINDS, Kind.Q4_0)
    weights = from_folder(convert_once(write_gguf(tmp_path / "own.gguf", kinds)))
    assert (weights.format, weights.config.shape.stored_bits) == ("int4", 4)


def test_a_file_of_floats_is_dense(tmp_path: Path):
    assert from_folder(convert_once(write_gguf(tmp_path / "own.gguf"))).format == "fp32"


def test_a_model_in_memory(tmp_path: Path):
    """Nothing is known of its file: 4 bits where they give every weight back, else 8."""
    model = tiny_model("llama", dtype=torch.float32)
    down = model.model.layers[1].mlp.down_proj.weight
    down.copy_(PackedWeight.pack(down, 4).dequantize(4).t())
    weights = from_model(model, weights="mixed")
    assert weights.config.shape.stored_bits == ((8,) * 4, (8, 8, 8, 4), (8,) * 4)


def test_counted_as_priced(tmp_path: Path):
    """Below rest too, by bits that differ from site to site; one way and the other."""
    engine = Engine.from_pretrained(converted(tmp_path))
    shape = engine.shape
    plan = random_plan(shape, 40, np.random.default_rng(0))
    method = Replay(plan, tiny_modulator(shape).stand_ins)
    ids = torch.randint(3, shape.vocabulary, (40,)).tolist()
    sequences = []
    for native in (engine._native, None):
        engine._native = native
        sequence = engine.start(method)
        logits = engine.forward([(sequence, ids)], "all")[0]
        assert sequence.cost == price(sequence.plan, shape, sequence.overhead)
        sequences.append(logits)
    assert (sequences[0] - sequences[1]).abs().max() < 1e-2


def test_gemma(tmp_path: Path):
    engine = Engine.from_pretrained(convert_once(write_gemma(tmp_path / "gemma.gguf", KINDS)))
    assert engine.weights_format == "mixed"
    assert engine.uncovered is None
    assert {m.error for m in engine.packing if "F32" not in m.kinds} == {0}
    sequence = engine.start()
    engine.forward([(sequence, [1] * 50)], "all")
    assert sequence.cost == sequence.dense_cost == price(sequence.plan, engine.shape)


def grid_of(n_out: int, groups: int, bits: int, seed: int) -> tuple[Tensor, Grid]:
    """Weights on a random grid whose ends no code reaches, with scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    scale = (1 + torch.rand(n_out, groups, generator=generator)).half().float() / 64
    scale *= torch.randint(2, scale.shape, generator=generator) * 2 - 1
    low = torch.randn(n_out, groups, generator=generator).half().float()
    codes = torch.randint(1, 2**bits - 1, (n_out, groups, 32), generator=generator).float()
    weight = (codes * scale[..., None] + low[..., None]).flatten(1)
    return weight, Grid(bits=bits, scale=scale, low=low)


@pytest.mark.parametrize(("bits", "stored"), [(4, 4), (4, 8), (5, 8), (8, 8)])
@pytest.mark.parametrize("n_out", [16, 64, 130, 330])
def test_a_grid_gives_every_weight_back(bits: int, stored: int, n_out: int):
    weight, grid = grid_of(n_out, 3, bits, n_out)
    packed = PackedWeight.pack(weight, stored, grid=grid)
    assert packed.error == 0
    assert torch.equal(packed.dequantize(16).t(), weight)
    head = PackedHead.pack(weight, stored, grid=grid)
    assert head.exact
    assert torch.equal(head.rows(torch.arange(n_out)), weight)
    if bits == 5:  # leading bits, so that the leading plane alone is within half of what it drops
        coarse = (packed.dequantize(4).t() - weight).view(n_out, 3, 32).abs()
        assert (coarse <= 1.01 * grid.scale[..., None].abs()).all()


@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (97, 48), (200, 70), (1100, 33), (8300, 32)])
@pytest.mark.parametrize("on_grid", [False, True])
def test_the_core_encodes_as_pytorch(
    bits: int, n_out: int, n_in: int, on_grid: bool, monkeypatch: pytest.MonkeyPatch
):
    """The same codes, in the same places, whatever is padded."""
    groups = -(-n_in // 32)
    weight, grid = grid_of(n_out, groups, bits, 1)
    if not on_grid:
        weight = torch.randn(n_out, groups * 32, generator=torch.Generator().manual_seed(2))
    weight = weight[:, :n_in].contiguous()
    given = grid if on_grid else None
    packs = [lambda: PackedWeight.pack(weight, bits, grid=given)]
    packs.append(lambda: PackedHead.pack(weight, bits, grid=given))  # type: ignore[arg-type,return-value]
    for pack in packs:
        mine = pack()
        with monkeypatch.context() as patch:
            patch.setattr(core, "load", lambda: None)
            theirs = pack()
        assert mine.error == theirs.error
        decode = [
            x.dequantize(16) if isinstance(x, PackedWeight) else x.rows(torch.arange(n_out))
            for x in (mine, theirs)
        ]
        assert torch.equal(*decode)
        if n_in % 32 == 0 and n_out % 128 == 0:
            assert torch.equal(mine.high, theirs.high)
