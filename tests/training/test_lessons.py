"""Lessons: what of a window is taught, how tasks are mixed, in which order they are taken."""

from collections import Counter

import numpy as np
import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_modulator
from vesicle.errors import DataError, VesicleError
from vesicle.reference.attach import Soft, attach
from vesicle.training import trainer
from vesicle.training.lessons import Lessons, Order
from vesicle.training.trainer import TrainConfig, train

TASKS = {
    "long": [([1, 2, 3], [4, 5])] * 40,
    "short": [([6], [7, 8, 9, 10, 11])] * 10,
}


def lessons(length: int = 8) -> Lessons:
    return Lessons.of_answers(TASKS, length, filler=0)


def test_a_lesson_is_a_prompt_its_answer_and_filler():
    found = lessons()
    assert len(found) == 50
    assert found.tokens[0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert found.taught[0].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert found.names == ("long", "short")
    assert not found.is_text
    assert Lessons.of_text(torch.ones(2, 4, dtype=torch.long)).is_text


def test_what_does_not_fit_is_left_out_and_a_task_with_nothing_is_named():
    with pytest.raises(DataError, match="short has no prompt and answer within 5 tokens"):
        Lessons.of_answers(TASKS, 5, filler=0)


def test_a_lesson_that_teaches_nothing_is_refused():
    tokens = torch.ones(2, 4, dtype=torch.long)
    taught = torch.zeros_like(tokens, dtype=torch.bool)
    taught[0] = True
    taught[1, 0] = True  # nothing before it to predict it from
    with pytest.raises(DataError, match="lesson 1 teaches no token"):
        Lessons(tokens=tokens, taught=taught, task=torch.zeros(2, dtype=torch.long), names=("x",))


def test_held_out_are_the_last_of_each_task():
    kept, held = lessons().held_out(4)
    assert len(kept) == 46
    assert Counter(held.task.tolist()) == {0: 2, 1: 2}
    assert held.part(slice(0, 2)).task.tolist() == [0, 1]
    with pytest.raises(DataError, match="short has 10 windows of 8 tokens; 10 are held out"):
        lessons().held_out(20)


def test_one_of_each_task_is_held_out_as_far_as_they_go():
    kept, held = lessons().held_out(1)
    assert (len(kept), len(held)) == (49, 1)
    kept, held = lessons().held_out(0)
    assert (len(kept), len(held)) == (50, 0)


def test_packed_windows_hold_no_filler_and_all_tasks():
    packed = lessons().packed()
    assert packed.shape[1] == 8
    assert len(packed) == (40 * 5 + 10 * 6) // 8
    assert not (packed == 0).any()
    assert (packed[:4] == 6).any()
    assert (packed[:4] == 1).any()
    assert int((packed == 6).sum()) >= 9  # each lesson once
    windows = torch.arange(12).view(6, 2)
    assert Lessons.of_text(windows).packed() is windows


def test_a_task_meets_all_budgets():
    config = TrainConfig()
    found = lessons()
    order = Order(found, 1e9, seed=0)
    for task in (0, 1):
        own = [config.budget(k) for k in range(300) if int(found.task[order.at(k)]) == task]
        assert min(own) < config.budget_low + 0.05
        assert max(own) > config.budget_high - 0.05


def test_levels_act_in_training_where_they_are_executed():
    model = tiny_model()
    modulator = tiny_modulator(model)
    prompt, answer = list(range(5, 17)), list(range(30, 37))
    lesson = Lessons.of_answers({"a": [(prompt, answer)]}, 24, filler=0)
    acts = trainer._predicting(lesson.taught)
    with torch.no_grad(), attach(model, modulator.at(0.5), prompt_tokens=len(prompt)) as run:
        model(torch.tensor([prompt + answer]))
    executed = (run.levels[0] < 1).any((1, 2))  # the last token of an answer is not fed back
    assert np.flatnonzero(executed)[:-1].tolist() == acts[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", ["recurrent", "delays", "gain", "pooled"])
def test_predictors_that_remember_are_trained_on_text_alone(tmp_path, kind: str):
    model, config = tiny_model(), TrainConfig(sequence_length=8)
    with pytest.raises(VesicleError, match=f"a '{kind}' predictor carries state"):
        train(model, tiny_modulator(model, kind), lessons(), None, config, tmp_path)


def test_text_is_held_out_as_it_lies():
    windows = torch.arange(12).view(6, 2)
    kept, held = Lessons.of_text(windows).held_out(2)
    assert torch.equal(kept.tokens, windows[:4])
    assert torch.equal(held.tokens, windows[4:])


@pytest.mark.parametrize(
    ("temperature", "share"), [(1.0, 0.8), (2.0, 2 / 3), (1e9, 0.5)], ids=["1", "2", "many"]
)
def test_tasks_are_mixed_by_temperature(temperature: float, share: float):
    found = lessons()
    order = Order(found, temperature, seed=0)
    tasks = [int(found.task[order.at(k)]) for k in range(600)]
    assert tasks.count(0) / 600 == pytest.approx(share, abs=0.01)


def test_each_pass_over_a_task_takes_each_of_its_lessons_once():
    found = lessons()
    order = Order(found, 2.0, seed=3)
    taken = [order.at(k) for k in range(200)]
    for task, n in ((0, 40), (1, 10)):
        own = [i for i in taken if int(found.task[i]) == task]
        for start in range(0, len(own) - n, n):
            assert len(set(own[start : start + n])) == n


def test_the_order_is_a_function_of_the_place_alone():
    order = [Order(lessons(), 2.0, seed=1).at(k) for k in range(120)]
    late = Order(lessons(), 2.0, seed=1)
    assert [late.at(k) for k in range(60, 120)] == order[60:]
    assert [Order(lessons(), 2.0, seed=2).at(k) for k in range(120)] != order


def test_text_is_taken_in_the_order_that_it_always_was():
    order = Order(Lessons.of_text(torch.zeros(7, 3, dtype=torch.long)), 2.0, seed=5)
    for epoch in range(3):
        expected = np.random.default_rng((5, epoch)).permutation(7).tolist()
        assert [order.at(7 * epoch + i) for i in range(7)] == expected


def test_levels_act_on_what_is_taught_alone():
    model = tiny_model()
    modulator = tiny_modulator(model)
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    acts = torch.zeros_like(tokens, dtype=torch.bool)
    acts[:, 25:] = True
    with torch.no_grad():
        dense = model(tokens).logits
        with attach(model, modulator.at(0.5), soft=Soft(acts=acts)) as run:
            logits = model(tokens).logits
    torch.testing.assert_close(logits[:, :25], dense[:, :25], rtol=0, atol=1e-4)
    assert (logits[:, 25:] - dense[:, 25:]).abs().amax(-1).min() > 1e-3
    cost = run.charged
    assert cost.share_of(acts) < 0.95
    # Of the others the predictor alone is charged beside the dense work.
    more = (cost.executed - cost.dense)[~acts]
    assert more.max() <= modulator.predictor.flops * modulator.predictor.config.n_layers


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_training_on_answers_learns_and_says_so(tmp_path, label_weight: float):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 257, 20).tolist(), rng.integers(0, 257, 10).tolist()) for _ in range(24)
    ]
    found = Lessons.of_answers({"a": pairs[:12], "b": pairs[12:]}, 32, filler=0)
    kept, held = found.held_out(4)
    model = tiny_model()
    modulator = tiny_modulator(model)
    config = TrainConfig(
        steps=4,
        sequence_length=32,
        batch_size=2,
        accumulation=2,
        eval_every=2,
        eval_windows=4,
        loss_positions=6,
        label_weight=label_weight,
    )
    result = train(model, modulator, kept, held, config, tmp_path, progress=False)
    assert result.step == 4
    metrics = result.metrics
    assert ("labels" in metrics) == (label_weight > 0)
    assert modulator.info.training["tasks"] == ["a", "b"]
    parts = metrics["kl"] + metrics["penalty"] + label_weight * metrics.get("labels", 0.0)
    assert metrics["loss"] == pytest.approx(parts)
