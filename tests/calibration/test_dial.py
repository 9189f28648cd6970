import numpy as np
import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_modulator, tiny_windows
from vesicle.calibration import dial as module
from vesicle.calibration import measure_dial
from vesicle.calibration.dial import executed_share


@pytest.fixture
def scattered():
    """A modulator whose tokens differ, so that serotonin's steps do not all fall at once."""
    model = tiny_model()
    modulator = tiny_modulator(model)
    torch.manual_seed(5)
    with torch.no_grad():
        modulator.predictor.weight.normal_(std=0.2)
    return model, modulator


def test_the_table_rises_and_budgets_are_met_on_its_text(scattered):
    model, modulator = scattered
    windows = tiny_windows(4)
    table = measure_dial(model, modulator, windows)
    budgets, dials = map(np.array, zip(*table, strict=True))
    assert (np.diff(budgets) > 0).all()
    assert (np.diff(dials) > 0).all()
    assert table[-1] == (1.0, 1.0)
    modulator.info.dial = table
    for budget in np.linspace(budgets[0] + 0.01, 0.99, 9):
        share = executed_share(model, modulator.at(budget), windows)
        assert share == pytest.approx(budget, abs=0.01)


def test_it_is_kept(scattered, tmp_path, monkeypatch):
    model, modulator = scattered
    windows = tiny_windows(1)
    table = measure_dial(model, modulator, windows, gap=0.3, cache=tmp_path)
    monkeypatch.setattr(module, "executed_share", None)
    assert measure_dial(model, modulator, windows, gap=0.3, cache=tmp_path) == table
    with pytest.raises(TypeError):
        measure_dial(model, modulator, windows, gap=0.2, cache=tmp_path)


def test_ranges_are_checked(scattered):
    with pytest.raises(ValueError, match="gap is 0"):
        measure_dial(*scattered, tiny_windows(1), gap=0)
    with pytest.raises(ValueError, match="lowest is 1"):
        measure_dial(*scattered, tiny_windows(1), lowest=1.0)
