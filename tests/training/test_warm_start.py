import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_modulator, tiny_windows
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.predictors import PREDICTORS, ConstantLevels
from vesicle.reference.attach import attach
from vesicle.training.warm_start import warm_start

FITTED = ("linear", "mlp", "recurrent")


@pytest.mark.parametrize("kind", FITTED)
def test_levels_come_to_differ_between_tokens_but_not_on_average(kind):
    model = tiny_model()
    modulator = tiny_modulator(model, kind)
    windows = tiny_windows(8)
    warm_start(model, modulator, windows)
    with attach(model, ModulatorMethod(modulator, 0.6)) as run, torch.no_grad():
        model(windows)
    drives = [torch.from_numpy(1 / levels - 1).log() for levels in run.levels]  # minus the dial's
    dopamine = torch.stack([d[1:, 0, 0] for d in drives])
    assert dopamine.std() > 0.02
    assert dopamine.mean() - torch.tensor(0.4 / 0.6).log() == pytest.approx(0, abs=0.02)
    assert torch.stack([d[:, :, 2] for d in drives]).std() < 1e-6  # GABA has no label


@pytest.mark.parametrize("kind", [kind for kind in PREDICTORS if kind not in FITTED])
def test_other_kinds_are_refused(kind):
    model = tiny_model()
    allowed = f"a '{kind}' predictor cannot be warm-started; allowed: {', '.join(FITTED)}$"
    with pytest.raises(VesicleError, match=allowed):
        warm_start(model, tiny_modulator(model, kind), tiny_windows(1))


def test_the_model_is_left_alone_and_controls_are_refused():
    model = tiny_model()
    before = model(tiny_windows(1)).logits
    modulator = tiny_modulator(model)
    warm_start(model, modulator, tiny_windows(2))
    assert torch.equal(model(tiny_windows(1)).logits, before)
    control = modulator.with_levels(ConstantLevels(modulator.predictor.config, 0.5))
    with pytest.raises(VesicleError, match="'constant' predictor cannot be warm-started"):
        warm_start(model, control, tiny_windows(2))
