"""A NaN or infinity in a weight, a key or a value is never silent, on any instruction set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, method_for, modulator_for, native
from vesicle.engine import Engine, Sequence, core
from vesicle.engine.linear import ChannelMajor
from vesicle.engine.packed import PackedHead, PackedPair, PackedWeight
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.plan import BLOCK, Plan, Replay

pytestmark = pytest.mark.skipif(not core.available(), reason="the native core is not built here")

WEIGHTS, KV = ("fp32", "bf16", "int4", "int8"), ("fp32", "fp16", "bf16", "int8")
BAD = (float("nan"), float("inf"), -float("inf"))
LAYER_SITES = ("attention_in", "attention_out", "ffn_in", "ffn_out")
NORMS = ("attention_norm", "ffn_norm", "final_norm")
WHERE = r"logits are not finite at position \d+: the weights or the cache are damaged"


def instruction_sets() -> Iterator[str]:
    """Each one that this processor and build have, in use."""
    library = core.load()
    assert library is not None
    try:
        for name in core.instruction_sets():
            library.vesicle_instructions(name.encode())
            yield name
    finally:
        library.vesicle_instructions(None)


@contextmanager
def in_torch(engine: Engine, disabled: bool = True) -> Iterator[None]:
    native, engine._native = engine._native, None if disabled else engine._native
    with pytest.MonkeyPatch.context() as patch:
        if disabled:
            patch.setattr(core, "available", lambda: False)
        yield
    engine._native = native


def damage(weight: Any, bad: float) -> None:
    """One number of a dense weight, or one scale of a packed one."""
    if isinstance(weight, PackedPair):
        return damage(weight.parts[1], bad)
    if isinstance(weight, PackedWeight):
        # The first scale of the first group of the first tile: rows of 32 channels come before.
        width = 128 if weight.padded_out >= 128 else 64
        return _scale(weight.high, 16 * width, bad)
    if isinstance(weight, PackedHead):  # the first scale of the tile of the last token's row
        tile = IDS[20] // 16
        return _scale(weight.high, tile * weight.groups * 320 + 256 + 2 * (IDS[20] % 16), bad)
    if isinstance(weight, ChannelMajor):
        weight.weight[3, -1] = bad  # of the queries, where they share it with keys and values
    elif weight.ndim == 2:
        weight[IDS[20], 3] = bad
    else:
        weight[3] = bad
    return None


def _scale(high: Tensor, at: int, bad: float) -> None:
    high[at : at + 2] = torch.tensor([bad], dtype=torch.float16).view(torch.uint8)


def forget(sequence: Sequence, layer: int, head: int, blocks: int) -> None:
    """Let a KV head keep no more than some of its first complete blocks; the others keep all."""
    cache = sequence.cache
    kept = [entries[: len(entries) // BLOCK * BLOCK] for entries in cache.held(layer)]
    kept[head] = kept[head][: BLOCK * blocks]
    cache.compact(layer, kept)
    assert len({*cache.n_blocks[layer].tolist()}) > 1


def told(engine: Engine, sequence: Sequence) -> None:
    """The next token has logits that are not finite, and none is chosen."""
    twin = engine.fork(sequence)
    [logits] = engine.forward([(twin, [IDS[20]])])
    assert not logits.isfinite().all()
    with pytest.raises(VesicleError, match=WHERE):
        engine.likeliest([(sequence, [IDS[20]])])


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize(
    ("weights", "site"),
    [
        *((w, s) for w in WEIGHTS for s in (*LAYER_SITES, "embedding", "head")),
        # The core has copies of bf16 norms.
        *((w, s) for w in ("fp32", "int4") for s in NORMS),
    ],
)
def test_a_damaged_weight_is_told(weights: str, site: str, bad: float):
    for _ in instruction_sets():
        engine = native(weights)
        sequence = engine.start(method_for(engine, "dense"))
        engine.forward([(sequence, IDS[:20])], "none")
        w = engine._weights
        if site in ("embedding", "head"):
            damage(getattr(w, site), bad)
        elif site == "final_norm":
            damage(w.final_norm.weight, bad)
        elif site in NORMS:
            damage(getattr(w.layers[1], site).weight, bad)
        else:
            damage(getattr(w.layers[1], site), bad)
        told(engine, sequence)


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_damaged_bias_is_told(weights: str, bad: float):
    for _ in instruction_sets():
        engine = native(weights, family="biases")
        sequence = engine.start(method_for(engine, "dense"))
        engine.forward([(sequence, IDS[:20])], "none")
        projection = engine._weights.layers[1].attention_in
        part = projection.parts[0] if isinstance(projection, PackedPair) else projection
        assert part.bias is not None
        damage(part.bias, bad)
        told(engine, sequence)


@pytest.mark.parametrize(
    ("store", "bad"),
    [("keys", BAD[0]), ("values", BAD[0]), ("values", BAD[1]), ("values", BAD[2])],
    ids=str,
)
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_a_damaged_cache_is_told(uneven: bool, kv: str, store: str, bad: float):
    """Infinite keys are left out: a score of minus infinity is a weight of nothing."""
    for _ in instruction_sets():
        engine = native("fp32", kv)
        sequence = engine.start(method_for(engine, "dense"))
        engine.forward([(sequence, IDS[:20])], "none")
        if uneven:
            forget(sequence, layer=2, head=0, blocks=0)
        block, pool = int(sequence.cache.tables[2, 1, 0]), engine.pool
        if kv == "int8":
            scales = pool.key_scales if store == "keys" else pool.value_scales
            scales[block, 5] = bad
        elif store == "keys":
            pool.keys[block, 3, 5] = bad
        else:
            pool.values[block, 5, 3] = bad
        told(engine, sequence)


@pytest.mark.parametrize("path", ["core", "torch"])
@pytest.mark.parametrize("summary", ["mean", "bounds"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_a_damaged_block_is_chosen_and_told(uneven: bool, summary: str, path: str):
    """What cannot be estimated is read before all that can be, beside a head that reads all too."""
    for _ in instruction_sets():
        engine = native("fp32")
        plan = Plan.rest(engine.shape, 82)
        plan.kv_blocks[80:] = 3
        stand_ins = modulator_for(engine.shape, "stand-ins", summary).stand_ins
        results = []
        for damaged in (False, True):
            sequence = engine.start(Replay(plan, stand_ins))
            engine.forward([(sequence, IDS[:80])], "none")
            for layer in range(engine.shape.n_layers):
                if uneven:
                    forget(sequence, layer, head=0, blocks=1)
                block = int(sequence.cache.tables[layer, 1, 2])
                engine.pool.keys[block, 3, 5] = torch.nan if damaged else 0.0
            ids = IDS[80:81]
            with in_torch(engine, path == "torch"):
                results += engine.forward([(sequence, ids)])
        assert results[0].isfinite().all()
        assert not results[1].isfinite().all()


@pytest.mark.parametrize("bad", [*BAD, "all ones"], ids=str)
@pytest.mark.parametrize("count", [1, 40, 96])
@pytest.mark.parametrize("stored", [4, 8])
def test_damaged_activations_spoil_every_output(stored: int, count: int, bad: float | str):
    generator = torch.Generator().manual_seed(0)
    weight = PackedWeight.pack(torch.randn(192, 96, generator=generator), stored)
    head = PackedHead.pack(torch.randn(50, 96, generator=generator), stored)
    x = torch.randn(3, 96, generator=generator)
    if isinstance(bad, float):
        x[1, 37] = bad
    else:  # the NaN of the largest magnitude
        x.view(torch.int32)[1, 37] = 0x7FFFFFFF
    for _ in instruction_sets():
        out = torch.empty(3, 192)
        core.packed_multiply(x, weight, np.full(3, count, np.int32), 16, 192, out)
        assert out[1].isnan().all()
        assert out[::2].isfinite().all()
        logits = torch.empty(3, 50)
        core.head_multiply(x, head, 16, logits)
        assert logits[1].isnan().all()
        assert logits[::2].isfinite().all()
    assert weight.multiply(x, np.full(3, count, np.int32), 16)[0][1].isnan().all()


@pytest.mark.parametrize("survivors", [0, 1, 8])
def test_a_damaged_head_is_told_where_it_is_screened(survivors: int):
    for _ in instruction_sets():
        engine = native("int8")
        plan = Plan.rest(engine.shape, 40)
        plan.head[:] = survivors
        for path in (False, True):
            sequence = engine.start(Replay(plan))
            engine.forward([(sequence, IDS[:20])], "none")
            assert engine.likeliest([(engine.fork(sequence), [IDS[20]])])
            before = engine._weights.head.high.clone()
            damage(engine._weights.head, torch.nan)
            decoder = engine._native
            engine._native = None if path else decoder
            with pytest.raises(VesicleError, match=WHERE):
                engine.likeliest([(sequence, [IDS[21]])])
            engine._native = decoder
            engine._weights.head.high.copy_(before)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("native_path", [True, False], ids=["core", "general"])
def test_what_is_not_finite_is_cached_as_it_is(kv: str, native_path: bool):
    """A damaged value weight reaches the tokens after it too, through the cache."""
    for _ in instruction_sets():
        engine = native("fp32", kv)
        decoder = engine._native
        if not native_path:
            engine._native = None
        sequence = engine.start(method_for(engine, "dense"))
        engine.forward([(sequence, IDS[:20])], "none")
        weight = engine._weights.layers[3].attention_in.weight
        before = weight.clone()
        weight[:, 0] = torch.nan
        engine.forward([(sequence, IDS[20:21])])
        weight.copy_(before)
        engine._native = decoder
        assert not engine.forward([(sequence, IDS[21:22])])[0].isfinite().all()


def test_levels_that_are_no_numbers_are_told():
    for _ in instruction_sets():
        engine = native("fp32")
        method = ModulatorMethod(modulator_for(engine.shape, "plain"), 0.5)
        sequence = engine.start(method)
        engine.forward([(sequence, IDS[:20])], "none")
        method.modulator.predictor.weight.data[2] = torch.nan
        with pytest.raises(VesicleError, match="not finite"):
            engine.likeliest([(engine.fork(sequence), [IDS[20]])])
        engine._native = None
        with pytest.raises(VesicleError, match="levels of layer 2 are not finite"):
            engine.likeliest([(sequence, [IDS[20]])])
