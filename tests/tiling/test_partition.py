"""Tiles: aligned nodes of a tree of four, decided block by block."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesicle.tiling import LARGEST, SIZES, split_to_budget, tile_sizes

WANTED = st.lists(st.sampled_from(SIZES), max_size=300)


@given(WANTED, st.integers(0, 80))
def test_a_tile_is_an_aligned_node_whose_positions_all_allow_it(wanted: list[int], sinks: int):
    found = tile_sizes(wanted, sinks)
    allowed = np.array(wanted, int)
    allowed[:sinks] = 1
    position = 0
    while position < len(found):
        size = int(found[position])
        assert position % size == 0
        assert (found[position : position + size] == size).all()
        assert (allowed[position : position + size] >= size).all()
        parent = 4 * size
        first = position // parent * parent
        block = position // LARGEST * LARGEST
        if size < LARGEST and block + LARGEST <= len(found):  # as large as they allow
            assert (allowed[first : first + parent] < parent).any()
        position += size
    assert (found[len(found) // LARGEST * LARGEST :] == 1).all()


@given(WANTED, st.integers(0, 300))
def test_what_comes_later_changes_no_complete_block(wanted: list[int], stop: int):
    stop = min(stop, len(wanted)) // LARGEST * LARGEST
    assert (tile_sizes(wanted[:stop]) == tile_sizes(wanted)[:stop]).all()


def test_heads_are_tiled_each_by_itself():
    wanted = np.random.default_rng(0).choice(SIZES, (2, 3, 200))
    found = tile_sizes(wanted)
    for i in np.ndindex(2, 3):
        assert (found[i] == tile_sizes(wanted[i])).all()


@given(st.integers(1, 5), st.integers(0, 330), st.integers(0, 9))
def test_a_budget_is_kept_and_used(n_blocks: int, more: int, seed: int):
    importance = np.random.default_rng(seed).random(n_blocks * LARGEST)
    sizes = split_to_budget(importance, n_blocks + more)
    assert (tile_sizes(sizes, sinks=0) == sizes).all()  # whole nodes
    n_tiles = int((1 / sizes).sum().round())
    assert n_tiles <= n_blocks + more
    most = len(importance)
    assert n_tiles > n_blocks + more - 3 or n_tiles == most


def test_what_is_important_is_fine():
    importance = np.zeros(128)
    importance[77] = 1
    sizes = split_to_budget(importance, 2 + 9)
    assert sizes[77] == 1
    assert sizes[[64, 80, 100]].tolist() == [4, 16, 16]
    assert (sizes[:64] == 64).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="a tile of 8 positions; allowed: 1, 4, 16, 64"):
        tile_sizes([1, 8, 64])
    with pytest.raises(ValueError, match="100 positions; allowed: multiples of 64"):
        split_to_budget(np.zeros(100), 50)
    with pytest.raises(ValueError, match="1 tiles for 2 blocks; allowed: one for each, or more"):
        split_to_budget(np.zeros(128), 1)
