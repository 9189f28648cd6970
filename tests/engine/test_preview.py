"""The previewed LM head: some words exactly, the others as few directions have them."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engine.decoding import IDS as LONG
from tests.engine.decoding import VOCABULARY, modulator_for
from tests.engine.test_head import BOTH, WEIGHTS, decoded, engine_for
from tests.tiny import randomise, tiny_model, tokens
from vesicle.cost import price, price_tokens
from vesicle.engine import Engine, Sampling, core
from vesicle.errors import VesicleError
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.plan import Plan, Replay, StandIns
from vesicle.preview import HeadPreview
from vesicle.reference.attach import Soft, attach

IDS = LONG[:100]
RANK = 5


def preview_for(width: int, rank: int = RANK, seed: int = 0) -> HeadPreview:
    """Random orthonormal directions; all of them lose nothing."""
    preview = HeadPreview(rank, width)
    basis = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    ).Q
    preview.down.copy_(basis[:, :rank].T)
    preview.up.copy_(basis[:, :rank])
    return preview


def previewed(engine: Engine, exact: int, field: str = "likeliest") -> Plan:
    """Rest, but for the head, of which two tokens of three preview the most."""
    words = np.where(np.arange(len(IDS)) % 3 > 0, exact, 0).astype(np.int32)
    return Plan.rest(engine.shape, len(IDS)).with_fields(**{field: words})


def replay(engine: Engine, plan: Plan, rank: int = RANK) -> Replay:
    return Replay(plan, StandIns(head=preview_for(engine.shape.width, rank)))


@BOTH
@pytest.mark.parametrize("weights", ["int4", "int8", "fp32", "bf16"])
def test_where_all_words_are_exact_it_is_the_whole_head(path: str, weights: str):
    engine = engine_for(path, weights)
    whole = Replay(Plan.rest(engine.shape, len(IDS)))
    sequence, tokens = decoded(engine, replay(engine, previewed(engine, VOCABULARY)))
    expected = decoded(engine, whole)[1]
    same = np.mean([a == b for a, b in zip(tokens, expected, strict=True)])
    assert same >= (0.95 if weights == "bf16" else 1)
    assert sequence.plan.equals(previewed(engine, VOCABULARY))
    logits = engine.forward([(engine.start(whole), IDS)], "all")[0]
    found = engine.forward(
        [(engine.start(replay(engine, previewed(engine, VOCABULARY, "logits"))), IDS)], "all"
    )[0]
    close = torch.isclose(found, logits, rtol=1e-3, atol=2e-2 if weights == "bf16" else 1e-4)
    # An activation that lies between two codes may be rounded otherwise: one token of a hundred.
    assert close.float().mean() >= (1 if path == "native" else 0.98)


@BOTH
@pytest.mark.parametrize("weights", ["int8", "fp32"])
def test_others_keep_what_the_preview_says(path: str, weights: str):
    """With all directions a preview is the head, but for rounding; with few, others are not."""
    engine = engine_for(path, weights)
    width = engine.shape.width
    whole = engine.forward([(engine.start(), IDS)], "all")[0]
    rough = engine.forward(
        [(engine.start(replay(engine, previewed(engine, 1, "logits"), width)), IDS)], "all"
    )[0]
    spread = whole.std()
    assert (rough - whole).abs().max() < 0.1 * spread
    if weights == "int8":
        assert not torch.equal(rough, whole)
    few = engine.forward(
        [(engine.start(replay(engine, previewed(engine, 9, "logits"))), IDS)], "all"
    )[0]
    wrong = ((few - whole).abs() > 1e-3 * spread).sum(-1)
    assert wrong[::3].max() == 0
    assert wrong[1::3].max() <= VOCABULARY - 9
    assert wrong[1::3].min() > 0.5 * (VOCABULARY - 9)


@BOTH
@pytest.mark.parametrize("weights", ["int8", "fp32", "bf16"])
@pytest.mark.parametrize("exact", [1, 9])
def test_the_likeliest_is_the_best_of_the_exact(path: str, weights: str, exact: int):
    """What `likeliest` finds is the largest of those logits that `logits` has exact."""
    engine = engine_for(path, weights)
    _, tokens = decoded(engine, replay(engine, previewed(engine, exact)))
    made = engine.previews.of(preview_for(engine.shape.width))
    hidden = engine.start(replay(engine, previewed(engine, exact, "logits")))
    rows = engine.forward([(hidden, IDS)], "all")[0]
    whole = engine.forward([(engine.start(), IDS)], "all")[0]
    agree = 0
    for t, token in enumerate(tokens):
        if t % 3 == 0:
            agree += token == int(whole[t].argmax())
            continue
        chosen = (rows[t] - whole[t]).abs() < 1e-4 * whole.std()
        assert chosen.sum() >= exact
        agree += token == int(torch.where(chosen, whole[t], -torch.inf).argmax())
    assert agree >= 0.9 * len(tokens)
    assert made.bytes_held > 0


@pytest.mark.skipif(not core.available(), reason="the core is not built here")
@pytest.mark.parametrize("weights", ["int4", "int8", "fp32"])
@pytest.mark.parametrize("exact", [1, 7, VOCABULARY])
def test_both_paths_agree(weights: str, exact: int):
    """From the same cache each time, as in `test_decode`; words at the edge may be exact in one."""
    native, general = engine_for("native", weights), engine_for("general", weights)
    general.pool = native.pool
    method = replay(native, previewed(native, exact, "logits"))
    a, same = native.start(method), []
    native.forward([(a, IDS[:40])], "none")
    for t in range(40, 100):
        b = general.start(method)
        b.cache = a.cache.fork(t)
        x, y = (e.forward([(s, [IDS[t]])])[0][0] for e, s in ((native, a), (general, b)))
        assert a.plan.tokens(t).equals(b.plan)
        assert {n: v[-1] for n, v in a.token_costs.items()} == {
            n: v[-1] for n, v in b.token_costs.items()
        }
        same.append(((x - y).abs() < 0.02 * y.std()).float().mean())
    assert np.mean(same) >= 0.97


@BOTH
@WEIGHTS
def test_a_batch_gives_what_one_alone_gives(path: str, weights: str):
    engine = engine_for(path, weights)
    method = replay(engine, previewed(engine, 7, "logits"))
    alone = [engine.forward([(engine.start(method), IDS[i : i + 20])], "all")[0] for i in (0, 20)]
    batch = [(engine.start(method), IDS[i : i + 20]) for i in (0, 20)]
    together = engine.forward(batch, "all")
    for one, other in zip(alone, together, strict=True):
        if path == "native":
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    pieces = engine.start(method)
    cut = torch.cat([engine.forward([(pieces, part)], "all")[0] for part in (IDS[:7], IDS[7:20])])
    if path == "native":
        assert torch.equal(cut, alone[0])


@BOTH
@pytest.mark.parametrize("weights", ["int4", "int8", "fp32", "bf16"])
@pytest.mark.parametrize("field", ["likeliest", "logits"])
def test_priced_as_counted(path: str, weights: str, field: str):
    engine = engine_for(path, weights)
    plan = previewed(engine, 7, field)
    method = replay(engine, plan)
    sequence = engine.start(method)
    if field == "likeliest":
        engine.likeliest([(sequence, IDS[:30])])
        for i in IDS[30:]:
            engine.likeliest([(sequence, [i])])
        ran = np.arange(len(IDS)) >= 29
    else:
        engine.forward([(sequence, IDS[:30])], "all")
        engine.forward([(sequence, IDS[30:])], "all")
        ran = np.ones(len(IDS), bool)
    wanted = getattr(plan, field) * ran
    assert getattr(sequence.plan, field).tolist() == wanted.tolist()
    overhead = method.overhead(engine.shape)
    prices = price_tokens(sequence.plan, engine.shape, overhead, with_logits=ran)
    for name, values in prices.items():
        np.testing.assert_array_equal(sequence.token_costs[name], values, err_msg=name)
    assert sequence.cost == price(sequence.plan, engine.shape, overhead, with_logits=ran)
    d, v = engine.shape.width, VOCABULARY
    head = sequence.token_costs["flops_head"]
    assert head[30] == 2 * d * v
    assert head[31] == 2 * (RANK * (d + v) + 7 * d)


@BOTH
def test_a_plan_that_was_executed_replays(path: str):
    engine = engine_for(path)
    method = ModulatorMethod(with_preview(engine, likeliest=9, logits=30), 0.5)
    sequence, tokens = decoded(engine, method, prefill=20)
    plan = sequence.plan
    assert set(plan.likeliest[20:]) == {9}
    assert set(plan.logits) == {0}
    again, same = decoded(engine, Replay(plan, method.stand_ins), prefill=20)
    assert again.plan.equals(plan)
    assert same == tokens
    logits = engine.start(method)
    engine.forward([(logits, IDS)], "all")
    assert set(logits.plan.logits) == {30}
    assert set(logits.plan.likeliest) == {0}


def with_preview(engine: Engine, **settings: int | float) -> Modulator:
    """Levels on both sides of a half, and a preview."""
    modulator = modulator_for(engine.shape, "plain")
    gaba = type(modulator.gaba)(**{**modulator.gaba.to_dict(), **settings})
    return Modulator(
        modulator.predictor,
        {**modulator.effectors, "gaba": gaba},
        modulator.info,
        ffn_standin=modulator.ffn_standin,
        attention_standin=modulator.attention_standin,
        head_preview=preview_for(engine.shape.width),
    )


@BOTH
def test_without_a_preview_the_whole_head_runs(path: str):
    engine = engine_for(path)
    plan = previewed(engine, 7)
    sequence, tokens = decoded(engine, Replay(plan))
    assert tokens == decoded(engine, Replay(Plan.rest(engine.shape, len(IDS))))[1]
    assert set(sequence.plan.likeliest) == {0}


@BOTH
def test_one_that_was_written_to_is_made_anew(path: str):
    engine = engine_for(path)
    preview = preview_for(engine.shape.width)
    before = engine.previews.of(preview)
    assert engine.previews.of(preview) is before
    with torch.no_grad():
        preview.up.mul_(2)
    assert engine.previews.of(preview) is not before


def test_another_width_is_refused():
    engine = engine_for("general")
    with pytest.raises(VesicleError, match="width 999"):
        engine.start(Replay(Plan.rest(engine.shape, 1), StandIns(head=preview_for(999, 1))))


@pytest.mark.parametrize("wanted", ["all", "last", "some"])
def test_the_reference_computes_the_same(wanted: str):
    model = tiny_model("llama")
    engine = Engine.from_model(model, weights="fp32", kv="fp32")
    ids = tokens(60)[0]
    plan = previewed(engine, 9, "logits").tokens(0, 60)
    method = replay(engine, plan)
    expected = engine.forward([(engine.start(method), ids.tolist())], "all")[0]
    chosen = {"all": slice(None), "last": slice(-1, None), "some": torch.tensor([3, 4, 50])}[wanted]
    keep = {"all": 0, "last": 1, "some": chosen}[wanted]
    with attach(model, method) as run, torch.no_grad():
        found = model(ids[None], logits_to_keep=keep).logits[0]
    close = (found - expected[chosen]).abs() < 1e-3
    assert close.float().mean() > 0.99  # words at the edge may be exact in one alone
    assert run.plan.equals(plan)
    assert run.cost == price(plan, run.shape, method.overhead(run.shape))


def test_training_charges_what_execution_does():
    """Straight-through masks decide as execution does, so that the shares are the same."""
    model = tiny_model("llama")
    engine = Engine.from_model(model, weights="fp32", kv="fp32")
    ids, saved = tokens(60), []
    for soft in (Soft(), None):
        shares = []
        for logits in (0, 20):
            method = ModulatorMethod(with_preview(engine, logits=logits), 0.5)
            with attach(model, method, soft=soft) as run, torch.no_grad():
                model(ids)
            dense = price(Plan.rest(run.shape, 60), run.shape).flops_total
            shares.append(float(run.charged.share) if soft else run.cost.flops_total / dense)
        saved.append(shares[0] - shares[1])
    assert saved[0] > 0.01
    assert saved[0] == pytest.approx(saved[1], rel=1e-6)


def test_not_finite_scores_are_told():
    engine = engine_for("native") if core.available() else engine_for("general")
    preview = preview_for(engine.shape.width)
    with torch.no_grad():
        preview.down[0] = torch.inf
    method = Replay(previewed(engine, 3), StandIns(head=preview))
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[:1])], "none")
    with pytest.raises(VesicleError, match="finite"):
        engine.likeliest([(sequence, [IDS[1]])])


WORDS = 6000


def many_words(misleading: bool) -> Engine:
    """Enough words that few are looked at closely; in the worst case those few tell a lie."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    randomise(model, 0)
    if misleading:  # the native core looks at every 32nd score first
        with torch.no_grad():
            model.lm_head.weight[::32] *= 50
    return Engine.from_model(model.eval(), weights="int8", kv="fp32")


@pytest.mark.skipif(not core.available(), reason="the core is not built here")
@pytest.mark.parametrize("misleading", [False, True])
@pytest.mark.parametrize("exact", [1, 90, 700, WORDS])
def test_the_best_of_many_words_are_found(misleading: bool, exact: int):
    """Those that are exact are the best by all the scores that the preview gives."""
    engine = many_words(misleading)
    ids = [i % WORDS for i in range(7, 7 + 40 * 13, 13)]
    plan = Plan.rest(engine.shape, len(ids))
    method = Replay(
        plan.with_fields(logits=np.full(len(ids), exact, np.int32)),
        StandIns(head=preview_for(64, 40)),
    )
    one = Replay(
        plan.with_fields(logits=np.full(len(ids), 1, np.int32)), StandIns(head=preview_for(64, 40))
    )
    whole, found, rough = (
        engine.forward([(engine.start(how), ids)], "all")[0] for how in (None, method, one)
    )
    for t in range(len(ids)):
        best = rough[t].topk(exact).indices
        expected = rough[t].scatter(0, best, whole[t, best])
        close = torch.isclose(found[t], expected, rtol=1e-4, atol=1e-3 * float(whole[t].std()))
        # `rough` itself has one that is exact, which may have left or entered the best.
        assert int((~close).sum()) <= 2


@BOTH
@pytest.mark.parametrize("weights", ["int4", "int8", "fp32", "bf16"])
@pytest.mark.parametrize("exact", [0, 9, VOCABULARY])
def test_drawn_tokens_are_the_likeliest_of_moved_logits(path: str, weights: str, exact: int):
    """Noise comes before the words are chosen, so that few exact ones hold what is drawn."""
    engine, sampling = engine_for(path, weights), Sampling(temperature=0.8)
    generator = sampling.generator()
    noises = [sampling.noise(VOCABULARY, generator) for _ in IDS]
    width = engine.shape.width
    sequence = engine.start(replay(engine, previewed(engine, exact), width))
    drawn = [
        engine.likeliest([(sequence, [i])], [noise])[0]
        for i, noise in zip(IDS, noises, strict=True)
    ]
    assert sequence.noise is None
    assert sequence.plan.equals(previewed(engine, exact))
    other = engine.start()
    rows = [engine.forward([(other, [i])])[0][-1].float() for i in IDS]
    agree = [
        token == int((row + noise).argmax())
        for token, row, noise in zip(drawn, rows, noises, strict=True)
    ]
    assert np.mean(agree) >= (1 if exact == 0 else 0.93)
    plain = [int(row.argmax()) for row in rows]
    assert np.mean([a == b for a, b in zip(drawn, plain, strict=True)]) < 0.9


@BOTH
def test_a_drawn_token_is_not_found_by_leading_bits(path: str):
    """Those rank the likeliest of unmoved logits; the Plan says that all words were exact."""
    engine, sampling = engine_for(path, "int8"), Sampling(temperature=0.8)
    heads = np.full(len(IDS), 8, np.int32)
    plan = Plan.rest(engine.shape, len(IDS)).with_fields(head=heads)
    drawn, greedy = (engine.start(Replay(plan)) for _ in range(2))
    noise = sampling.noise(VOCABULARY, sampling.generator())
    engine.likeliest([(drawn, IDS[:1]), (greedy, IDS[:1])], [noise, None])
    assert drawn.plan.rows["head"][0, -1] == 0
    assert greedy.plan.rows["head"][0, -1] == 8


@BOTH
def test_sampling_previews_the_head(path: str):
    """A text that is sampled ranks `likeliest` words; a nucleus is drawn from the whole head."""
    engine = engine_for(path, "int8")
    rest = Plan.rest(engine.shape, len(IDS))
    few = np.full(len(IDS), 9, np.int32)
    plan = rest.with_fields(likeliest=few, logits=few * 2)
    for top_p, likeliest, logits in ((1.0, 9, 0), (0.9, 0, 0)):
        sampling = Sampling(temperature=0.9, top_p=top_p, seed=4)
        sequence = engine.start(replay(engine, plan))
        tokens = engine.stream(sequence, IDS[:5], max_new_tokens=6, sampling=sampling, stop=())
        assert len(list(tokens)) == 6
        last = sequence.plan.rows[:, -1]
        assert last["likeliest"][4:].tolist() == [likeliest] * 6
        assert last["logits"][4:].tolist() == [logits] * 6


@BOTH
@pytest.mark.parametrize(
    "noises",
    [[torch.zeros(3)], [torch.zeros(VOCABULARY).double()], [], [None, None]],
    ids=["short", "double", "none", "too many"],
)
def test_noise_of_another_shape_is_refused(path: str, noises: list[torch.Tensor | None]):
    engine = engine_for(path)
    sequence = engine.start()
    with pytest.raises(VesicleError, match=r"allowed: (one each|float32 of)"):
        engine.likeliest([(sequence, IDS[:3])], noises)
    assert sequence.length == 0
    assert sequence.noise is None
