"""The HNLPU ledger: laws of prices, what was published, and the command."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import typer

from tests.commands import conftest
from tests.tiny import SHAPE
from vesicle.commands.neurons.hnlpu import hnlpu
from vesicle.cost import Cost, price, price_dense
from vesicle.errors import BudgetError, DataError, VesicleError
from vesicle.neurons.hnlpu import (
    GPT_OSS,
    GPU,
    PUBLISHED,
    WAFER,
    Chip,
    Deployment,
    Estimate,
    Work,
    constants,
    cost_from,
    given_back,
    price_deployment,
    price_on_hnlpu,
    price_on_machine,
    published_price,
    report,
    share_on_published_chip,
    single_decisions,
    tables,
)
from vesicle.neurons.hnlpu.constants import BLOCKS, CHIP_AREA, CHIP_POWER, OVERHEAD
from vesicle.neurons.hnlpu.pricing import price_work
from vesicle.neurons.hnlpu.timing import context_shares
from vesicle.neurons.hnlpu.work import published_work
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL, Plan

model = conftest.model
"""The fixture: a random Llama that reads bytes, as a folder."""

N = 40
TINY = replace(SHAPE, n_layers=3)
EXACT = 1e-9
ROUNDED = 2e-4
"""Published numbers have four digits or more; the area is off by 16 dies of 0.08 mm2."""


def ends(value: Estimate) -> tuple[float, float, float]:
    return value.cautious, value.middle, value.hopeful


def some_plan(seed: int, n_tokens: int = N) -> Plan:
    """A Plan that skips channels, bits, modules and blocks at random."""
    rng = np.random.default_rng(seed)
    rest = Plan.rest(TINY, n_tokens)
    shape = rest.ffn.shape
    return rest.with_fields(
        channels=rng.integers(1, rest.channels + 1, dtype=np.int32),
        bits=rng.choice(np.array([2, 3, 4, 8, 16], np.int32), rest.bits.shape),
        ffn=rng.choice(np.array([FFN_SKIP, FFN_SMALL, FFN_BIG], np.int32), shape),
        attention=rng.integers(0, 2, shape, dtype=np.int32),
        kv_blocks=rng.integers(1, rest.kv_blocks + 1, dtype=np.int32),
    )


def less_than(plan: Plan, seed: int) -> Plan:
    """A Plan that does no more than another anywhere, and less somewhere."""
    rng = np.random.default_rng(seed)
    return plan.with_fields(
        channels=rng.integers(1, plan.channels + 1, dtype=np.int32),
        ffn=np.where(rng.random(plan.ffn.shape) < 0.3, FFN_SKIP, plan.ffn).astype(np.int32),
        attention=np.where(rng.random(plan.ffn.shape) < 0.3, 0, plan.attention).astype(np.int32),
        kv_blocks=rng.integers(1, plan.kv_blocks + 1, dtype=np.int32),
    )


# What was published ------------------------------------------------------------------------------


def test_dense_gpt_oss_gives_back_the_published_numbers():
    found = published_price()
    for estimate, published in (
        (found.tokens_per_s, 249_960),
        (found.tokens_per_joule, 36.226),
        (found.chip.area_mm2, 13_232),
        (found.token_s, 216 / 249_960),
    ):
        assert ends(estimate) == pytest.approx((published,) * 3, rel=ROUNDED)
    assert found.chip.n_chips == 16
    made = found.chip.nre_usd + found.chip.made_usd
    assert (made.low, made.high) == pytest.approx((59.25e6, 123.3e6), rel=5e-4)
    dense = price_dense(GPT_OSS, 1, first_position=2047)
    gpu = price_on_machine(GPU, found, dense, dense)
    wafer = price_on_machine(WAFER, found, dense, dense)
    assert ends(gpu.tokens_per_s) == pytest.approx((45,) * 3, rel=ROUNDED)
    assert ends(wafer.tokens_per_s) == pytest.approx((2940,) * 3, rel=5e-4)
    assert ends(gpu.joules.inverse) == pytest.approx((0.0346,) * 3, rel=1e-3)
    assert ends(wafer.joules.inverse) == pytest.approx((0.1278,) * 3, rel=2e-3)


def test_what_the_ledger_was_not_made_from_agrees_or_is_named_here():
    rows = given_back()
    disagreeing = [row.quantity for row in rows if not row.agrees]
    assert disagreeing == [
        "the same, in its first version",
        "masks saved, 6 billion over ours",
        "one-off, Kimi-K2 at 4 bits",
        "one-off, DeepSeek-V3 at 4 bits",
        "one-off, Llama-3 at 4 bits",
        "one-off, Llama-3 at 16 bits",
    ]
    checked = [row for row in rows if not row.by_making and row.agrees]
    times = [row for row in checked if row.quantity.startswith("time of")]
    assert len(times) == 11
    for row in times:
        assert row.low == pytest.approx(row.published[0], abs=0.001)
    years = [row for row in checked if row.quantity.startswith("three years")]
    assert len(years) == 2
    for row in years:
        assert (row.low, row.high) == pytest.approx(row.published, rel=5e-4)


def test_constants_say_what_they_are():
    found = constants()
    names = [constant.name for constant in found]
    assert len(names) == len(set(names)) > 60
    for constant in found:
        assert constant.kind in ("published", "derived", "assumed")
        assert constant.source
        if constant.kind == "assumed":
            assert constant.low is not None
            assert constant.high is not None
            assert constant.low <= constant.value <= constant.high
    assert sum(block.power.value for block in BLOCKS) == pytest.approx(CHIP_POWER.value)
    assert sum(block.area.value for block in BLOCKS) == pytest.approx(CHIP_AREA.value, abs=0.03)
    assert OVERHEAD.value == pytest.approx(0.398, abs=0.001)
    assert sum(context_shares(100_000).values()) == pytest.approx(1)


# Laws --------------------------------------------------------------------------------------------


def test_at_rest_a_plan_costs_what_the_dense_model_does():
    rest = Plan.rest(TINY, N)
    dense = price_dense(TINY, N)
    executed = price_on_hnlpu(price(rest, TINY), TINY, N, dense=dense, plan=rest)
    assert executed == price_on_hnlpu(dense, TINY, N)
    found = report(dense, dense, TINY, N, plan=rest)
    assert ends(found.joules_share) == ends(found.published_chip) == (1, 1, 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_a_plan_that_does_less_costs_no_more(seed: int, bits: int):
    more = some_plan(seed)
    less = less_than(more, seed + 100)
    dense, chip = price_dense(TINY, N), Chip.of(TINY, bits=bits)
    prices = [
        price_on_hnlpu(price(plan, TINY), TINY, N, dense=dense, plan=plan, chip=chip)
        for plan in (less, more)
    ]
    for of in (lambda p: p.joules, lambda p: p.token_s, lambda p: p.between_s):
        for low, high in zip(ends(of(prices[0])), ends(of(prices[1])), strict=True):
            assert low <= high * (1 + EXACT)
    assert prices[0].joules.hopeful < prices[1].joules.hopeful


@pytest.mark.parametrize("field", [f.name for f in fields(Work)])
def test_joules_grow_with_every_kind_of_work(field: str):
    dense = published_work()
    less = price_work(replace(dense, **{field: getattr(dense, field) / 2}), dense, PUBLISHED)
    both = list(zip(ends(less.joules), ends(published_price().joules), strict=True))
    assert all(a <= b for a, b in both)
    assert any(a < b for a, b in both)


@pytest.mark.parametrize("seed", range(4))
def test_scenarios_are_in_order_and_blocks_add_up(seed: int):
    plan, dense = some_plan(seed), price_dense(TINY, N)
    found = report(price(plan, TINY), dense, TINY, N, plan=plan)
    for share in (found.joules_share, found.published_chip, *(m.share for m in found.machines)):
        assert 0 < share.hopeful <= share.middle <= share.cautious <= 1
    for one in (found.executed, found.dense):
        assert sum(one.blocks.values()) == pytest.approx(one.joules.middle)
        assert all(joules >= 0 for joules in one.blocks.values())


def test_metal_does_not_depend_on_the_plan():
    dense, chips = price_dense(TINY, N), set()
    for seed in range(3):
        plan = some_plan(seed)
        found = report(price(plan, TINY), dense, TINY, N, plan=plan)
        chips.add(found.executed.chip)
        made = found.deployment, found.dense_deployment
        assert made[0].made.middle <= made[1].made.middle * (1 + 1e-6)  # the data centre's power
        assert made[0].updates == made[1].updates
    assert chips == {Chip.of(TINY)}


def test_metal_grows_with_parameters_and_bits():
    sizes = [Chip.of(GPT_OSS, parameters=int(n)) for n in (1e8, 1e9, 7e9, 8e9, 116.2e9)]
    sizes.append(Chip.of(GPT_OSS, parameters=int(116.2e9), bits=8))
    assert [chip.n_chips for chip in sizes] == [1, 1, 1, 2, 16, 32]
    for small, large in pairwise(sizes):
        assert all(a < b for a, b in zip(ends(small.area_mm2), ends(large.area_mm2), strict=True))
        assert small.nre_usd.low <= large.nre_usd.low
    assert not sizes[0].linked  # one chip needs no link, and has none
    assert published_price().blocks["link"] > 0


def test_what_each_decision_saves():
    found = {decision.name: decision for decision in single_decisions()}
    rest = found["all at rest"]
    assert ends(rest.joules) == ends(rest.token_s) == (1, 1, 1)
    bits = found["half of the weight bits"].joules
    assert bits.cautious == bits.middle == 1 > bits.hopeful
    channels = found["half of the channels"]
    assert ends(channels.token_s) == (1, 1, 1)
    assert channels.joules.cautious < 1
    for name in ("every second FFN skipped", "every second attention skipped"):
        time, pace = found[name].token_s, found[name].tokens_per_s
        # A quarter of all modules is skipped; stages keep step, so others wait all the same.
        assert time.cautious == 1
        assert time.middle == pytest.approx(0.75, abs=0.003)
        assert pace.middle == 1 < pace.hopeful
    blocks = found["a quarter of the cached blocks"]
    assert blocks.flops > 0.9 > blocks.joules.cautious


def test_bits_above_those_cast_save_nothing():
    rest, dense = Plan.rest(TINY, N), price_dense(TINY, N)
    for bits, cast, saves in ((8, 4, False), (4, 4, False), (2, 4, True), (4, 8, True)):
        plan = rest.with_fields(bits=np.full_like(rest.bits, bits))
        found = report(price(plan, TINY), dense, TINY, N, plan=plan, chip=Chip.of(TINY, bits=cast))
        assert (found.joules_share.hopeful < 1) == saves
        assert found.joules_share.middle == 1


def test_without_the_plan_the_range_holds_what_the_plan_tells():
    dense = price_dense(GPT_OSS, 8)
    rest = Plan.rest(GPT_OSS, 8)
    layers = np.arange(36) % 2
    for plan in (
        rest.with_fields(attention=np.tile(layers, (8, 1)).astype(np.int32)),
        rest.with_fields(ffn=np.tile(2 * layers, (8, 1)).astype(np.int32)),
        rest.with_fields(channels=rest.channels // 3),
    ):
        cost = price(plan, GPT_OSS)
        told = Work.of(cost, dense, GPT_OSS, 8, plan=plan)
        blind = Work.of(cost, dense, GPT_OSS, 8)
        assert blind.fewest_modules - 1e-6 <= told.modules <= blind.modules == 1
        assert blind.macs == told.macs


def test_shares_on_the_published_chip_do_not_depend_on_the_model():
    dense = published_work()
    half = replace(dense, macs=dense.macs / 2)
    own = price_work(half, dense, PUBLISHED).joules.over(published_price().joules)
    assert ends(share_on_published_chip(half, dense)) == pytest.approx(ends(own))
    tiny = Work(macs=10.0, vector_flops=4.0, cache_numbers=2.0)
    assert ends(share_on_published_chip(replace(tiny, macs=5.0), tiny)) == pytest.approx(ends(own))


def test_the_format_of_the_cache_does_not_matter():
    wide = replace(TINY, kv_bytes=4)
    narrow = replace(TINY, kv_bytes=1, kv_scale_bytes=2, summary_bytes=2)
    found = []
    for shape in (wide, narrow):
        rest = Plan.rest(shape, N)
        found.append(price_on_hnlpu(price(rest, shape), shape, N).joules)
    assert found[0] == found[1]


def test_deployment_scales():
    price_of = published_price()
    one, many = (price_deployment(price_of, Deployment(systems=n)) for n in (1, 50))
    assert many.tokens == pytest.approx(50 * one.tokens)
    assert many.per_million_tokens.middle < one.per_million_tokens.middle / 20
    assert one.electricity_share < 0.001
    idle = price_deployment(price_of, Deployment(used=0.5))
    assert idle.electricity.middle == pytest.approx(one.electricity.middle / 2)
    fixed = price_deployment(price_of, Deployment(updates=0))
    assert fixed.updates.high == 0
    assert fixed.total.high == pytest.approx(123.7e6, rel=1e-3)  # table 3, without updates


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"systems": 0}, "systems is 0; allowed: 1 and above"),
        ({"years": 0.0}, "years is 0; allowed: above 0"),
        ({"years": float("nan")}, "years is nan; allowed: above 0"),
        ({"updates": -1}, "updates is -1; allowed: 0 and above"),
        ({"used": 1.5}, "used is 1.5; allowed: above 0 and up to 1"),
    ],
)
def test_a_deployment_checks_itself(settings: dict[str, float], line: str):
    with pytest.raises(DataError, match=line):
        Deployment(**settings)


def test_work_and_chips_refuse_what_is_none():
    dense = price_dense(TINY, N)
    with pytest.raises(DataError, match="n_tokens is 0"):
        price_on_hnlpu(dense, TINY, 0)
    with pytest.raises(DataError, match="dense cost is empty"):
        price_on_hnlpu(dense, TINY, N, dense=Cost())
    with pytest.raises(DataError, match="the plan has 3 tokens and 3 layers; the cost is of 40"):
        price_on_hnlpu(dense, TINY, N, plan=Plan.rest(TINY, 3))
    with pytest.raises(DataError, match="metal of 5 bits is not priced; allowed: 4, 8, 16"):
        Chip.of(TINY, bits=5)
    with pytest.raises(DataError, match="-1 parameters"):
        Chip.of(TINY, parameters=-1)
    with pytest.raises(DataError, match="flops_linear is None"):
        cost_from({}, "executed")
    with pytest.raises(DataError, match="kv_bytes_read is -1"):
        cost_from({**dense.summary(), "kv_bytes_read": -1}, "executed")
    assert cost_from(dense.summary(), "executed") == dense


# The command -------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command("hnlpu")(hnlpu)

    def call(*words: object) -> tuple[str, str]:
        typer.main.get_command(app).main([*map(str, words)], "hnlpu", standalone_mode=False)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


def answer(shape_cost: Cost, executed: Cost, n_tokens: int, folder: Path) -> dict[str, object]:
    """What `vesicle run --json` writes, as far as it is read here."""
    return {
        "executed": executed.summary(),
        "dense": shape_cost.summary(),
        "by_phase": {"prompt": {"tokens": n_tokens - 1}, "generated": {"tokens": 1}},
        "model": "a model",
        "model_path": str(folder),
    }


def test_a_prompt_end_to_end(run: Callable[..., tuple[str, str]], model: Path):
    words = ("--prompt", "Why?", "--model", model, "--max-new-tokens", 4)
    out, err = run(*words, "--json")
    found = json.loads(out)
    assert "runs dense" in err
    assert found["n_tokens"] >= 4
    assert found["share"]["joules"] == {"low": 1, "middle": 1, "high": 1}
    assert "not a measurement" in found["what"]
    out, _ = run(*words)
    assert "paid once" in out


def test_a_saved_plan_and_a_saved_answer_agree(
    run: Callable[..., tuple[str, str]], model: Path, tmp_path: Path
):
    from vesicle.families import find_family
    from vesicle.models.checks import read_config

    config = read_config(model)
    shape = find_family(config).decoder_config(config).shape
    rest = Plan.rest(shape, 24)
    plan = rest.with_fields(channels=rest.channels // 2)
    plan.save(tmp_path / "plan.safetensors")
    cost, dense = price(plan, shape), price_dense(shape, 24)
    (tmp_path / "answer.json").write_text(json.dumps(answer(dense, cost, 24, model)))
    out, err = run("--plan", tmp_path / "plan.safetensors", "--model", model, "--json")
    planned = json.loads(out)
    assert err == ""
    out, err = run("--from", tmp_path / "answer.json", "--json")
    assert "does not tell which modules" in err
    read = json.loads(out)
    assert read["n_tokens"] == planned["n_tokens"] == 24
    assert read["share"]["joules"]["middle"] == planned["share"]["joules"]["middle"] < 1
    assert read["share"]["joules"]["low"] < planned["share"]["joules"]["low"]
    assert read["chip"] == planned["chip"]


def test_check_and_constants(run: Callable[..., tuple[str, str]]):
    found = json.loads(run("--check", "--json")[0])
    assert len(found["given_back"]) == len(given_back())
    assert found["single_decisions"][0]["joules"] == {"low": 1, "middle": 1, "high": 1}
    assert "249,960" in run("--check")[0]
    listed = json.loads(run("--constants", "--json")[0])["constants"]
    assert [constant["kind"] for constant in listed].count("assumed") == 2
    assert "assumed" in run("--constants")[0]


def test_every_mistake_has_its_line(
    run: Callable[..., tuple[str, str]], model: Path, tmp_path: Path
):
    def refuses(*words: object) -> str:
        with pytest.raises(VesicleError) as caught:
            run(*words)
        return str(caught.value)

    choices = "give one of --prompt, --from, --plan, --check, --constants"
    assert refuses() == f"nothing to price is given; {choices}"
    assert refuses("--check", "--prompt", "a") == f"--prompt and --check are given; {choices}"
    assert "need --prompt" in refuses("--check", "--budget", 0.5)
    with pytest.raises(BudgetError, match=r"--budget is 1.5"):
        run("--prompt", "a", "--budget", 1.5)
    assert "metal of 6 bits" in refuses("--check", "--cast-bits", 6)
    assert "used is 2" in refuses("--check", "--used", 2)
    assert "is empty" in refuses("--prompt", " ", "--model", model)
    assert "give --modulator" in refuses("--prompt", "a", "--budget", 0.5, "--model", model)
    assert "cannot read" in refuses("--from", tmp_path / "none.json")
    assert "as a plan" in refuses("--plan", tmp_path / "none.safetensors")

    dense = price_dense(TINY, 24)
    broken: dict[str, tuple[object, str]] = {
        "list.json": ([], "holds no object"),
        "empty.json": ({}, "executed is None"),
        "phases.json": (
            {**answer(dense, dense, 24, model), "by_phase": {}},
            "by_phase does not tell",
        ),
        "counts.json": (
            {
                **answer(dense, dense, 24, model),
                "by_phase": {"prompt": {"tokens": -1}, "generated": {"tokens": 1}},
            },
            "counts [-1, 1] tokens",
        ),
        "other.json": (answer(dense, dense, 24, model), "name the model with --model"),
    }
    for name, (values, line) in broken.items():
        (tmp_path / name).write_text(json.dumps(values))
        assert line in refuses("--from", tmp_path / name)
    Plan.rest(replace(TINY, n_layers=7), 4).save(tmp_path / "deep.safetensors")
    assert "has 7 layers" in refuses("--plan", tmp_path / "deep.safetensors", "--model", model)


def test_tables_are_complete():
    plan, dense = some_plan(0), price_dense(TINY, N)
    found = report(price(plan, TINY), dense, TINY, N, plan=plan)
    priced, blocks, facts = tables(found)
    assert priced.row_count == 8
    assert blocks.row_count == len(BLOCKS) + 1
    assert facts.row_count == 5
