"""Soft tiles: hard ones at temperature 0, dense at rest, and the executed cache gives the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from vesicle.tiling import SIZES, tile_sizes, tiled_attention
from vesicle.tiling.cache import TileCache
from vesicle.tiling.soft import soft_tiled_attention, thresholds, tile_weights, wanted_sizes

B, H, G, T, K = 2, 4, 2, 391, 8
SCALE = K**-0.5
SETS = [SIZES, (1, 16), (1, 4, 64)]


def drawn(length: int = T, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, H, length, K), (B, G, length, K), (B, G, length, K))
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in sizes]


def levels(length: int = T, seed: int = 0) -> torch.Tensor:
    """Alike inside blocks, so that large tiles stand, but for some positions."""
    rng = np.random.default_rng(seed)
    level = rng.random((B, -(-length // 64))).repeat(64, -1)[:, :length]
    return torch.from_numpy(np.where(rng.random((B, length)) < 0.01, 1.0, level))


@pytest.mark.parametrize("sizes", SETS)
def test_at_temperature_0_it_is_tiled_attention(sizes):
    q, k, v = drawn()
    level = levels()
    found = soft_tiled_attention(q, k, v, level, SCALE, sizes=sizes)
    tiled = tile_sizes(wanted_sizes(level, sizes).numpy(), sizes=sizes)
    assert set(np.unique(tiled)) == set(sizes)
    for b, tiles in enumerate(tiled):
        hard = tiled_attention(q[b], k[b], v[b], tiles, SCALE)
        torch.testing.assert_close(found.output[b], hard.output)
        torch.testing.assert_close(found.reads[b], hard.read)


@pytest.mark.parametrize("temperature", [0.0, 0.05, 0.5])
def test_at_rest_it_is_dense_attention(temperature):
    q, k, v = drawn()
    ones = torch.ones(B, T, dtype=torch.float64)
    found = soft_tiled_attention(q, k, v, ones, SCALE, temperature=temperature)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=SCALE)
    torch.testing.assert_close(found.output, dense, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.reads[0], torch.arange(1.0, T + 1, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.05, 0.3])
def test_equal_members_are_dense_attention_however_soft(temperature):
    q, k, v = drawn(256)
    first = np.arange(256) - np.arange(256) % 64
    k, v = k[:, :, first], v[:, :, first]
    pool = torch.randn(B, G, 256, dtype=torch.float64)
    found = soft_tiled_attention(q, k, v, levels(256), SCALE, temperature=temperature, pool=pool)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=SCALE)
    torch.testing.assert_close(found.output, dense, atol=2e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.2]), st.sampled_from(SETS))
def test_every_position_is_covered_once(seed, temperature, sizes):
    level = torch.rand(1, 150, generator=torch.Generator().manual_seed(seed)).double()
    weights = tile_weights(level, sizes, temperature)
    total = weights[0].clone()
    for size, weight in zip(sizes[1:], weights[1:], strict=True):
        total[:, :128] += weight.repeat_interleave(size, 1)
        assert (weight >= 0).all()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_falling_temperature_tends_to_the_hard_tiles():
    q, k, v = drawn()
    level = levels()
    hard = soft_tiled_attention(q, k, v, level, SCALE).output
    gaps = [
        (soft_tiled_attention(q, k, v, level, SCALE, temperature=t).output - hard).abs().mean()
        for t in (0.3, 0.03, 0.003)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.1 * gaps[0]


def test_gradients_reach_the_levels_and_price_and_loss_pull_apart():
    q, k, v = drawn()
    level = torch.full((B, T), 0.5, dtype=torch.float64, requires_grad=True)
    found = soft_tiled_attention(q, k, v, level, SCALE, temperature=0.1)
    found.reads.sum().backward()
    tiled = level.grad[:, 16:320]
    assert (tiled >= 0).all(), "more level, more reads"
    assert (tiled > 0).any()
    assert (level.grad[:, 384:] == 0).all(), "the incomplete block is not tiled"


def test_what_comes_later_changes_nothing():
    q, k, v = drawn()
    level = levels()
    whole = soft_tiled_attention(q, k, v, level, SCALE, temperature=0.1)
    for stop in (63, 200, 390):
        part = [x[:, :, :stop] for x in (q, k, v)]
        found = soft_tiled_attention(*part, level[:, :stop], SCALE, temperature=0.1)
        torch.testing.assert_close(found.output, whole.output[:, :, :stop])
        torch.testing.assert_close(found.reads, whole.reads[:, :stop])


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, T - 1), max_size=5),
    recent=st.sampled_from([1, 32, 64, 100]),
    pooled=st.booleans(),
    sizes=st.sampled_from(SETS),
)
def test_the_cache_gives_the_same_however_the_text_comes(cuts, recent, pooled, sizes):
    q, k, v = (x[0] for x in drawn())
    level = levels()[0]
    pool = torch.randn(G, T, dtype=torch.float64) if pooled else None
    whole = soft_tiled_attention(
        q[None],
        k[None],
        v[None],
        level[None],
        SCALE,
        sizes=sizes,
        recent=recent,
        pool=None if pool is None else pool[None],
    )
    cache = TileCache(G, K, sizes=sizes, recent=recent, dtype=torch.float64)
    outs = []
    for first, stop in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), T], strict=True):
        s = slice(first, stop)
        share = None if pool is None else pool[:, s]
        outs.append(cache.extend(q[:, s], k[:, s], v[:, s], level[s], SCALE, share))
    torch.testing.assert_close(torch.cat(outs, 1), whole.output[0])
    assert cache.length == T
    assert cache.held == whole.reads[0, -1]


def test_one_by_one_is_the_same_too():
    q, k, v = (x[0] for x in drawn(200))
    level = levels(200)[0]
    whole = TileCache(G, K, dtype=torch.float64).extend(q, k, v, level, SCALE)
    cache = TileCache(G, K, dtype=torch.float64)
    parts = [
        cache.extend(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], level[t : t + 1], SCALE)
        for t in range(200)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_what_is_refused():
    assert thresholds() == [0.75, 0.5, 0.25]
    for sizes in ((1,), (4, 16), (1, 8), (1, 64, 4)):
        with pytest.raises(ValueError, match="allowed: 1 and some of"):
            thresholds(sizes)
