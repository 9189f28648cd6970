import pytest
import torch

from vesicle.training.objectives import TemperatureSchedule, budget_penalty, divergence


def plain(dense, modulated):
    log_p, log_q = dense.log_softmax(-1), modulated.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_divergence_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    dense = torch.randn(2, 7, 11) * 3
    ours = torch.randn(2, 7, 11, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss = divergence(dense, ours, chunk=4)
    (2 * loss).backward()
    expected = plain(dense, theirs)
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_divergence_of_equals_is_zero_in_both_precisions():
    logits = torch.randn(1, 5, 9)
    assert divergence(logits, logits).item() == 0
    assert divergence(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32


def test_divergence_refuses_unlike_shapes():
    with pytest.raises(ValueError, match="shapes"):
        divergence(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3))


def test_penalty_one_and_two_sided():
    share = torch.tensor(0.7)
    assert budget_penalty(share, 0.8, 30.0).item() == pytest.approx(0.3)
    assert budget_penalty(share, 0.8, 30.0, one_sided=True).item() == 0
    assert budget_penalty(share, 0.6, 30.0, one_sided=True).item() == pytest.approx(0.3)


def test_temperature_falls_exponentially_or_stays():
    schedule = TemperatureSchedule(start=1.0, end=0.01)
    assert [schedule.at(x) for x in (0, 0.5, 1)] == pytest.approx([1, 0.1, 0.01])
    assert TemperatureSchedule().at(0.3) == 0
    with pytest.raises(ValueError, match="both 0"):
        TemperatureSchedule(start=0.0, end=0.1)
    with pytest.raises(ValueError, match="0 and above"):
        TemperatureSchedule(start=-1.0, end=-1.0)
