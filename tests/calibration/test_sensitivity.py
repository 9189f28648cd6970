import numpy as np
import pytest

from tests.training.tiny_run import tiny_model, tiny_modulator, tiny_windows
from vesicle.calibration import Sensitivity, allocate, measure_sensitivity
from vesicle.calibration import sensitivity as module
from vesicle.calibration.sensitivity import Probe, default_probes, expected_share


def test_probes_cost_and_save_and_are_kept(tmp_path, monkeypatch):
    model = tiny_model()
    modulator = tiny_modulator(model)
    windows = tiny_windows(1)
    result = measure_sensitivity(model, modulator, windows, cache=tmp_path)
    rows = {p.name: i for i, p in enumerate(result.probes)}
    assert set(rows) == {"dopamine", "serotonin-ffn", "serotonin-attention", "gaba"}
    assert (result.rise >= 0).all()
    assert (result.saved[rows["dopamine"]] > 0.01).all()
    assert (result.rise[rows["dopamine"]] > 1e-4).all()
    # Levels govern the next layer's attention, and after the last layer there is none.
    assert result.saved[rows["gaba"], 1] == 0
    skip, small = rows["serotonin-attention"], rows["serotonin-ffn"]
    assert result.saved[skip, 0] > result.saved[small, 0]
    assert result.saved[skip, 1] == pytest.approx(result.saved[small, 1])

    monkeypatch.setattr(module, "attach", None)
    again = measure_sensitivity(model, modulator, windows, cache=tmp_path)
    assert np.array_equal(again.rise, result.rise)
    assert Sensitivity.from_dict(again.to_dict()).probes == result.probes


def made_up(modulator) -> Sensitivity:
    """Two layers: the first loses ten times as much as the second for the same saving."""
    probes = default_probes(modulator)
    saved = np.array([[0.12, 0.12], [0.15, 0.15], [0.25, 0.15], [0.02, 0.0]])
    rise = np.array([[0.1, 0.01], [1.0, 0.1], [2.0, 0.2], [0.01, 0.0]])
    return Sensitivity(probes=probes, rise=rise, saved=saved)


def test_sensitive_layers_are_spared_and_the_dial_starts_about_right():
    modulator = tiny_modulator(tiny_model())
    predictor, sensitivity = modulator.predictor, made_up(modulator)
    allocate(sensitivity, predictor, (0.8, 0.9))
    offset = predictor.offset.detach().numpy()
    names = predictor.config.transmitters
    dopamine, serotonin = names.index("dopamine"), names.index("serotonin")
    assert offset[0, dopamine] < offset[1, dopamine]
    assert (offset[:, serotonin] < offset[:, dopamine]).all()
    slope = np.exp(predictor.log_slope.detach().numpy())
    for budget in (0.8, 0.85, 0.9):
        deficit = 1 / (1 + np.exp(-(offset + slope * np.log((1 - budget) / budget))))
        share = expected_share(sensitivity, names, 1 - deficit)
        assert share == pytest.approx(budget, abs=0.02)


def test_steps_of_a_ladder_are_counted_once():
    modulator = tiny_modulator(tiny_model())
    sensitivity, names = made_up(modulator), modulator.predictor.config.transmitters
    levels = np.ones((2, 3))
    for level, saved in ((0.5, 0.0), (0.4, 0.15), (0.2, 0.25)):
        levels[0, names.index("serotonin")] = level
        assert expected_share(sensitivity, names, levels) == pytest.approx(1 - saved)
    assert Probe(name="a", transmitter="gaba", level=0.5).below is None


def test_budgets_are_checked():
    modulator = tiny_modulator(tiny_model())
    for budgets in ((0.5,), (0.5, 1.0)):
        with pytest.raises(ValueError, match="give two or more between 0 and 1"):
            allocate(made_up(modulator), modulator.predictor, budgets)
