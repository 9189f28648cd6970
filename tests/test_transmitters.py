import pytest

from vesicle.effectors import EFFECTORS
from vesicle.transmitters import NAMES, REST, TRANSMITTERS, index


def test_five_in_a_fixed_order():
    assert NAMES == ("dopamine", "serotonin", "gaba", "acetylcholine", "noradrenaline")
    assert [index(name) for name in NAMES] == [0, 1, 2, 3, 4]
    assert all(t.name == name and t.sets and t.low for name, t in TRANSMITTERS.items())
    assert REST == 1.0


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"unknown transmitter 'adrenaline'; known: dopamine, ser"):
        index("adrenaline")


def test_effectors_belong_to_transmitters():
    assert {name: e.transmitter for name, e in EFFECTORS.items()} == {n: n for n in EFFECTORS}
    assert set(EFFECTORS) <= set(NAMES)
