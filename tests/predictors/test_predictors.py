"""Every registered predictor and control."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import TRANSMITTERS, tiny_control, tiny_predictor
from vesicle.predictors import (
    CONTROLS,
    PREDICTORS,
    Levels,
    Predictor,
    PredictorConfig,
    RandomLevels,
    ShuffledLevels,
    spread_seed,
)
from vesicle.predictors.fixed import _uniform
from vesicle.transmitters import NAMES

B, T, L, D = 2, 150, 3, 48
CONFIG = PredictorConfig(n_layers=L, width=D, transmitters=TRANSMITTERS, hidden=6)


def hidden(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(L, B, T, D, generator=generator, dtype=torch.float64)


def dial(value: float) -> Tensor:
    return torch.full((B,), value)


def released(levels: Levels, x: Tensor, value: float = 0.6, cuts: tuple[int, ...] = ()) -> Tensor:
    """Levels (B, T, L, A) of hidden states (L, B, T, D), taken in the pieces that `cuts` leave."""
    state: dict[int, Tensor] = {}
    pieces = []
    n = x.shape[2]
    for start, stop in zip((0, *cuts), (*cuts, n), strict=True):
        positions = torch.arange(start, stop, dtype=torch.int32).expand(B, -1)
        layers = [
            levels.release(layer, x[layer, :, start:stop], positions, dial(value), state)
            for layer in range(L)
        ]
        pieces.append(torch.stack(layers, dim=2))
    return torch.cat(pieces, dim=1)


@pytest.fixture(params=list(PREDICTORS))
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return tiny_predictor(request.param)


@pytest.fixture(params=[*PREDICTORS, *CONTROLS])
def levels(request: pytest.FixtureRequest) -> Levels:
    """Predictors and controls alike."""
    if request.param in PREDICTORS:
        return tiny_predictor(request.param)
    return tiny_control(request.param, CONFIG)


def test_registries_name_their_classes():
    assert {name: kind.kind for name, kind in (PREDICTORS | CONTROLS).items()} == {
        name: name for name in PREDICTORS | CONTROLS
    }


def test_levels_are_levels(levels: Levels):
    values = released(levels, hidden())
    assert values.shape == (B, T, L, 3)
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize(
    "cuts", [(1,), (64,), (17, 40, 129), tuple(range(1, T))], ids=["1", "64", "mixed", "each"]
)
def test_pieces_agree_with_the_whole(levels: Levels, cuts: tuple[int, ...]):
    x = hidden()
    torch.testing.assert_close(
        released(levels, x, cuts=cuts), released(levels, x), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("value", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_row_is_one_token(levels: Levels, dtype: torch.dtype, value: float):
    x, levels = hidden().to(dtype), levels.to(dtype)
    row_state: dict[int, Tensor] = {}
    whole = released(levels, x, value)
    for t in range(20):
        for layer in range(L):
            row = levels.release_row(layer, x[layer, 0, t], t, value, row_state)
            assert row.shape == (3,)
            np.testing.assert_allclose(row, whole[0, t, layer].detach(), rtol=0, atol=1e-6)
            assert value < 1 or not isinstance(levels, Predictor) or (row == 1).all()


@pytest.mark.parametrize("t", [0, 63, 64, 100])
def test_causal(levels: Levels, t: int):
    x = hidden()
    other = x.clone()
    other[:, :, t + 1 :] = hidden(1)[:, :, t + 1 :]
    assert torch.equal(released(levels, x)[:, : t + 1], released(levels, other)[:, : t + 1])


def test_sequences_of_a_batch_do_not_meet(levels: Levels):
    x = hidden()
    other = x.clone()
    other[:, 1] = hidden(1)[:, 1]
    assert torch.equal(released(levels, x)[0], released(levels, other)[0])


def test_predictors_read_the_hidden_state_and_controls_do_not(levels: Levels):
    same = torch.equal(released(levels, hidden()), released(levels, hidden(1)))
    assert same == (not isinstance(levels, Predictor))


def test_dial_one_is_rest_whatever_was_learnt(predictor: Predictor):
    assert (released(predictor, hidden(), 1.0) == 1).all()
    assert (released(predictor.float(), 1000 * hidden(), 1.0) == 1).all()


@pytest.mark.parametrize("kind", list(PREDICTORS))
@pytest.mark.parametrize("value", [0.05, 0.3, 0.8, 0.99])
def test_an_untrained_predictor_releases_the_dial(kind: str, value: float):
    values = released(PREDICTORS[kind](CONFIG).double(), hidden(), value)
    torch.testing.assert_close(values, torch.full_like(values, value), rtol=0, atol=1e-6)


def test_levels_rise_with_the_dial(predictor: Predictor):
    at = [released(predictor, hidden(), value) for value in (0.1, 0.4, 0.7, 0.95, 1.0)]
    for low, high in pairwise(at):
        assert (low < high).all()


def test_each_sequence_has_its_own_dial(predictor: Predictor):
    positions = torch.arange(T).expand(B, T)
    x = hidden()[0]
    mixed = predictor.release(0, x, positions, torch.tensor([0.3, 0.8]), {})
    for row, value in enumerate((0.3, 0.8)):
        alone = predictor.release(0, x, positions, dial(value), {})
        assert torch.equal(mixed[row], alone[row])


def test_levels_vary(predictor: Predictor):
    values = released(predictor, hidden())
    assert (values.std(dim=1) > 0.02).all()  # over time, in each layer and transmitter
    assert values.min() < 0.4
    assert values.max() > 0.8


def test_scale_of_the_hidden_state_does_not_matter(predictor: Predictor):
    # Up to the norm's epsilon, 1e-6 beside a variance of about 9.
    torch.testing.assert_close(
        released(predictor, hidden()), released(predictor, 50 * hidden()), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("value", [0.05, 0.6, 1.0])
def test_gradients_are_finite(predictor: Predictor, value: float):
    (released(predictor, hidden(), value) ** 2).sum().backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert value == 1 or (parameter.grad != 0).any(), name


def test_recurrence_carries_over_many_tokens():
    predictor = tiny_predictor("recurrent")
    x = hidden()
    other = x.clone()
    other[:, :, 0] = hidden(1)[:, :, 0]
    difference = (released(predictor, x) - released(predictor, other)).abs().amax((0, 2, 3))
    assert (difference[1:] > 0).all()
    assert difference[100:].max() < difference[:5].max()


def test_counted_work(levels: Levels):
    if isinstance(levels, Predictor):
        assert levels.flops >= 2 * D * 3
        assert levels.weights_read == sum(p.numel() for p in levels.parameters()) // L
    else:
        assert levels.flops == levels.weights_read == 0


@pytest.mark.parametrize("transmitters", [("gaba",), ("serotonin", "dopamine"), NAMES])
@pytest.mark.parametrize("kind", list(PREDICTORS))
def test_any_transmitters(kind: str, transmitters: tuple[str, ...]):
    predictor = tiny_predictor(kind, transmitters=transmitters)
    assert released(predictor, hidden()).shape[-1] == len(transmitters)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="unknown transmitter 'x'"):
        PredictorConfig(n_layers=1, width=4, transmitters=("x",))
    with pytest.raises(ValueError, match="transmitters is empty"):
        PredictorConfig(n_layers=1, width=4, transmitters=())
    with pytest.raises(ValueError, match="hidden is 0; allowed: 1 and above"):
        PredictorConfig(n_layers=1, width=4, transmitters=("gaba",), hidden=0)


def test_constant_takes_a_number_a_row_or_a_table():
    for given in (0.4, [0.2, 0.4, 0.6], np.linspace(0, 1, 9).reshape(3, 3)):
        values = released(CONTROLS["constant"](CONFIG, given), hidden())
        expected = np.broadcast_to(np.asarray(given), (B, T, L, 3))
        np.testing.assert_array_equal(values.numpy(), expected)


@pytest.mark.parametrize("kind", ["constant", "random"])
def test_tables_stay_within_levels(kind: str):
    settings = {"seed": 1} if kind == "random" else {}
    with pytest.raises(ValueError, match=r"levels run from 0.5 to 1.2; allowed: 0 to 1"):
        CONTROLS[kind](CONFIG, [0.5, 1.2, 0.7], **settings)


def many(seed: int) -> Tensor:
    """Random levels (4000, L, A) around (0.6, 0.75, 0.9)."""
    control = CONTROLS["random"](CONFIG, [0.6, 0.75, 0.9], seed=seed)
    positions = torch.arange(4000)[None]
    x = torch.zeros(1, 4000, D)
    return torch.cat([control.release(l, x, positions, dial(0.5), {}) for l in range(L)]).transpose(
        0, 1
    )


def test_random_has_the_tables_mean_and_is_reproducible():
    values = many(5)
    assert torch.equal(values, many(5))
    assert not torch.equal(values, many(6))
    # A deficit d U(0, 2) has standard deviation d / sqrt(3): 0.0037 over 4000 tokens at most.
    mean = torch.tensor([0.6, 0.75, 0.9], dtype=torch.float64)
    assert (values.mean(0) - mean).abs().max() < 0.015
    assert (values.std(0) - (1 - mean) / 3**0.5).abs().max() < 0.015
    assert values.min() >= 0.2


def test_random_is_independent_over_time_layers_and_transmitters():
    columns = many(5).flatten(1).numpy()  # (4000, L A)
    shifted = np.concatenate([columns[1:], columns[:-1]], axis=1)
    correlation = np.corrcoef(shifted.T) - np.eye(2 * L * 3)
    assert np.abs(correlation).max() < 0.08


def test_shuffled_keeps_each_layers_levels_and_their_company():
    table = np.random.default_rng(0).uniform(0, 1, (90, L, 3))
    control = CONTROLS["shuffled"](CONFIG, table, seed=5)
    positions = torch.arange(90)[None]
    for layer in range(L):
        values = control.release(layer, torch.zeros(1), positions, dial(1), {})[0].numpy()
        assert not np.array_equal(values, table[:, layer])
        assert sorted(map(tuple, values)) == sorted(map(tuple, table[:, layer]))
    again = CONTROLS["shuffled"](CONFIG, table, seed=5)
    other = CONTROLS["shuffled"](CONFIG, table, seed=6)
    assert torch.equal(control.levels, again.levels)
    assert not torch.equal(control.levels, other.levels)


def test_replay_gives_what_was_recorded_and_starts_over():
    table = np.random.default_rng(0).uniform(0, 1, (90, L, 3))
    values = released(CONTROLS["replay"](CONFIG, table), hidden())[0].numpy()
    np.testing.assert_array_equal(values, np.concatenate([table, table])[:T])


# Seeds ------------------------------------------------------------------------------------------

# 10007 and its multiples once were 0; the others differ by a power of two, a sign or a word.
SEEDS = (0, 1, 2, 7, 10006, 10007, 10008, 20014, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64)


def noise(seed: int, n: int = 4000) -> Tensor:
    """(n,) draws of consecutive counters."""
    return _uniform(torch.arange(n), seed)


@pytest.mark.parametrize(("a", "b"), list(combinations(SEEDS, 2)))
def test_no_two_seeds_draw_alike(a: int, b: int):
    one, other = noise(a), noise(b)
    assert not (one == other).any()
    # Independent: the mean product of 4000 centred pairs has a standard error of 0.0013.
    assert abs(((one - 0.5) * (other - 0.5)).mean()) < 0.007


@pytest.mark.parametrize(("a", "b"), [(0, 10007), (0, 1), (1, 2), (7, 10008)])
def test_no_seed_is_a_shift_of_another(a: int, b: int):
    one, other = noise(a, 600), noise(b, 600)
    assert not (one[:, None] == other[None, :]).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_uniform(seed: int):
    draws = noise(seed)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, 16, 0, 1)
    assert (counts - 250).abs().max() < 5 * 250**0.5


def test_seed_0_draws_as_committed_results_did():
    phase = torch.arange(1, 4001, dtype=torch.float64) * 12.9898 + torch.pi
    assert torch.equal(noise(0), torch.frac(torch.sin(phase) * 43758.5453).abs())


@pytest.mark.parametrize(("a", "b"), list(combinations(SEEDS, 2)))
def test_no_two_seeds_share_a_control(a: int, b: int):
    x = hidden()
    one, other = (released(RandomLevels(CONFIG, 0.7, seed), x) for seed in (a, b))
    assert not torch.equal(one, other)
    assert (one == other).float().mean() < 0.5  # clipped levels are all 1 or 0
    record = np.random.default_rng(0).random((64, L, len(TRANSMITTERS)))
    windows = {
        (seed, i): ShuffledLevels(CONFIG, record, spread_seed(seed, i)).levels.numpy().tobytes()
        for seed in (a, b)
        for i in range(6)
    }
    assert len(set(windows.values())) == len(windows)  # nor one window another's of another seed


def test_windows_of_seed_0_are_shuffled_as_committed_results_were():
    record = np.random.default_rng(0).random((64, L, len(TRANSMITTERS)))
    for i in range(6):
        ours = ShuffledLevels(CONFIG, record, spread_seed(0, i))
        assert torch.equal(ours.levels, ShuffledLevels(CONFIG, record, i).levels)
