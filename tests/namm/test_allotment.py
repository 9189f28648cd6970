"""Parts of a memory that layers share."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vesicle.namm.allotment import allot

PROFILES = st.lists(st.floats(-6, 6), min_size=1, max_size=40)


@given(PROFILES, st.floats(0.01, 1), st.integers(16, 9000), st.integers(0, 200))
def test_whole_blocks_within_the_memory(profile, memory: float, length: int, least: int):
    counts = np.array(allot(np.array(profile), memory * length, length, least))
    most = -(-length // 16) * 16
    floor = min(most, -(-least // 16) * 16)
    assert (counts % 16 == 0).all()
    assert (counts >= floor).all()
    assert (counts <= most).all()
    budget = memory * length * len(profile)
    assert counts.sum() <= budget or (counts == floor).all()
    # Nothing is left over that a block would fit into.
    assert counts.sum() + 16 > budget or (counts >= length // 16 * 16).all()


@given(PROFILES, st.integers(160, 4096))
def test_more_for_who_has_the_larger_number(profile, length: int):
    counts = np.array(allot(np.array(profile), 0.25 * length, length, 0))
    order = np.argsort(profile)
    assert (np.diff(counts[order]) >= -16).all()


def test_a_flat_profile_is_even():
    counts = allot(np.zeros(30), 512, 2048, 68)
    assert set(counts) == {512}
    assert allot(np.zeros(3), 100, 100, 0) == [96, 96, 96]
