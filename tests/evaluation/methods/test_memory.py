"""Methods that hold a share of the cache, by name."""

import pytest

from tests.tiny import shape_of
from vesicle.errors import VesicleError
from vesicle.evaluation.methods.memory import (
    NAMES,
    holds_share,
    is_namm,
    memory_method,
    reading_method,
)
from vesicle.evaluation.methods.names import check_methods
from vesicle.eviction import HeavyHitters
from vesicle.namm import Namm, NammMemory
from vesicle.plan.spread import UNIT
from vesicle.reading import Reading


def test_every_name_is_a_method():
    for name in (*NAMES, "namm:x", "namm-protected:x"):
        assert holds_share(name)
    assert [name for name in NAMES if is_namm(name)] == ["namm", "namm-protected"]
    assert not holds_share("nammoth")
    assert isinstance(memory_method("heavy-hitters", 0.5, 200, 30), HeavyHitters)
    with pytest.raises(VesicleError, match="unknown method 'recency-protect'"):
        check_methods(["recency-protect"])


def test_a_share_of_the_prompt_is_read(llama):
    """The shipped profile is another model's, so that all heads read alike."""
    shape = shape_of(llama)
    for share, n_tokens, entries in ((0.25, 2048, 512), (0.25, 100, 128), (1.0, 300, 300)):
        method = reading_method(share, n_tokens, shape)
        assert isinstance(method, Reading)
        assert method.entries == entries
        assert {part for row in method.spread for part in row} == {UNIT}


@pytest.mark.parametrize("kind", ["namm", "recency"])
def test_a_preamble_is_protected_where_that_is_asked_for(kind: str):
    for name, n_preamble, spans in (
        (kind, 30, ()),
        (f"{kind}-protected", 30, ((0, 30),)),
        (f"{kind}-protected", 0, ()),
    ):
        method = memory_method(name, 0.5, 200, n_preamble)
        assert isinstance(method, NammMemory)
        assert (method.memory, method.protects) == (0.5, spans)


def test_a_folder_is_named_behind_it(tmp_path):
    Namm.fresh().save(tmp_path)
    for name in (f"namm:{tmp_path}", f"namm-protected:{tmp_path}"):
        assert check_methods([name]) == (name,)
        assert isinstance(memory_method(name, 0.5, 200, 30), NammMemory)
    for name in ("namm:nowhere", "namm-protected:nowhere"):
        with pytest.raises(VesicleError, match=r"nowhere holds no namm\.json"):
            check_methods([name])
