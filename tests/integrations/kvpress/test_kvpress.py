"""The real kvpress on the default model; see docs/kvpress.md for the environment that it needs.

For each press: the positions found are those of the cache that kvpress itself leaves, the engine
goes on from them as transformers goes on from that cache, and the memory is free.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.default_prompts import PROMPTS
from vesicle.errors import VesicleError
from vesicle.families import cache_argument
from vesicle.integrations.kvpress import kept_by, make_press, press_method, press_names

pytestmark = [pytest.mark.kvpress, pytest.mark.model, pytest.mark.filterwarnings("default")]

N_CONTEXT, N_KEPT = 320, 160
"""Both multiples of 16, so that nothing is rounded."""
UNIFORM = (
    "Block(Knorm)",
    "Cap",
    "Chunk(Knorm)",
    "ChunkKV(Knorm)",
    "Compactor",
    "CriticalKV(Knorm)",
    "CUR",
    "EntropyGatedChunkKV(Knorm)",
    "ExpectedAttention",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "LeverageScore",
    "NonCausalAttn",
    "ObservedAttention",
    "Random",
    "Random(seed=3)",
    "SnapKV",
    "SnapKV(window_size=32)",
    "StreamingLLM",
    "TOVA",
)
"""Presses that keep as many entries in every layer and head."""
UNEVEN = ("KVCompose", "PyramidKV")
"""Presses that keep more in some layers."""
MARKING = ("AdaKV(Knorm)", "CriticalAdaKV(Knorm)", "KVgrad", "KVzip")
"""Presses that mark entries, more of some heads, and leave the cache whole."""
LOGITS_TOLERANCE = 5e-3
"""On logits of up to about 30, fp32: sums in another order, through 30 layers."""
SEED = 5


@pytest.fixture(scope="module")
def default() -> Any:
    from transformers import AutoModelForCausalLM

    from vesicle.engine import Engine
    from vesicle.models import Text, ensure_default_model

    folder = ensure_default_model(progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = Text.from_folder(folder)
    ids = text.encode(" ".join(PROMPTS * 2))[: N_CONTEXT + 8]
    assert len(ids) == N_CONTEXT + 8
    return model, Engine.from_pretrained(folder, weights="fp32"), ids


def build(name: str) -> Any:
    """The press `name`; all names here are also those that the package finds."""
    return make_press(name, 1 - N_KEPT / N_CONTEXT)


def prefill(model: Any, ids: list[int], press: Any) -> Any:
    """The cache that kvpress leaves, without any of our code."""
    from transformers import DynamicCache

    cache, before = DynamicCache(), model.config._attn_implementation
    if type(press).__name__ == "ObservedAttentionPress":
        model.set_attn_implementation("eager")
    torch.manual_seed(SEED)
    with torch.no_grad(), press(model):
        model.model(input_ids=torch.tensor([ids]), **cache_argument(model, cache))
    model.set_attn_implementation(before)
    return cache


def dense_cache(model: Any, ids: list[int], *, eager: bool) -> Any:
    from transformers import DynamicCache

    cache, before = DynamicCache(), model.config._attn_implementation
    model.set_attn_implementation("eager" if eager else before)
    with torch.no_grad():
        model.model(input_ids=torch.tensor([ids]), **cache_argument(model, cache))
    model.set_attn_implementation(before)
    return cache


def in_order(rows: Tensor) -> Any:
    """Rows (n, K) in an order of their own."""
    array = rows.numpy()
    return array[np.lexsort(array.T)]


def hugging_face(model: Any, cache: Any, ids: list[int], new: int) -> tuple[list[int], Tensor]:
    """Greedy tokens and logits after `ids`, on a cache that was shortened, one token at a time."""
    found, logits, position = list[int](), list[Tensor](), N_CONTEXT
    queue = list(ids)
    while len(found) < new:
        token = queue.pop(0) if queue else found[-1]
        with torch.no_grad():
            out = model(
                torch.tensor([[token]]),
                position_ids=torch.tensor([[position]]),
                **cache_argument(model, cache),
            ).logits[0, -1]
        position += 1
        if not queue:
            logits.append(out)
            found.append(int(out.argmax()))
    return found, torch.stack(logits)


@pytest.mark.parametrize("name", [*UNIFORM, *UNEVEN])
def test_positions_are_those_of_the_cache_that_kvpress_leaves(default: Any, name: str):
    model, _, ids = default
    context = ids[:N_CONTEXT]
    kept = kept_by(build(name), model, context, seed=SEED)
    cache = prefill(model, context, build(name))
    dense = dense_cache(model, context, eager=name in ("ObservedAttention", "KVCompose"))
    for layer, heads in enumerate(kept):
        left, whole = cache.layers[layer], dense.layers[layer]
        for head, positions in enumerate(heads):
            assert np.array_equal(
                in_order(whole.keys[0, head][positions]), in_order(left.keys[0, head])
            )
            assert np.array_equal(
                in_order(whole.values[0, head][positions]), in_order(left.values[0, head])
            )
    counts = {len(head) for heads in kept for head in heads}
    assert (counts == {N_KEPT}) == (name in UNIFORM)


@pytest.mark.parametrize("name", MARKING)
def test_marked_entries_are_left_out(default: Any, name: str):
    model, _, ids = default
    context = ids[:N_CONTEXT]
    kept = kept_by(build(name), model, context, seed=SEED)
    prefill(model, context, build(name))
    for layer, heads in zip(model.model.layers, kept, strict=True):
        _, marked, places = layer.self_attn.masked_key_indices
        for head, positions in enumerate(heads):
            unseen = set(places[marked == head].tolist())
            assert positions.tolist() == sorted(set(range(N_CONTEXT)) - unseen)
        layer.self_attn.masked_key_indices = None
    share = np.mean([len(head) for heads in kept for head in heads]) / N_CONTEXT
    assert share == pytest.approx(N_KEPT / N_CONTEXT, abs=0.02)


@pytest.mark.parametrize("name", UNIFORM)
def test_the_engine_goes_on_as_transformers_does_and_the_memory_is_free(default: Any, name: str):
    model, engine, ids = default
    context, question = ids[:N_CONTEXT], ids[N_CONTEXT:]
    expected, logits = hugging_face(model, prefill(model, context, build(name)), question, 24)

    method = press_method(build(name), model, context, seed=SEED)
    sequence = engine.start(method)
    engine.forward([(sequence, context)], "none")
    assert sequence.cost.kv_bytes_held * N_CONTEXT == N_KEPT * dense_bytes(engine, N_CONTEXT)
    assert sequence.cache.bytes_allocated == sequence.cost.kv_bytes_held
    assert engine.pool.bytes_in_use == sequence.cost.kv_bytes_held
    found, steps = [], question
    for expected_logits in logits:
        out = engine.forward([(sequence, steps)], "last")[0][-1]
        assert (out - expected_logits).abs().max() < LOGITS_TOLERANCE
        found.append(int(out.argmax()))
        steps = found[-1:]
    assert found == expected
    sequence.close()
    assert engine.pool.bytes_in_use == 0


def dense_bytes(engine: Any, n_tokens: int) -> int:
    shape = engine.shape
    return 2 * n_tokens * shape.n_layers * shape.n_kv_heads * shape.head_size * 4  # fp32


def test_forgetting_is_seen_in_the_answer(default: Any):
    """So that the test above could fail: the dense model's logits are elsewhere."""
    model, engine, ids = default
    context, question = ids[:N_CONTEXT], ids[N_CONTEXT:]
    _, logits = hugging_face(model, prefill(model, context, build("StreamingLLM")), question, 1)
    out = engine.forward([(engine.start(), ids)], "last")[0][-1]
    assert (out - logits[0]).abs().max() > 100 * LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("KeyRerotation(Knorm)", "changes keys"),
        ("Merging(Knorm)", "changes values"),
        ("Finch", "FinchPress failed on this model: ValueError: No delimiter"),
        ("LUKV(Knorm)", "LUKVPress failed on this model"),
        ("FastKVzip", "FastKVzipPress failed on this model"),
    ],
)
def test_refused_when_they_run(default: Any, name: str, says: str):
    model, _, ids = default
    with pytest.raises(VesicleError, match=says):
        kept_by(build(name), model, ids[:N_CONTEXT])


@pytest.mark.parametrize("name", ["ThinK", "DMS(Knorm)", "SimLayerKV", "DuoAttention"])
def test_refused_for_want_of_a_ratio(name: str):
    with pytest.raises(VesicleError, match="takes no compression ratio"):
        build(name)


def test_presses_built_by_hand(default: Any):
    import kvpress

    model, _, ids = default
    context = ids[:N_CONTEXT]
    half, third = kvpress.KnormPress(0.5), kvpress.SnapKVPress(1 / 4)
    composed = kept_by(kvpress.ComposedPress([third, half]), model, context)
    assert {len(head) for heads in composed for head in heads} == {120}
    ratios = [0.5 if layer % 2 else 0.25 for layer in range(30)]
    layers = kept_by(kvpress.PerLayerCompressionPress(half, ratios), model, context)
    assert [len(heads[0]) for heads in layers] == [160 if layer % 2 else 240 for layer in range(30)]
    lazy = kvpress.SimLayerKVPress(lazy_threshold=0.2, n_recent=64)
    assert {len(heads[0]) for heads in kept_by(lazy, model, context)} == {67}
    dms = kept_by(kvpress.DMSPress(half, threshold=-1e9), model, context)
    assert {len(head) for heads in dms for head in heads} == {N_CONTEXT}
    finch = kvpress.FinchPress(0.5, rerotate_keys=False)
    finch.delimiter_token_id, context[200] = 0, 0
    with pytest.raises(VesicleError, match="FinchPress made 319 entries of 320 tokens"):
        kept_by(finch, model, context)
    with pytest.raises(VesicleError, match="changes keys"):
        kept_by(kvpress.ThinKPress(0.5), model, context)
    with pytest.raises(VesicleError, match="while tokens are generated"):
        kept_by(kvpress.DecodingPress(half), model, context)


def test_every_name_builds():
    names = press_names()
    assert {"SnapKV", "StreamingLLM", "Knorm", "TOVA", "ObservedAttention"} <= set(names)
    for name in names:
        assert type(build(name)).__name__ == f"{name}Press"
