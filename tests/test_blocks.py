import numpy as np
import pytest
import torch
from torch import Tensor

from vesicle.blocks import estimate, rank_blocks, selected_blocks, summarise
from vesicle.effectors.gaba_sparsity import SUMMARIES

B, H, G, K, S = 2, 4, 2, 12, 70
SCALE = K**-0.5


def draw(seed: int, length: int = S) -> tuple[Tensor, Tensor]:
    """Queries (B, H, S, K) and keys (B, G, S, K)."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, H, length, K, generator=generator, dtype=torch.float64),
        torch.randn(B, G, length, K, generator=generator, dtype=torch.float64),
    )


def every_position(length: int = S) -> Tensor:
    return torch.arange(length).expand(B, length)


@pytest.fixture(params=SUMMARIES)
def summary(request: pytest.FixtureRequest) -> str:
    return request.param


def test_summaries_cover_complete_blocks_only(summary: str):
    vectors = {"mean": 1, "bounds": 2}[summary]
    for length, n in ((15, 0), (16, 1), (31, 1), (70, 4)):
        assert summarise(draw(0, length)[1], summary).shape == (B, G, n, vectors, K)


def test_by_hand():
    keys = torch.arange(32, dtype=torch.float64).reshape(32, 1)
    assert summarise(keys, "mean").flatten().tolist() == [7.5, 23.5]
    assert summarise(keys, "bounds").flatten().tolist() == [0, 15, 16, 31]


def test_first_and_own_come_first_and_later_last(summary: str):
    query, key = draw(1)
    rank = rank_blocks(query, summarise(key, summary), every_position(), SCALE)
    assert rank.shape == (B, S, G, 5)
    assert (rank.sort(-1).values == torch.arange(1, 6)).all()
    for t in range(S):
        own = t // 16
        assert (rank[:, t, :, 0] == 1).all()
        assert (rank[:, t, :, own] == (1 if own == 0 else 2)).all()
        assert (rank[:, t, :, own + 1 :] > own + 1).all()


def test_selected_blocks_are_as_many_as_asked_for(summary: str):
    query, key = draw(2)
    rank = rank_blocks(query, summarise(key, summary), every_position(), SCALE)
    visible = every_position() // 16 + 1
    for count in (visible, visible.clamp(max=2), (visible + 1) // 2):
        of_heads = count[..., None].expand(-1, -1, rank.shape[2])
        chosen = selected_blocks(rank, of_heads)
        assert (chosen.sum(-1) == of_heads).all()


def test_the_nearest_come_before_all_but_the_first_and_the_own(summary: str):
    query, key = draw(2)
    rank = rank_blocks(query, summarise(key, summary), every_position(), SCALE, nearest=3)
    for t in (40, 64, 69):
        own = t // 16
        near = rank[:, t, :, max(1, own - 2) : own]
        assert ((near > 2) & (near <= 2 + near.shape[-1])).all()


@pytest.mark.parametrize("t", [0, 16, 31, 40, 64])
def test_causal(summary: str, t: int):
    """Keys of later positions, also those of the query's own block, change no rank."""
    query, key = draw(3)
    other = key.clone()
    other[:, :, t + 1 :] += 10 * torch.randn_like(other[:, :, t + 1 :])
    ranks = [
        rank_blocks(query[:, :, : t + 1], summarise(k, summary), every_position(t + 1), SCALE)
        for k in (key, other)
    ]
    assert torch.equal(*ranks)
    alone = summarise(key[:, :, : t + 1], summary)
    assert torch.equal(
        rank_blocks(query[:, :, : t + 1], alone, every_position(t + 1), SCALE), ranks[0]
    )


def test_pieces_rank_as_the_whole(summary: str):
    query, key = draw(4)
    whole = rank_blocks(query, summarise(key, summary), every_position(), SCALE)
    for start, stop in ((0, 33), (33, 34), (34, 70)):
        piece = rank_blocks(
            query[:, :, start:stop],
            summarise(key[:, :, :stop], summary),
            every_position()[:, start:stop],
            SCALE,
        )
        n, own = piece.shape[-1], every_position()[:, start:stop, None, None] // 16
        seen = (torch.arange(n) <= own).expand_as(piece)
        assert torch.equal(piece[seen], whole[:, start:stop, :, :n][seen])


def test_the_heaviest_block_is_read_third(summary: str):
    query, key = draw(5)
    direction = torch.zeros(K, dtype=torch.float64)
    direction[0] = 8.0
    key[:, :, 32:48] = direction
    query[..., -1, :] = direction
    rank = rank_blocks(query, summarise(key, summary), every_position(), SCALE)
    assert (rank[:, -1, :, 2] == 3).all()


def test_mean_of_identical_keys_is_exact():
    query, key = draw(6)
    key = key[:, :, ::16].repeat_interleave(16, dim=2)[:, :, :64]
    logits = estimate(query.reshape(B, G, 2, S, K), summarise(key, "mean"), SCALE)
    exact = query.reshape(B, G, 2, S, K) @ key[:, :, None, ::16].transpose(-1, -2) * SCALE
    torch.testing.assert_close(logits, exact, rtol=0, atol=1e-12)


def test_bounds_are_an_upper_bound():
    query, key = draw(7)
    grouped = query.reshape(B, G, 2, S, K)
    logits = estimate(grouped, summarise(key, "bounds"), SCALE)
    exact = grouped @ key[:, :, None, :64].transpose(-1, -2) * SCALE  # (B, G, 2, S, 64)
    highest = exact.unflatten(-1, (4, 16)).amax(-1)
    assert (logits >= highest - 1e-12).all()
    assert (logits > highest + 1e-3).any()
    by_hand = torch.maximum(
        grouped[..., None, :] * summarise(key, "bounds")[:, :, None, None, :, 0],
        grouped[..., None, :] * summarise(key, "bounds")[:, :, None, None, :, 1],
    ).sum(-1)
    torch.testing.assert_close(logits, by_hand * SCALE, rtol=0, atol=1e-12)


def test_sequences_of_a_batch_do_not_meet(summary: str):
    query, key = draw(8)
    positions = torch.stack([torch.arange(20), torch.arange(50, 70)])
    both = rank_blocks(query[:, :, :20], summarise(key, summary), positions, SCALE)
    for b in range(B):
        alone = rank_blocks(
            query[b : b + 1, :, :20],
            summarise(key[b : b + 1], summary),
            positions[b : b + 1],
            SCALE,
        )
        for i, p in enumerate(positions[b].tolist()):
            n = p // 16 + 1
            np.testing.assert_array_equal(both[b, i, :, :n], alone[0, i, :, :n])
