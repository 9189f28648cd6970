"""Runs of evolution on a tiny model: contexts that are read once, folders that are gone on with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vesicle.engine import Engine
from vesicle.errors import DataError, VesicleError
from vesicle.evaluation.run.lines import JsonLines
from vesicle.evolution import EvolveConfig, Question, evolve
from vesicle.evolution.contexts import Context
from vesicle.namm import Namm, NammMemory, NammSettings
from vesicle.plan import Dense

SETTINGS = NammSettings(network="mlp", hidden=4, interval=32, observes=32, sinks=2, recent=16)
CONFIG = EvolveConfig(generations=4, population=5, contexts=2, held_out_every=2, memory=(0.5,))


def questions(n: int, seed: int = 0) -> list[Question]:
    rng = np.random.default_rng(seed)
    return [
        Question(
            id=str(i),
            context=rng.integers(1, 97, 90 + i).tolist(),
            lead=rng.integers(1, 97, i % 3).tolist(),
            answer=rng.integers(1, 97, 4).tolist(),
        )
        for i in range(n)
    ]


def long_questions(n: int) -> list[Question]:
    """With contexts that are long enough to be repeated."""
    return [replace(q, context=[*q.context, *q.context, *q.context[5:60]]) for q in questions(n)]


@pytest.fixture
def engine(llama: Any) -> Engine:
    return Engine.from_model(llama)


def size_of(engine: Engine) -> tuple[int, int]:
    """(L, G)."""
    return engine.shape.n_layers, engine.shape.n_kv_heads


def start(engine: Engine) -> Namm:
    return Namm.fresh(SETTINGS, engine.shape)


def drawn(engine: Engine, seed: int) -> Namm:
    rng = np.random.default_rng(seed)
    return Namm(
        settings=SETTINGS,
        parameters=rng.normal(size=SETTINGS.n_parameters).astype(np.float32),
        profile=rng.normal(size=size_of(engine)).astype(np.float32),
    )


@pytest.mark.parametrize("gated", [False, True])
def test_a_candidate_is_tried_as_it_would_run(engine: Engine, gated: bool):
    """The last eviction falls on the context's last whole block, where a context is 96 long."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 97, 32).tolist()
    question = Question(id="a", context=ids, lead=[5], answer=[7, 8, 9])
    gates = rng.normal(size=(*size_of(engine), 2 * engine.shape.head_size + 1)).astype(np.float32)
    gates = gates if gated else gates[:0, :0, :0]
    ages = rng.normal(size=gates.shape[:2]).astype(np.float32)
    context = Context(engine, question, SETTINGS, gates)
    for seed in range(3):
        namm = replace(drawn(engine, seed), gates=gates, ages=ages)
        sequence = engine.start(NammMemory(namm, memory=0.5))
        engine.forward([(sequence, ids)], "none")
        logits = engine.forward([(sequence, [5, 7, 8])], "all")[0].log_softmax(-1)
        nats = -float(logits.gather(1, torch.tensor([[7], [8], [9]])).sum())
        found = context.excess([namm, namm], 0.5)
        assert found == pytest.approx((nats - context.full) / 3, abs=1e-5)
    context.close()


def test_a_context_of_whole_blocks_with_nothing_behind_it(engine: Engine):
    ids = np.random.default_rng(1).integers(1, 97, 64).tolist()
    context = Context(engine, Question(id="a", context=ids, lead=[], answer=[7, 8]), None)
    logits = engine.forward([(engine.start(), [*ids, 7])], "all")[0][-2:].log_softmax(-1)
    expected = -float(logits.gather(1, torch.tensor([[7], [8]])).sum())
    assert context.full == pytest.approx(expected, abs=1e-5)
    context.close()


def test_the_cache_is_as_it_was_after_candidates(engine: Engine):
    context = Context(engine, questions(1)[0], SETTINGS)
    before = engine.pool.bytes_in_use
    candidates = [drawn(engine, i) for i in range(11)]
    once = context.excess(candidates, 0.25)
    assert engine.pool.bytes_in_use == before
    assert (context.excess(candidates, 0.25) == once).all()
    assert len(set(once.tolist())) > 1
    context.close()
    assert engine.pool.bytes_in_use == 0


def test_all_of_the_cache_loses_nothing(engine: Engine):
    context = Context(engine, questions(1)[0], SETTINGS)
    assert context.excess([drawn(engine, 0)], 1.0) == pytest.approx(0, abs=1e-6)
    context.close()


def lines(out: Path) -> list[dict[str, Any]]:
    found = JsonLines(out / "generations.jsonl").found
    for line in found:
        line.pop("elapsed_s", None)
    return found


@pytest.mark.parametrize(
    ("begin", "cut"),
    [
        ("as-is", "after a line"),
        ("as-is", "before the first"),
        ("repetition", "within a line"),
    ],
)
def test_gone_on_with_as_if_it_had_not_been_cut_off(
    engine: Engine, tmp_path: Path, cut: str, begin: str
):
    train, judges = long_questions(4), questions(2, 9)
    whole, part = tmp_path / "whole", tmp_path / "part"
    config = replace(CONFIG, begin=begin)
    expected = evolve(engine, start(engine), train, judges, config, whole, request=[1, 2])
    evolve(engine, start(engine), train, judges, config, part, request=[1, 2])
    assert (expected.namm.gates.size > 0) == (begin == "repetition")
    path = part / "generations.jsonl"
    kept = path.read_bytes().split(b"\n")[:3]
    match cut:
        case "after a line":
            path.write_bytes(b"\n".join(kept) + b"\n")
        case "within a line":
            path.write_bytes(b"\n".join(kept)[:-20])
        case "before the first":
            path.unlink()
    found = evolve(engine, start(engine), train, judges, config, part, request=[1, 2])
    assert lines(part) == lines(whole)
    assert found.namm.digest() == expected.namm.digest()
    for name in ("namm.json", "namm.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_a_profile_by_ablation(engine: Engine, tmp_path: Path):
    """A head's part is what answers lose where it alone forgets, measured as a candidate is."""
    from vesicle.evolution.ablation import by_ablation

    size = size_of(engine)
    contexts = [Context(engine, question, None) for question in questions(3)]
    namm, lost = start(engine), np.zeros(size)
    for head in np.ndindex(size):
        others = np.full(size, 40.0, np.float32)
        others[head] = -40  # as good as nothing: what always stays
        alone, full = replace(namm, profile=others), 1 - (1 - 32 / 80) / lost.size
        lost[head] = np.mean([c.excess([alone], full)[0] for c in contexts])
    found = np.mean([c.excess_without(namm) for c in contexts], axis=0)
    assert found == pytest.approx(lost, abs=1e-5)
    profile = by_ablation(namm, found).profile
    expected = np.log(np.maximum(lost, 0.01 * lost.max()))
    assert profile == pytest.approx(expected, abs=1e-3)
    for context in contexts:
        context.close()
    train, judges = questions(4), questions(2, 9)
    config = replace(CONFIG, evolves="profile", begin="ablation")
    once = evolve(engine, start(engine), train, judges, config, tmp_path)
    assert Namm.load(tmp_path / "start").profile.any()
    again = evolve(engine, start(engine), train, judges, replace(config, generations=5), tmp_path)
    assert again.lines[:5] == once.lines


def test_ablation_is_for_a_profile():
    with pytest.raises(ValueError, match="'ablation' is for a profile, and evolves is 'network'"):
        EvolveConfig(begin="ablation", evolves="network")


def test_more_generations_go_on(engine: Engine, tmp_path: Path):
    train, judges = questions(4), questions(2, 9)
    evolve(engine, start(engine), train, judges, replace(CONFIG, generations=2), tmp_path)
    found = evolve(engine, start(engine), train, judges, CONFIG, tmp_path)
    assert [line["generation"] for line in found.lines] == [0, 1, 2, 3, 4]
    assert found.held_out <= found.started_at
    again = evolve(engine, start(engine), train, judges, CONFIG, tmp_path)
    assert again.held_out == found.held_out


def test_what_cannot_be_gone_on_with(engine: Engine, tmp_path: Path):
    train, judges = questions(4), questions(2, 9)
    evolve(engine, start(engine), train, judges, CONFIG, tmp_path)
    with pytest.raises(VesicleError, match=r"run of other settings \(sigma\)"):
        evolve(engine, start(engine), train, judges, replace(CONFIG, sigma=1.0), tmp_path)
    with pytest.raises(VesicleError, match=r"run of other settings \(begins\)"):
        evolve(engine, start(engine), train[:3], judges, CONFIG, tmp_path)
    (tmp_path / "generations.jsonl").write_text('{"generation": 7}\n')
    with pytest.raises(VesicleError, match=r"line 1, is no generation 0"):
        evolve(engine, start(engine), train, judges, CONFIG, tmp_path)
    with pytest.raises(DataError, match="needed: 2 and 1"):
        evolve(engine, start(engine), train[:1], judges, CONFIG, tmp_path / "other")
    short = [replace(q, context=q.context[:18]) for q in train]
    with pytest.raises(DataError, match="18 tokens at most, and 18 entries always stay"):
        evolve(engine, start(engine), short, judges, CONFIG, tmp_path / "other")


def test_a_refused_run_does_not_stand_in_the_way(engine: Engine, tmp_path: Path):
    """Contexts of 90 tokens cannot be repeated; nothing was found that could be lost."""
    train, judges = questions(4), questions(2, 9)
    with pytest.raises(DataError, match="to be repeated they need"):
        evolve(engine, start(engine), train, judges, replace(CONFIG, begin="repetition"), tmp_path)
    found = evolve(engine, start(engine), train, judges, CONFIG, tmp_path)
    assert len(found.lines) == 1 + CONFIG.generations
    assert Namm.load(tmp_path).info["generation"] == found.generation


def test_another_method_takes_over(engine: Engine):
    """A fork under another method forgets by that method's rules from there on."""
    ids = np.random.default_rng(0).integers(1, 97, 64).tolist()
    with_memory = engine.start(NammMemory(Namm.fresh(SETTINGS), memory=0.5))
    engine.forward([(with_memory, ids[:32])], "none")
    fork = engine.fork(with_memory, method=Dense())
    engine.forward([(fork, ids[32:])], "none")
    engine.forward([(with_memory, ids[32:])], "none")
    assert fork.cache.bytes_held > with_memory.cache.bytes_held
    assert fork.plan.evict_after.max() == with_memory.plan.evict_after.max()
