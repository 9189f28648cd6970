"""Attention over tiles: dense where nothing is lost, causal, and the same however it is cut."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vesicle.tiling import SIZES, tile_sizes, tiled_attention
from vesicle.tiling.attention import POOLINGS

H, G, T, K = 4, 2, 391, 8
SCALE = K**-0.5


def drawn(length: int = T, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((H, length, K), (G, length, K), (G, length, K))
    return tuple(torch.randn(s, dtype=torch.float64, generator=generator) for s in sizes)


def mixed(length: int = T, seed: int = 0) -> Any:
    """Tiles of all sizes, which differ between heads."""
    rng = np.random.default_rng(seed)
    wanted = rng.choice(SIZES[1:], (G, -(-length // 64))).repeat(64, -1)[:, :length]
    return tile_sizes(np.where(rng.random((G, length)) < 0.01, 1, wanted))


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, enable_gqa=True, scale=SCALE
    )[0]


def test_all_sizes_occur():
    assert set(np.unique(mixed())) == set(SIZES)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_tiles_of_one_are_dense_attention(pooling: str):
    q, k, v = drawn()
    found = tiled_attention(q, k, v, np.ones(T, np.int32), SCALE, pooling=pooling)
    torch.testing.assert_close(found.output, dense(q, k, v))
    assert found.read.tolist() == list(range(1, T + 1))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("recent", [1, 64, 100])
def test_equal_members_are_dense_attention_for_any_tiling(pooling: str, recent: int):
    q, k, v = drawn()
    sizes = mixed()
    for head in range(G):
        first = np.arange(T) - np.arange(T) % sizes[head]
        k[head], v[head] = k[head, first], v[head, first]
    found = tiled_attention(q, k, v, sizes, SCALE, pooling=pooling, recent=recent)
    torch.testing.assert_close(found.output, dense(q, k, v))
    assert found.read[-1] < 0.6 * T


def test_all_opened_is_dense_attention():
    q, k, v = drawn()
    found = tiled_attention(q, k, v, mixed(), SCALE, opened=T)
    torch.testing.assert_close(found.output, dense(q, k, v))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("opened", [0, 3])
@pytest.mark.parametrize("drops", [False, True])
def test_what_comes_later_changes_nothing(pooling: str, opened: int, drops: bool):
    """Neither its values nor that it is there: a text that is read in parts is the same text."""
    q, k, v = drawn()
    sizes = mixed()
    kwargs = {"pooling": pooling, "opened": opened, "drops": drops, "horizon": 50}
    whole = tiled_attention(q, k, v, sizes, SCALE, **kwargs)
    for stop in (1, 63, 128, 200, 256, 390):
        part = [x[:, :stop] for x in (q, k, v)]
        # What is complete then; the rest of `sizes` is not known yet.
        found = tiled_attention(*part, tile_sizes(sizes[:, :stop]), SCALE, **kwargs)
        torch.testing.assert_close(found.output, whole.output[:, :stop])
        torch.testing.assert_close(found.read, whole.read[:stop])
        other = [torch.cat([x[:, :stop], 9 * torch.ones_like(x[:, stop:])], 1) for x in (q, k, v)]
        changed = tiled_attention(*other, sizes, SCALE, **kwargs)
        torch.testing.assert_close(changed.output[:, :stop], whole.output[:, :stop])


def test_each_query_alone_by_the_definition():
    q, k, v = drawn()
    sizes, recent = mixed(), 70
    found = tiled_attention(q, k, v, sizes, SCALE, recent=recent, opened=2)
    for t in (0, 69, 133, 134, 250, 390):
        edge, reads = max(0, t + 1 - recent) // 64 * 64, []
        for head in range(G):
            tiles, p = [], 0
            while p < edge:
                tiles.append((p, int(sizes[head, p])))
                p += tiles[-1][1]
            single = [p for p, s in tiles if s == 1] + list(range(edge, t + 1))
            coarse = [(p, s) for p, s in tiles if s > 1]
            queries = q[head * 2 : head * 2 + 2, t]
            logit = [queries @ k[head, p : p + s].mean(0) * SCALE + np.log(s) for p, s in coarse]
            mass = torch.stack(logit, -1).softmax(-1).mean(0) if coarse else torch.zeros(0)
            best = set(mass.argsort(descending=True)[:2].tolist())
            for i in best:
                single += range(coarse[i][0], sum(coarse[i]))
            rest = [i for i in range(len(coarse)) if i not in best]
            means = [v[head, coarse[i][0] : sum(coarse[i])].mean(0) for i in rest]
            scores = torch.cat(
                [queries @ k[head, single].T * SCALE, *[logit[i][:, None] for i in rest]], -1
            )
            values = torch.cat([v[head, single], *[m[None] for m in means]])
            expected = scores.softmax(-1) @ values
            torch.testing.assert_close(found.output[head * 2 : head * 2 + 2, t], expected)
            reads.append(len(single) + len(coarse))
        assert found.read[t] == np.mean(reads)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_reach_everything(pooling: str):
    parts = [x.requires_grad_() for x in drawn(200)]
    out = tiled_attention(*parts, np.full(200, 16, np.int32), SCALE, pooling=pooling, opened=1)
    out.output[:, -1].square().sum().backward()
    for x in parts:
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
    assert parts[1].grad[:, :128].abs().sum(-1).all()  # tiled positions too


def test_what_is_refused():
    q, k, v = drawn(70)
    ones = np.ones(70, np.int32)
    with pytest.raises(ValueError, match="pooling is 'max'; allowed: mean, query"):
        tiled_attention(q, k, v, ones, SCALE, pooling="max")
    with pytest.raises(ValueError, match="opened is -1, recent 64, horizon 256; allowed"):
        tiled_attention(q, k, v, ones, SCALE, opened=-1)
    with pytest.raises(ValueError, match=r"sizes are \(69,\); allowed: \(70,\) or \(2, 70\)"):
        tiled_attention(q, k, v, ones[:69], SCALE)
