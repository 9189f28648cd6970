"""Every registered effector: rest, monotony, and masks that tend to the decision.

An effector's decisions and masks have the arguments that its effect needs, so one `Case` per
effector says how to ask; the tests are the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.effectors.asking import decided
from vesicle.blocks import rank_blocks, summarise
from vesicle.effectors import EFFECTORS, DopaminePrecision, Effector, GabaSparsity, SerotoninDepth
from vesicle.plan import FloatArray, IntArray

T, WIDTH = 70, 80
POSITIONS = np.arange(T, dtype=np.int32)
VISIBLE = POSITIONS // 16 + 1


def magnitude() -> Tensor:
    return torch.randn(1, T, WIDTH, generator=torch.Generator().manual_seed(0)).abs().double()


def rank() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, T, 12, generator=generator)
    key = torch.randn(1, 2, T, 12, generator=generator)
    return rank_blocks(query, summarise(key, "mean"), torch.from_numpy(POSITIONS)[None], 0.3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to ask one effector.

    Attributes:
        effector: The one asked.
        rest: What it decides at rest, by name.
        decide: Levels (T,) to decisions, by name; more is more compute.
        soft: Levels (1, T) and temperature to a mask whose last axes are flattened, (T, N).
        hard: Levels (T,) to the same mask by the hard decision.
    """

    effector: Effector
    rest: dict[str, int | np.ndarray]
    decide: Callable[[FloatArray], dict[str, np.ndarray]]
    soft: Callable[[Tensor, float], Tensor]
    hard: Callable[[FloatArray], Tensor]


def read_channels(
    effector: DopaminePrecision, level: FloatArray, site: int, width: int = WIDTH
) -> IntArray:
    """Channels read at one site, (T,)."""
    return decided(effector, level, "channels", site, width=width)


def dopamine(effector: DopaminePrecision, site: int = 3) -> Case:
    def hard(level: FloatArray) -> Tensor:
        order = magnitude()[0].argsort(-1, descending=True).argsort(-1)
        return (order < torch.from_numpy(read_channels(effector, level, site))[:, None]).double()

    return Case(
        effector=effector,
        rest={"channels": WIDTH, "bits": 16},
        decide=lambda level: {
            "channels": read_channels(effector, level, site),
            "bits": decided(effector, level, "bits", site),
        },
        soft=lambda level, heat: effector.mask(level, site, magnitude(), heat)[0],
        hard=hard,
    )


def serotonin(effector: SerotoninDepth) -> Case:
    steps = (effector.bypass_below, effector.attention_below, effector.ffn_below)

    def hard(level: FloatArray) -> Tensor:
        module, runs = (decided(effector, level, name) for name in ("ffn", "attention"))
        return torch.from_numpy(np.stack([module >= 1, runs == 1, module == 2], axis=1)).double()

    return Case(
        effector=effector,
        rest={"ffn": 2, "attention": 1},
        decide=lambda level: {n: decided(effector, level, n) for n in ("ffn", "attention")},
        soft=lambda level, heat: torch.stack(
            [effector.mask(level, step, heat)[0] for step in steps], dim=-1
        ),
        hard=hard,
    )


def gaba(effector: GabaSparsity) -> Case:
    seen = (rank() <= torch.from_numpy(VISIBLE)[None, :, None, None]).double()
    visible = torch.from_numpy(VISIBLE)[None]

    def blocks(level: FloatArray) -> IntArray:
        return decided(effector, level, "kv_blocks", visible=VISIBLE)

    def hard(level: FloatArray) -> Tensor:
        count = torch.from_numpy(blocks(level))[None, :, None, None]
        return ((rank() <= count).double() * seen)[0].flatten(1)

    return Case(
        effector=effector,
        rest={"blocks": VISIBLE},
        decide=lambda level: {"blocks": blocks(level)},
        soft=lambda level, heat: (effector.mask(level, rank(), visible, heat) * seen)[0].flatten(1),
        hard=hard,
    )


LADDER = ((0.9, 16), (0.7, 8), (0.5, 4), (0.3, 3), (0.0, 2))
CASES: dict[str, list[Case]] = {
    "dopamine": [
        dopamine(DopaminePrecision()),
        dopamine(DopaminePrecision(floor=0.2, bits_ladder=LADDER), site=0),
        dopamine(DopaminePrecision(site_rates=(0.3, 0.5, 0.7, 1.5)), site=3),
        dopamine(DopaminePrecision(site_rates=(0.3, 0.5, 0.7, 1.5)), site=0),
    ],
    "serotonin": [
        serotonin(SerotoninDepth()),
        serotonin(SerotoninDepth(ffn_below=0.8, attention_below=0.6, bypass_below=0.3)),
        serotonin(SerotoninDepth(ffn_below=1.0, attention_below=1.0, bypass_below=1.0)),
    ],
    "gaba": [
        gaba(GabaSparsity(least=4)),
        gaba(GabaSparsity(least=2)),
        gaba(GabaSparsity(least=3, summary="bounds")),
    ],
}


@pytest.fixture(params=[(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def case(request: pytest.FixtureRequest) -> Case:
    name, number = request.param
    return CASES[name][number]


def test_every_effector_has_cases():
    assert {n: {type(c.effector) for c in cases} for n, cases in CASES.items()} == {
        n: {e} for n, e in EFFECTORS.items()
    }


def test_rests_at_one(case: Case):
    decided = case.decide(np.ones(T))
    assert decided.keys() == case.rest.keys()
    for name, value in case.rest.items():
        assert decided[name].dtype == np.int32
        assert (decided[name] == value).all()


def test_every_level_is_allowed_and_more_is_never_less(case: Case):
    before: dict[str, np.ndarray] | None = None
    for level in np.linspace(0, 1, 101):
        now = case.decide(np.full(T, level))
        for name, values in now.items():
            assert (values >= (0 if name in ("ffn", "attention") else 1)).all()
            assert (values <= case.rest[name]).all()
            if before is not None:
                assert (values >= before[name]).all()
        before = now
    low = case.decide(np.zeros(T))
    assert any((low[name] < rest).any() for name, rest in case.rest.items())


@pytest.mark.parametrize("heat", [0.0, 0.01, 0.1, 1.0])
def test_the_mask_is_exactly_one_at_one(case: Case, heat: float):
    level = torch.ones(1, T, dtype=torch.float64, requires_grad=True)
    mask = case.soft(level, heat)
    assert torch.equal(mask, case.hard(np.ones(T)))
    assert torch.equal(mask, mask.clamp(0, 1))


def varied(seed: int = 4) -> FloatArray:
    return np.random.default_rng(seed).uniform(0.05, 0.98, T)


def test_the_mask_tends_to_the_decision(case: Case):
    level = varied()
    hard, soft_level = case.hard(level), torch.from_numpy(level)[None]
    gaps = [(case.soft(soft_level, heat) - hard).abs().mean().item() for heat in (0.5, 0.1, 0.001)]
    assert gaps[0] > gaps[1] > gaps[2]
    # A threshold that is a channel's own magnitude leaves that channel's mask at one half.
    assert gaps[2] < 0.5 / WIDTH + 0.01
    straight = case.soft(soft_level, 0.0)
    torch.testing.assert_close(straight, hard, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heat", [0.0, 0.05, 0.3])
def test_gradients_reach_the_level_and_point_up(case: Case, heat: float):
    level = torch.from_numpy(varied())[None].requires_grad_()
    case.soft(level, heat).sum().backward()
    assert level.grad is not None
    assert torch.isfinite(level.grad).all()
    assert (level.grad >= 0).all()
    assert (level.grad > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_keep_the_dtype(case: Case, dtype: torch.dtype):
    level = torch.from_numpy(varied())[None].to(dtype)
    assert torch.isfinite(case.soft(level, 0.1)).all()


def test_round_trip_and_unknown_settings(case: Case):
    import json

    kind, settings = type(case.effector), case.effector.to_dict()
    assert kind.from_dict(json.loads(json.dumps(settings))) == case.effector
    with pytest.raises(ValueError, match=rf"unknown {kind.transmitter} setting 'colour'; known: "):
        kind.from_dict({**settings, "colour": 1})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DopaminePrecision, {"site_rates": (1.0, 1.0)}, "four numbers from 0 to 4"),
        (DopaminePrecision, {"site_rates": (1.0, 1.0, 1.0, 9.0)}, "four numbers from 0 to 4"),
        (DopaminePrecision, {"floor": 0.0}, "floor is 0.0; allowed: above 0, up to 1"),
        (DopaminePrecision, {"floor": 1.5}, "floor is 1.5"),
        (DopaminePrecision, {"bits_ladder": ((0.5, 8),)}, "must fall to 0"),
        (DopaminePrecision, {"bits_ladder": ((0.2, 8), (0.5, 4), (0.0, 2))}, "must fall to 0"),
        (DopaminePrecision, {"bits_ladder": ((0.0, 5),)}, "allowed bits"),
        (SerotoninDepth, {"ffn_below": 1.5}, "must rise in that order"),
        (SerotoninDepth, {"ffn_below": 0.1, "attention_below": 0.2}, "must rise in that order"),
        (SerotoninDepth, {"bypass_below": -0.1}, "must rise in that order"),
        (GabaSparsity, {"summary": "median"}, "summary is 'median'; allowed: mean, bounds"),
        (GabaSparsity, {"least": 1}, "least is 1; allowed: 2 and above"),
    ],
)
def test_bad_settings_are_refused(kind: type[Effector], settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
