"""Decisions by hand, and shares that agree with them."""

import numpy as np
import pytest
import torch

from tests.effectors.asking import decided
from tests.effectors.test_effectors import read_channels
from vesicle.effectors import DopaminePrecision, GabaSparsity, SerotoninDepth

LADDER = ((0.9, 16), (0.7, 8), (0.5, 4), (0.3, 3), (0.0, 2))


def test_channels():
    effector = DopaminePrecision(site_rates=(1.0, 0.5, 2.0, 0.0), floor=0.1)
    level = np.array([1.0, 0.99, 0.5, 0.0])
    assert read_channels(effector, level, 0, 48).tolist() == [48, 48, 24, 5]
    assert read_channels(effector, level, 1, 48).tolist() == [48, 48, 36, 24]
    assert read_channels(effector, level, 2, 48).tolist() == [48, 48, 5, 5]
    assert read_channels(effector, level, 3, 48).tolist() == [48, 48, 48, 48]


@pytest.mark.parametrize("width", [48, 80, 576, 1536])
def test_a_level_of_k_in_c_reads_k_channels(width: int):
    every = np.arange(1, width + 1)
    effector = DopaminePrecision(site_rates=(1.0, 1.0, 1.0, 1.0), floor=1e-4)
    assert (read_channels(effector, every / width, 0, width) == every).all()


def test_bits():
    effector = DopaminePrecision(bits_ladder=LADDER)
    level = np.array([1.0, 0.9, 0.89, 0.7, 0.5, 0.31, 0.3, 0.1, 0.0])
    assert decided(effector, level, "bits").tolist() == [16, 16, 8, 8, 4, 3, 3, 2, 2]
    four = DopaminePrecision(bits_ladder=((0.0, 4),))
    assert decided(four, np.array([1.0, 0.99]), "bits").tolist() == [16, 4]
    assert decided(DopaminePrecision(), level, "bits").tolist() == [16] * 9


def test_head():
    level = np.array([1.0, 0.9, 0.5, 0.0])
    assert decided(DopaminePrecision(), level, "head").tolist() == [0, 0, 0, 0]
    assert decided(DopaminePrecision(head_survivors=8), level, "head").tolist() == [0, 8, 8, 8]
    effector = DopaminePrecision(head_survivors=200, head_below=0.9)
    assert decided(effector, level, "head").tolist() == [0, 0, 97, 97]


def test_module_and_run():
    effector = SerotoninDepth(ffn_below=0.6, attention_below=0.4, bypass_below=0.2)
    level = np.array([1.0, 0.6, 0.59, 0.4, 0.39, 0.2, 0.19, 0.0])
    assert decided(effector, level, "ffn").tolist() == [2, 2, 1, 1, 1, 1, 0, 0]
    assert decided(effector, level, "attention").tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_blocks():
    effector = GabaSparsity(least=3)
    visible = np.array([1, 2, 3, 10, 10, 10, 10], np.int32)
    level = np.array([0.0, 0.0, 0.0, 0.0, 0.3, 0.31, 1.0])
    assert decided(effector, level, "kv_blocks", visible=visible).tolist() == [1, 2, 3, 3, 3, 4, 10]
    assert (effector.vectors, GabaSparsity(summary="bounds").vectors) == (1, 2)


def test_soft_amounts_round_up_to_the_decision():
    level = np.random.default_rng(0).uniform(0, 1, 200)
    soft_level, visible = torch.from_numpy(level), np.full(200, 9, np.int32)
    dopamine = DopaminePrecision(site_rates=(0.5, 1.0, 2.0, 1.0))
    for site in range(4):
        share = dopamine.share(soft_level, site).numpy()
        assert (np.ceil(share * 80 - 1e-9) == read_channels(dopamine, level, site)).all()
    gaba = GabaSparsity(least=2)
    count = gaba.count(soft_level, torch.from_numpy(visible).double()).numpy()
    assert (np.ceil(count - 1e-9) == decided(gaba, level, "kv_blocks", visible=visible)).all()


def test_ties_go_to_the_lower_channels():
    """Query heads that share a KV head are equal at the first token, so ties do happen."""
    effector = DopaminePrecision(site_rates=(1.0, 1.0, 1.0, 1.0))
    magnitude = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]]])
    for kept, channels in ((2, [0, 2]), (3, [0, 2, 3]), (4, [0, 2, 3, 4]), (5, [0, 1, 2, 3, 4])):
        mask = effector.mask(torch.tensor([[kept / 6]]), 0, magnitude, 0.0)
        assert mask[0, 0].nonzero().flatten().tolist() == channels
