"""Reports charge an answer token with the pass that computed its logits, and fit any terminal."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from tests.tiny import tiny_model, tiny_modulator, tokens
from vesicle.cost import price, price_tokens
from vesicle.engine import Engine, Sequence
from vesicle.eviction import SinksAndRecent
from vesicle.modulator import Modulator
from vesicle.phases import EVERYWHERE, Phases
from vesicle.plan import FFN_SKIP, Dense, Method, Plan, Replay
from vesicle.report import Answer, answer_shares, heat_strip, scaled, show
from vesicle.transmitters import NAMES

PROMPT, NEW = 21, 6


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_model(tiny_model("llama"))


@pytest.fixture
def modulator(engine: Engine) -> Modulator:
    return tiny_modulator(engine.shape)


def generate(engine: Engine, method: Method) -> tuple[Sequence, list[int]]:
    sequence = engine.start(method)
    stream = engine.stream(sequence, tokens(PROMPT)[0].tolist(), max_new_tokens=NEW)
    return sequence, list(stream)


def answer_of(engine: Engine, method: Method) -> Answer:
    sequence, ids = generate(engine, method)
    return Answer.of(
        sequence,
        prompt_tokens=PROMPT,
        text="a b\nc",
        token_ids=ids,
        pieces=["a", " b", "\n", "c", "\x1b", "日"],
        prefill_s=0.5,
        decode_s=2.0,
    )


def console(width: int = 80, **settings: object) -> Console:
    return Console(file=io.StringIO(), width=width, **settings)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_dense_answers_cost_what_dense_costs(engine: Engine):
    answer = answer_of(engine, Dense())
    assert answer.executed == answer.dense
    assert answer.shares == [1.0] * NEW
    assert set(answer.levels.values()) == {1.0}
    assert answer.released == ()


def test_counted_shares_are_the_plans_prices(engine: Engine, modulator: Modulator):
    method = modulator.at(0.5)
    sequence, _ = generate(engine, method)
    heads = np.arange(sequence.length) >= PROMPT - 1  # from the prompt's last token on
    overhead = method.overhead(engine.shape)
    where = {"with_logits": heads, "released": sequence.released}
    assert sequence.cost == price(sequence.plan, engine.shape, overhead, **where)
    costs = price_tokens(sequence.plan, engine.shape, overhead, **where)
    rest = price_tokens(Plan.rest(engine.shape, sequence.length), engine.shape, with_logits=heads)
    flops, dense = (
        sum(v for k, v in table.items() if k.startswith("flops_")) for table in (costs, rest)
    )
    expected = (flops / dense)[PROMPT - 1 :]
    np.testing.assert_allclose(answer_shares(sequence, PROMPT), expected, rtol=0)


@pytest.mark.parametrize("token", range(NEW))
def test_a_token_is_charged_with_the_pass_before_it(engine: Engine, token: int):
    rest = Plan.rest(engine.shape, PROMPT + NEW - 1)
    ffn = rest.ffn.copy()
    ffn[PROMPT - 1 + token] = FFN_SKIP
    shares = answer_of(engine, Replay(rest.with_fields(ffn=ffn))).shares
    assert [share < 1 for share in shares] == [place == token for place in range(NEW)]


def test_levels_are_means_of_what_was_released(engine: Engine, modulator: Modulator):
    sequence, _ = generate(engine, modulator.at(0.5))
    answer = answer_of(engine, modulator.at(0.5))
    generated = sequence.levels[PROMPT - 1 :]  # nothing is released on a prompt
    assert answer.levels["gaba"] == pytest.approx(generated[..., 2].mean())
    assert answer.levels["acetylcholine"] == answer.levels["noradrenaline"] == 1.0
    assert answer.released == ("dopamine", "serotonin", "gaba")
    assert answer.phases == dict.fromkeys(answer.released, "generated")


@pytest.mark.parametrize("phases", [Phases(), EVERYWHERE])
def test_shares_by_phase_add_up(engine: Engine, modulator: Modulator, phases: Phases):
    answer = answer_of(engine, modulator.at(0.5, phases))
    prompt, generated = answer.by_phase["prompt"], answer.by_phase["generated"]
    assert (prompt.tokens, generated.tokens) == (PROMPT - 1, NEW)
    assert prompt.flops + generated.flops == answer.executed.flops_total
    assert prompt.dense_flops + generated.dense_flops == answer.dense.flops_total
    assert (prompt.share == 1) == (phases == Phases())
    assert generated.share < 1


def test_a_replayed_plan_has_no_levels(engine: Engine):
    answer = answer_of(engine, Replay(Plan.rest(engine.shape, PROMPT + NEW)))
    assert answer.levels is None


def test_speeds_count_passes(engine: Engine):
    answer = answer_of(engine, Dense())
    assert answer.prefill_tokens_per_s == PROMPT / 0.5
    assert answer.decode_tokens_per_s == (NEW - 1) / 2.0
    assert answer.to_dict()["first_token_ms"] == 500
    assert replace(answer, decode_passes=0).decode_tokens_per_s is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("weights", "kv"), [("int4", "int8"), ("int8", "fp16"), ("bf16", "bf16")])
def test_bytes_held_are_close_to_the_packed_size(weights: str, kv: str, tied: bool):
    config = transformers.LlamaConfig(  # whole groups of channels and tiles: nothing is padded
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some weights would end the text early
        model = transformers.AutoModelForCausalLM.from_config(config)
    engine = Engine.from_model(model, weights=weights, kv=kv)
    facts = answer_of(engine, Dense()).engine
    assert (facts.weights, facts.kv) == (weights, kv)
    norms = 4 * engine.shape.width * (2 * engine.shape.n_layers + 1)
    blocks = engine.shape.n_layers * engine.pool.bytes_per_block
    held, packed = facts.weight_bytes + facts.kv_bytes, facts.packed_bytes
    assert packed < held <= packed + norms + blocks
    assert facts.packed_ratio == held / packed


def test_whose_levels_act_where_memory_is_a_share(engine: Engine, modulator: Modulator):
    plain = answer_of(engine, modulator.at(0.5))
    within = answer_of(engine, SinksAndRecent(64, inner=modulator.at(0.5)))
    assert within.released == plain.released
    assert within.phases == plain.phases
    assert within.levels == plain.levels  # of a text too short to forget from
    dense = answer_of(engine, SinksAndRecent(64))
    assert dense.levels == dict.fromkeys(NAMES, 1.0)
    assert dense.released == ()


def test_report_names_everything(engine: Engine, modulator: Modulator):
    out = console(120)
    answer = answer_of(engine, modulator.at(0.5))
    show(answer, out, budget=0.5, compared=answer_of(engine, Dense()))
    text = printed(out)
    for name in ("dopamine 0.", "serotonin 0.", "gaba 0.", "resting: acetylcholine, noradrenaline"):
        assert name in text
    for name in (
        "FLOPs",
        "weights read",
        "KV read",
        "KV held",
        "prefill",
        "decode",
        "first token after 500 ms",
        "(fp64)",
        "of their packed size",
        "thread",
        "dense answer",
    ):
        assert name in text
    assert "0.5 asked for" in text
    assert "\x1b" not in text


def test_heat_in_colour_and_without():
    pieces, shares = (
        ["The", " sky", "\n", " is", " 日本", "\x1b[2J"],
        [0.3, 1.0, 0.5, 0.96, 0.7, 1.2],
    )
    colour = console(force_terminal=True, color_system="truecolor", no_color=False)
    colour.print(heat_strip(pieces, shares, colour))
    assert "48;2;" in printed(colour)
    assert "\x1b[2J" not in printed(colour)
    plain = console()
    plain.print(heat_strip(pieces, shares, plain))
    lines = [line.rstrip() for line in printed(plain).splitlines()]
    assert lines[:4] == ["The sky↵", "3  +   5", " is 日本\\x1b[2J", "9  7    +"]
    silent = console(force_terminal=True, color_system="truecolor", no_color=True)
    silent.print(heat_strip(pieces, shares, silent))
    assert "\x1b[" not in printed(silent)


def test_heat_wraps_text_and_digits_together():
    out = console(20)
    out.print(heat_strip([" word"] * 9, [0.2, *[0.7] * 8], out))
    rows = printed(out).splitlines()[:6]
    assert rows[0::2] == [" word" * 4, " word" * 4, " word"]
    assert [row.split() for row in rows[1::2]] == [list("2777"), list("7777"), ["7"]]


def test_heat_of_equal_shares_is_one_line():
    out = console()
    out.print(heat_strip(["a", "b"], [1.0, 1.0], out))
    assert printed(out) == "every token got 1.00 of its dense FLOPs\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_345, "12.3 kB"),
        (999_600, "1.00 MB"),
        (1.234e9, "1.23 GB"),
        (99_960_000, "100 MB"),
    ],
)
def test_scaled(value: float, shown: str):
    assert scaled(value, "B") == shown
