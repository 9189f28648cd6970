"""Patterns: causal, dense where they see all, and the same however a text comes."""

from functools import partial

import pytest
import torch

from vesicle.predictors import MlpPredictor, PredictorConfig
from vesicle.scratch import DecoderSize, new_decoder
from vesicle.scratch.patterns import (
    Dense,
    Linear,
    Lsh,
    Selected,
    Sliding,
    Strided,
    Tiles,
    TilesState,
    patterned,
)
from vesicle.scratch.patterns.tiles import IMPORTANCES

LENGTH = 200
SIZE = DecoderSize(
    vocabulary=50, width=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn=48, context=256
)
TOKENS = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> MlpPredictor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = MlpPredictor(PredictorConfig(n_layers=2, width=32, transmitters=("acetylcholine",)))
        torch.nn.init.normal_(found.outer, std=8.0)
    return found


def tiles(importance: str = "learnt", budget: float = 0.5, **options):
    state = TilesState(network(), budget, surprise=torch.rand(2, LENGTH))
    return lambda layer: Tiles(layer, state, 32, 2, importance=importance, recent=16, **options)


MAKERS = {
    "dense": lambda layer: Dense(),
    "longformer": lambda layer: Sliding(20, 4),
    "block-sparse": lambda layer: Strided(16, 3),
    "reformer": lambda layer: Lsh(8, recent=4),
    "linear": lambda layer: Linear(),
    "quest": lambda layer: Selected("quest", opened=2, recent=16),
    "twilight": lambda layer: Selected("twilight", mass=0.5, recent=16),
    "multipole": lambda layer: Selected("multipole", opened=2, recent=16),
    "att": tiles(),
    **{f"att-{name}": tiles(name) for name in IMPORTANCES[1:]},
}
EXECUTED = ("dense", "longformer", "block-sparse", "reformer", "linear", "att", "att-fixed")


@torch.no_grad()
def logits(make, tokens=TOKENS):
    model = new_decoder(SIZE, 0).eval()
    patterns = patterned(model, make)
    return model(tokens).logits, patterns


@pytest.mark.parametrize("name", MAKERS)
def test_what_comes_later_changes_nothing(name):
    whole, _ = logits(MAKERS[name])
    other = TOKENS.clone()
    other[:, 150:] = 7
    changed, _ = logits(MAKERS[name], other)
    torch.testing.assert_close(changed[:, :150], whole[:, :150])
    assert (changed[:, 150:] - whole[:, 150:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "dense"])
def test_less_is_read_and_it_tells(name):
    dense, full = logits(MAKERS["dense"])
    found, patterns = logits(MAKERS[name])
    assert (found - dense).abs().max() > 1e-5
    assert all(0 < float(p.reads) < float(q.reads) for p, q in zip(patterns, full, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: Sliding(LENGTH),
        lambda layer: Strided(16, 16),
        lambda layer: Lsh(8, recent=LENGTH),
        lambda layer: Selected("quest", opened=LENGTH),
        lambda layer: Selected("twilight", mass=1.1),
        lambda layer: Selected("multipole", opened=LENGTH),
        tiles(budget=1.0),
        tiles("random", budget=1.0),
    ],
)
def test_where_all_is_seen_it_is_dense(make):
    dense, _ = logits(MAKERS["dense"])
    torch.testing.assert_close(logits(make)[0], dense, atol=1e-5, rtol=1e-5)


def test_the_decoder_itself_is_dense():
    with torch.no_grad():
        theirs = new_decoder(SIZE, 0).eval()(TOKENS).logits
    torch.testing.assert_close(logits(MAKERS["dense"])[0], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXECUTED)
@torch.no_grad()
def test_a_text_in_parts_is_the_same_text(name):
    whole, _ = logits(MAKERS[name], TOKENS[:1])
    model = new_decoder(SIZE, 0).eval()
    patterns = patterned(model, MAKERS[name])
    for pattern in patterns:
        pattern.begin()
    parts, first = [], 0
    for stop in (90, 91, 92, 180, LENGTH):
        places = torch.arange(first, stop)[None]
        parts.append(model(TOKENS[:1, first:stop], position_ids=places).logits)
        first = stop
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    full = 2 * 2 * LENGTH * 8 * 4
    held = [pattern.cache_bytes for pattern in patterns]
    assert all(0 < n < full if name.startswith("att") else n == full for n in held)
    for pattern in patterns:
        pattern.end()
    torch.testing.assert_close(model(TOKENS[:1]).logits, whole, atol=2e-5, rtol=1e-4)


def test_the_importance_network_learns_by_gradient():
    make = tiles()
    model = new_decoder(SIZE, 0)
    patterns = patterned(model, make)
    state = patterns[0].state
    state.temperature = 0.2
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    assert state.predictor.outer.grad.abs().sum() > 0
    assert patterns[0].pool.grad.abs().sum() > 0


@pytest.mark.parametrize("importance", ["norm", "received", "surprise", "random"])
def test_a_budget_is_kept_by_what_is_not_learnt(importance):
    shares = []
    for budget in (0.9, 0.6):
        _, patterns = logits(tiles(importance, budget))
        shares.append(sum(float(p.reads) for p in patterns) / 2 / ((LENGTH + 1) / 2))
        assert shares[-1] <= budget + 0.01
    assert shares[0] > shares[1]


def test_one_pattern_for_all_layers():
    make = tiles(one_pattern=True)
    _, patterns = logits(make)
    levels = patterns[0].state.levels
    assert len(levels) == 2
    assert levels[0] is levels[1]
    _, own = logits(tiles())
    assert (own[0].state.levels[0] != own[0].state.levels[1]).any()


def test_what_is_refused():
    for make, told in (
        (partial(Lsh, 3), "n_buckets is 3; allowed: even"),
        (partial(Selected, "best"), "rule is 'best'; allowed: quest"),
        (partial(Tiles, 0, TilesState(), 8, 1, importance="mood"), "importance is 'mood'"),
    ):
        with pytest.raises(ValueError, match=told):
            make()
