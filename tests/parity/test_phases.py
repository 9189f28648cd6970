"""Prompts at rest: the same Plan from engine and reference, in whatever pieces a text is read."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.decoding import method_for, modulator_for, native, tiny
from tests.tiny import shape_of, tiny_control, tiny_modulator, tokens
from vesicle.cost import price_tokens
from vesicle.engine import Engine, Sequence
from vesicle.errors import VesicleError
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.phases import EVERYWHERE, Phases
from vesicle.plan import Dense, Method, Plan, Replay
from vesicle.predictors import CONTROLS
from vesicle.reference.attach import attach

N, PROMPT = 70, 50
PHASES = {
    "generated": Phases(),
    "all": EVERYWHERE,
    "gaba": Phases.parse(["gaba=all"]),
    "prompt": Phases.parse(["prompt", "dopamine=generated"]),
}
WAYS = {"chunks": [7, 30, 20, 13], "single": [1] * N, "at the border": [49, 1, 20]}


def read(
    engine: Engine, modulator: Modulator | Method, phases: Phases | None, sizes: list[int]
) -> tuple[Sequence, torch.Tensor]:
    """A text of which the first 50 tokens are a prompt, read in pieces; all logits."""
    sequence = engine.start(modulator, 0.5 if phases else None, phases)
    sequence.begin_prompt(PROMPT)
    ids, rows, at = tokens(N)[0].tolist(), [], 0
    for size in sizes:
        rows.append(engine.forward([(sequence, ids[at : at + size])], "all")[0])
        at += size
    return sequence, torch.cat(rows)


def resting(plan: Plan, shape: Any, tokens_: slice) -> bool:
    """Whether a Plan's rows are those of the dense model."""
    rest = Plan.rest(shape, plan.n_tokens)
    return plan.tokens(tokens_.start or 0, tokens_.stop).equals(
        rest.tokens(tokens_.start or 0, tokens_.stop)
    )


@pytest.mark.parametrize("kind", ["linear", "recurrent", "replay"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
def test_pieces_change_nothing(llama: Any, kind: str, way: str, phases: Phases):
    """Plan, levels, logits and counted work; and what is counted is what is priced."""
    engine = Engine.from_model(llama)
    form = kind if kind not in CONTROLS else "linear"
    modulator = tiny_modulator(engine.shape, form)
    if kind in CONTROLS:
        modulator = modulator.with_levels(tiny_control(kind, modulator.predictor.config))
    whole, expected = read(engine, modulator, phases, [N])
    sequence, logits = read(engine, modulator, phases, WAYS[way])
    with closing(whole), closing(sequence):
        assert sequence.plan.equals(whole.plan)
        np.testing.assert_allclose(sequence.levels, whole.levels, atol=3e-6)
        assert (logits - expected).abs().max() < 1e-5
        priced = price_tokens(
            sequence.plan, engine.shape, sequence.overhead, released=sequence.released
        )
        for name, values in sequence.token_costs.items():
            np.testing.assert_array_equal(values, priced[name], err_msg=name)
        if phases == Phases():
            assert resting(sequence.plan, engine.shape, slice(0, PROMPT - 1))
            assert not resting(sequence.plan, engine.shape, slice(PROMPT - 1, N))
            assert (sequence.levels[: PROMPT - 1] == 1).all()
            assert sequence.released.tolist() == [False] * (PROMPT - 1) + [True] * (N - PROMPT + 1)


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
def test_reference_and_engine_agree(llama: Any, phases: Phases):
    modulator = tiny_modulator(shape_of(llama))
    engine = Engine.from_model(llama)
    sequence, logits = read(engine, modulator, phases, [N])
    with (
        attach(llama, modulator, 0.5, phases=phases, prompt_tokens=PROMPT) as run,
        closing(sequence),
    ):
        expected = llama(tokens(N)).logits[0]
        assert sequence.plan.equals(run.plan)
        np.testing.assert_allclose(sequence.levels, run.levels[0], atol=3e-6)
        assert (logits - expected).abs().max() < 1e-5
        assert run.cost.flops_total == sequence.cost.flops_total


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
def test_a_replay_gives_the_same_bits_however_it_is_cut(
    weights: str, phases: Phases, tmp_path: Path
):
    engine = Engine.from_model(tiny(), weights=weights)
    modulator = modulator_for(engine.shape, "stand-ins")
    first, logits = read(engine, modulator, phases, [N - 2, 1, 1])
    first.plan.save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    assert plan.equals(first.plan)
    again, replayed = read(engine, Replay(plan, modulator.stand_ins), None, [3, 20, N - 23])
    assert torch.equal(logits, replayed)
    assert again.plan.equals(plan)


NATIVE = [
    *(
        (weights, kv, kind)
        for weights, kv in (("int4", "fp16"), ("int8", "int8"))
        for kind in ("stand-ins", "ladder", "replay", "dense", "recurrent", "mlp")
    ),
    # Weights without planes of bits, and authors that are not asked.
    *((weights, "fp32", kind) for weights in ("fp32", "bf16") for kind in ("stand-ins", "dense")),
    ("fp32", "fp16", "replay"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("weights", "kv", "kind"), NATIVE)
def test_pieces_change_no_bit(weights: str, kv: str, kind: str, way: str):
    """On the engine that users have: Plans, levels, counted work and logits are equal."""
    engine = native(weights, kv)
    if kind in ("recurrent", "mlp"):  # predictors whose authors are asked
        method = ModulatorMethod(tiny_modulator(engine.shape, kind), 0.5, EVERYWHERE)
    else:
        method = method_for(engine, kind)
    if kind in ("stand-ins", "ladder"):
        method = ModulatorMethod(method.modulator, 0.5, EVERYWHERE)
    whole, logits = read(engine, method, None, [N])
    pieces, again = read(engine, method, None, WAYS[way])
    assert torch.equal(logits, again)
    assert pieces.plan.equals(whole.plan)
    assert np.array_equal(pieces.levels, whole.levels)
    assert pieces.cost == whole.cost
    whole.close()
    pieces.close()


def test_generate_says_what_the_prompt_is(llama: Any):
    """In transformers and in the engine the same tokens rest; padding is no part of a prompt."""
    modulator, engine = tiny_modulator(shape_of(llama)), Engine.from_model(llama)
    prompt = tokens(30)
    with attach(llama, modulator, 0.5) as run:
        out = llama.generate(prompt, max_new_tokens=8, do_sample=False)
    assert "generate" not in vars(llama)
    alone, sequence = engine.generate(prompt[0].tolist(), modulator, 0.5, max_new_tokens=8, stop=())
    assert out[0, 30:].tolist() == alone
    assert run.plan.equals(sequence.plan)
    assert resting(run.plan, engine.shape, slice(0, 29))
    assert not resting(run.plan, engine.shape, slice(29, 37))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], 1)
    mask = (torch.arange(35) >= 5).long()[None]
    with attach(llama, modulator, 0.5) as run:
        llama.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert run.plan.equals(sequence.plan)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp32"])
def test_the_native_core_rests_on_prompts(weights: str):
    """Prompt tokens that come one by one, as the last chunk of a long prompt may, too."""
    engine = Engine.from_model(tiny(), weights=weights)
    modulator = modulator_for(engine.shape, "plain")
    dense = engine.start(Dense())
    sequence = engine.start(modulator, 0.5)
    sequence.begin_prompt(20)
    ids = tokens(30)[0].tolist()
    for i, token in enumerate(ids):
        logits, expected = engine.forward([(sequence, [token]), (dense, [token])])
        assert bool((logits == expected).all()) == (i < 19)
    assert resting(sequence.plan, engine.shape, slice(0, 19))
    assert (
        sequence.token_costs["flops_modulator"].astype(bool).tolist() == [False] * 19 + [True] * 11
    )
    priced = price_tokens(
        sequence.plan, engine.shape, sequence.overhead, released=sequence.released
    )
    for name, values in sequence.token_costs.items():
        np.testing.assert_array_equal(values, priced[name], err_msg=name)


def test_a_second_turn_is_a_prompt_too(llama: Any):
    engine = Engine.from_model(llama)
    sequence = engine.start(tiny_modulator(engine.shape), 0.5)
    for seed in range(2):
        list(engine.stream(sequence, tokens(20, seed=seed)[0].tolist(), max_new_tokens=6, stop=()))
    # Of six tokens written, the last is not fed back.
    expected = [True] * 19 + [False] * 6 + [True] * 19 + [False] * 6
    assert sequence.phase("prompt").tolist() == expected
    assert (~sequence.released).tolist() == expected
    assert [resting(sequence.plan, engine.shape, slice(t, t + 1)) for t in range(50)] == expected


def test_a_fork_keeps_what_was_prompt(llama: Any):
    engine = Engine.from_model(llama)
    sequence = engine.start(tiny_modulator(engine.shape), 0.5)
    sequence.begin_prompt(PROMPT)
    engine.forward([(sequence, tokens(PROMPT)[0].tolist())])
    fork = engine.fork(sequence)
    tail = tokens(9, seed=4)[0].tolist()
    a, b = engine.forward([(sequence, tail), (fork, tail)], "all")
    assert (a - b).abs().max() < 1e-9
    assert fork.plan.equals(sequence.plan)
    assert fork.phase("generated").sum() == 10


def test_phases_without_a_modulator_are_refused(llama: Any):
    engine = Engine.from_model(llama)
    with pytest.raises(VesicleError, match=r"^phases is .*, and method is Dense, which has"):
        engine.start(Dense(), phases=EVERYWHERE)
