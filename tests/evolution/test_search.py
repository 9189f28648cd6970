"""Candidates follow from the seed and from what was told."""

import numpy as np
import pytest

from tests.engine.test_pool import SHAPE
from vesicle.evolution.config import EvolveConfig
from vesicle.evolution.search import Search
from vesicle.namm import Namm, NammSettings


def start(network: str = "linear") -> Namm:
    return Namm.fresh(NammSettings(network=network, hidden=4), SHAPE)


@pytest.mark.parametrize("evolves", ["profile", "network", "both"])
@pytest.mark.parametrize("network", ["linear", "bam"])
def test_goes_where_losses_are_less(evolves: str, network: str):
    config = EvolveConfig(evolves=evolves, population=12, sigma=0.5)
    search, target = Search(start(network), config), 1.0

    def loss(namm: Namm) -> float:
        both = {"network": namm.parameters, "profile": namm.profile}
        numbers = np.concatenate([v.ravel() for k, v in both.items() if evolves in (k, "both")])
        return float(((numbers - target) ** 2).sum())

    first = loss(search.mean)
    for _ in range(60):
        search.tell([loss(namm) for namm in search.ask()])
    assert loss(search.mean) < 0.9 * first
    assert (search.mean.profile == 0).all() == (evolves == "network")
    assert (search.mean.parameters == 0).all() == (evolves == "profile")


def test_told_the_same_it_asks_the_same():
    config = EvolveConfig(population=6, seed=3)
    a, b = Search(start(), config), Search(start(), config)
    for losses in np.random.default_rng(0).random((4, 6)):
        for one, other in zip(a.ask(), b.ask(), strict=True):
            assert (one.parameters == other.parameters).all()
            assert (one.profile == other.profile).all()
        a.tell(losses.tolist())
        b.tell(losses.tolist())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"evolves": "all"}, "evolves is 'all'; allowed: profile, network, both"),
        ({"memory": (1.0,)}, r"memory is \[1.0\]; allowed: between 0 and 1"),
        ({"population": 2}, "population is 2; allowed: 4 and above"),
        ({"sigma": 0}, "sigma is 0; allowed: above 0"),
    ],
)
def test_settings_name_what_is_wrong(what: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        EvolveConfig(**what)
