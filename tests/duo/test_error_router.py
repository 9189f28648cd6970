import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_windows
from vesicle.duo import fit_error_router, importance, make_duo_of, nested, own_ffns
from vesicle.duo.ffn_inputs import watched
from vesicle.errors import DataError, VesicleError
from vesicle.plan import FFN_BIG, FFN_SMALL


@pytest.fixture(scope="module")
def fitted():
    model = tiny_model()
    own = own_ffns(model)
    windows = tiny_windows(12)
    small = nested(own, importance(model, own, windows.split(4)), 8)
    return model, small, windows, fit_error_router(model, small, windows)


def test_it_tells_errors_from_inputs(fitted):
    model, small, windows, router = fitted
    assert router.weight.shape == (2, 32)
    assert (router.explained > 0.12).all()  # of noise with 32 inputs and 564 tokens it were 0.06
    with watched(model) as read:
        for layer, seen in enumerate(read(windows[:2])):
            off = (small.apply_layer(layer, seen.x) - seen.y).square().sum(-1) * seen.weight[:, 0]
            both = torch.stack([router.predicted(layer, seen.x), off.log()])
            assert torch.corrcoef(both)[0, 1] > 0.3


def test_it_has_as_many_small_as_are_asked_for(fitted):
    _, small, windows, router = fitted
    model = tiny_model()
    choices = make_duo_of(model, small)
    for asked in (0, 0.5, 1.0, 2):
        with choices.by(router.chooser(asked)) as taken, torch.no_grad():
            model(windows)
        found = torch.stack([taken[layer] for layer in range(2)])
        assert (found[..., 0] == FFN_BIG).all()
        number = (found[..., 1:] == FFN_SMALL).sum(0).float().mean()
        assert float(number) == pytest.approx(asked, abs=0.15)


def test_what_is_refused(fitted):
    model, small, windows, router = fitted
    with pytest.raises(VesicleError, match="3 small FFNs; allowed: 0 to 2, the layers"):
        router.chooser(3)
    with pytest.raises(DataError, match="2 tokens or more"):
        fit_error_router(model, small, windows[:, :1])
