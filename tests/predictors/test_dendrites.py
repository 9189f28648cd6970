"""Dendrites: the code, the synapses, the threshold and the gate."""

import math

import pytest
import torch
from torch import Tensor

from tests.tiny import perturb
from vesicle.predictors import DendritesPredictor, PredictorConfig
from vesicle.predictors.sparse_codes import false_match


def new(width: int = 64, hidden: int = 6) -> DendritesPredictor:
    config = PredictorConfig(n_layers=2, width=width, transmitters=("gaba",), hidden=hidden)
    return DendritesPredictor(config).double()


def features(n: int, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, n, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.rms_norm(x, (width,))


def binary(n: int, width: int, active: int) -> Tensor:
    """Random codes (1, n, D)."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(1, n, width, generator=generator).argsort(dim=-1)
    return (order < active).double()


@pytest.mark.parametrize("width", [1, 4, 8, 64, 100])
def test_the_largest_features_are_on(width: int):
    predictor, x = new(width), features(50, width)
    on = predictor.code(x) > 0.5
    if width > 1:
        assert (on.sum(dim=-1) == predictor.active).all()
        largest = x.topk(predictor.active, dim=-1).indices
        assert on.gather(-1, largest).all()
    assert predictor.active == max(1, width // 8)


def test_a_rounding_error_moves_a_code_by_no_more_than_itself():
    """Also where it changes which feature is the last to be on."""
    predictor, x = new(), features(1)
    order = x[0, 0].argsort(descending=True)
    last, next_ = order[predictor.active - 1], order[predictor.active]
    x[..., last] = x[..., next_] + 1e-9
    other = x.clone()
    other[..., last] -= 2e-9
    assert not torch.equal(predictor.code(x) > 0.5, predictor.code(other) > 0.5)
    assert (predictor.code(x) - predictor.code(other)).abs().max() < 1e-7


def test_synapses_are_drawn_once_and_saved():
    predictor = new()
    assert predictor.synapses.shape == (2, 6, 4, 4)
    assert predictor.synapses.dtype == torch.int64
    assert "synapses" in predictor.state_dict()
    assert "synapses" not in dict(predictor.named_parameters())
    segments = predictor.synapses.flatten(0, 2)
    assert all(len(set(segment)) == 4 for segment in segments.tolist())  # no feature twice
    assert len(set(segments.flatten().tolist())) > 60  # and hardly any never
    assert not torch.equal(predictor.synapses[0], predictor.synapses[1])
    torch.manual_seed(7)
    assert torch.equal(new().synapses, predictor.synapses)


def test_an_overlap_starts_as_a_count():
    predictor, code = new(), binary(150, 64, 8)
    overlaps = predictor.overlaps(1, code)
    assert overlaps.shape == (1, 150, 6, 4)
    for m in range(6):
        for j in range(4):
            count = code[..., predictor.synapses[1, m, j]].sum(dim=-1)
            assert torch.equal(overlaps[..., m, j], count)


@pytest.mark.parametrize("width", [16, 48, 64, 576, 2048])
def test_the_threshold_keeps_random_codes_out(width: int):
    predictor = new(width, 4)
    size = predictor.synapses.shape[-1]
    expected = false_match(width, predictor.active, size, predictor.threshold)
    assert 1 <= predictor.threshold <= size
    assert expected <= 0.05 or predictor.threshold == size
    reached = predictor.overlaps(0, binary(1000, width, predictor.active)) >= predictor.threshold
    # Segments that share features are not independent: five standard errors of one segment's share.
    error = 5 * math.sqrt(expected * (1 - expected) / 1000)
    assert reached.double().mean() == pytest.approx(expected, abs=error)


def test_the_strongest_segment_gates_its_unit():
    predictor, x = new(), features(30)
    perturb(predictor)
    strongest = predictor.overlaps(0, predictor.code(x)).argmax(dim=-1)  # (1, T, M)
    before = predictor.drive(0, x, {})
    with torch.no_grad():  # nobody's strongest: all segments but the first of the first unit
        predictor.strength[0, 0, 0] -= 5
    moved = (predictor.drive(0, x, {}) != before)[0, :, 0]
    assert torch.equal(moved, strongest[0, :, 0] == 0)
    assert moved.any()
    assert not moved.all()
