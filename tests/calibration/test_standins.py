import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_windows
from vesicle.calibration import fit_standins
from vesicle.calibration import standins as module
from vesicle.calibration.standins import Moments
from vesicle.errors import DataError
from vesicle.families import find_family
from vesicle.small_modules import LowRankMaps


def test_a_full_rank_stand_in_of_a_linear_module_is_that_module():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 12).double()
    x = torch.randn(400, 12).double() @ torch.randn(12, 12).double() + 3
    moments = Moments(12, 12)
    for part in x.split(100):
        moments.add(part, linear(part).detach())
    down, up, bias, error = moments.low_rank(12, 1e-12)
    torch.testing.assert_close(up @ down, linear.weight.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, linear.bias.detach(), rtol=1e-6, atol=1e-8)
    assert error < 1e-9


def test_no_other_map_of_the_rank_does_better():
    torch.manual_seed(0)
    mixing = torch.randn(10, 10).double()
    x = torch.randn(500, 10).double() @ mixing
    y = torch.tanh(x @ torch.randn(10, 10).double() / 4)
    moments = Moments(10, 10)
    moments.add(x, y)
    down, up, bias, error = moments.low_rank(3, 1e-9)

    def loss(d, u, b):
        return ((x @ d.T @ u.T + b - y).square().sum() / y.square().sum()).item()

    assert loss(down, up, bias) == pytest.approx(error, rel=1e-6)
    for _ in range(30):
        moved = [t + 0.01 * t.std() * torch.randn_like(t) for t in (down, up, bias)]
        assert loss(*moved) > error
    assert moments.low_rank(10, 1e-9)[3] < error < moments.low_rank(1, 1e-9)[3]


def test_the_model_s_own_modules_are_approximated(tmp_path, monkeypatch):
    model = tiny_model()
    windows = tiny_windows(20)
    ffn, attention = LowRankMaps(2, 32, 32), LowRankMaps(2, 32, 8)
    errors = fit_standins(model, windows, ffn, attention, cache=tmp_path)
    assert len(errors.ffn) == len(errors.attention) == 2
    assert all(0 < e < 0.9 for e in errors.ffn + errors.attention)

    seen = {}
    family = find_family(model.config)
    block = family.modules(family.layers(model)[1]).ffn
    handle = block.register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o))
    model(windows)
    handle.remove()
    x, y = seen["x"][:, 1:], seen["y"][:, 1:]
    actual = (ffn.apply_layer(1, x) - y).square().sum() / y.square().sum()
    assert actual.item() == pytest.approx(errors.ffn[1], rel=1e-3)

    # The second time nothing is measured, and the same comes back.
    monkeypatch.setattr(module, "collect_moments", None)
    again = LowRankMaps(2, 32, 32), LowRankMaps(2, 32, 8)
    assert fit_standins(model, windows, *again, cache=tmp_path) == errors
    assert torch.equal(again[0].down, ffn.down)


def test_windows_without_tokens_are_refused():
    with pytest.raises(DataError, match="windows of 2 tokens"):
        fit_standins(tiny_model(), torch.zeros(1, 1), LowRankMaps(2, 32, 4), LowRankMaps(2, 32, 4))
