import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import random_plan
from vesicle.errors import VesicleError
from vesicle.plan import (
    EVENT,
    FIELDS,
    FOREVER,
    Author,
    Dense,
    IntArray,
    Plan,
    PlanBuilder,
    Replay,
    Rows,
    resting_rows,
    visible_blocks,
)
from vesicle.plan.events import evict_after_of, forgetting
from vesicle.plan.rows import OF_HEAD
from vesicle.shapes import ModelShape

T = 40
NAMES = tuple(field.name for field in FIELDS)
POSITIONS = np.arange(T, dtype=np.int32)


@pytest.fixture
def plan(shape: ModelShape, rng: np.random.Generator) -> Plan:
    words = rng.integers(0, shape.vocabulary + 1, (len(OF_HEAD), T)).astype(np.int32)
    return random_plan(shape, T, rng).with_fields(**dict(zip(OF_HEAD, words, strict=True)))


def test_visible_blocks():
    positions = np.array([0, 15, 16, 31, 32, 1000], np.int32)
    assert visible_blocks(positions).tolist() == [1, 1, 2, 2, 3, 63]


def test_rest_fits_and_says_dense(shape: ModelShape):
    rest = Plan.rest(shape, T)
    rest.check(shape)
    assert (rest.n_tokens, rest.n_layers) == (T, shape.n_layers)
    assert rest.channels[5, 1].tolist() == [48, 48, 48, 80]
    assert (rest.bits == 16).all()
    assert (rest.ffn == 2).all()
    assert (rest.attention == 1).all()
    assert rest.kv_blocks[[0, 15, 16, 39], 2].tolist() == [1, 1, 2, 3]
    assert [getattr(rest, name).tolist() for name in OF_HEAD] == [[0] * T] * len(OF_HEAD)


def test_random_plans_fit_and_vary_every_field(plan: Plan, shape: ModelShape):
    plan.check(shape)
    for name in NAMES:
        assert len(np.unique(getattr(plan, name))) > 1


BAD = [
    ("channels", 0, "1 to 80"),
    ("channels", 81, "1 to 80"),
    ("channels", -3, "1 to 80"),
    ("bits", 5, "2, 3, 4, 8, 16"),
    ("bits", 0, "2, 3, 4, 8, 16"),
    ("bits", 32, "2, 3, 4, 8, 16"),
    ("ffn", 3, "0 to 2"),
    ("ffn", -1, "0 to 2"),
    ("attention", 2, "0 to 1"),
    ("attention", -1, "0 to 1"),
    ("kv_blocks", 1, "2 to 3"),
    ("kv_blocks", 4, "2 to 3"),
    ("kv_blocks", 0, "2 to 3"),
    ("head", -1, "0 to 97"),
    ("head", 98, "0 to 97"),
    ("likeliest", -1, "0 to 97"),
    ("likeliest", 98, "0 to 97"),
    ("logits", -1, "0 to 97"),
    ("logits", 98, "0 to 97"),
]


def test_every_field_has_bad_values():
    assert {name for name, _, _ in BAD} == set(NAMES)


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_check_names_field_value_and_allowed(
    plan: Plan, shape: ModelShape, name: str, value: int, allowed: str
):
    values = getattr(plan, name).copy()
    place = (37, 1, 3)[: values.ndim]
    values[place] = value
    where = (37, shape.n_layers - 1) if name in OF_HEAD else place
    with pytest.raises(VesicleError) as caught:
        plan.with_fields(**{name: values}).check(shape)
    assert str(caught.value) == f"plan field {name!r} is {value} at {where}; allowed: {allowed}"


def test_check_knows_each_sites_width_and_each_tokens_blocks(plan: Plan, shape: ModelShape):
    channels, blocks = plan.channels.copy(), plan.kv_blocks.copy()
    channels[0, 0, 2] = 49  # fits ffn_out only
    blocks[3, 0] = 2  # one block is visible so early
    with pytest.raises(VesicleError, match=r"'channels' is 49 at \(0, 0, 2\); allowed: 1 to 48"):
        plan.with_fields(channels=channels).check(shape)
    with pytest.raises(VesicleError, match=r"'kv_blocks' is 2 at \(3, 0\); allowed: 1 to 1"):
        plan.with_fields(kv_blocks=blocks).check(shape)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ffn"])
def test_check_refuses_a_wrong_shape(plan: Plan, shape: ModelShape, name: str):
    with pytest.raises(VesicleError, match=rf"plan field '{name}' has shape \(39,"):
        plan.with_fields(**{name: getattr(plan, name)[1:]}).check(shape)


def test_check_refuses_another_depth(plan: Plan, shape: ModelShape):
    with pytest.raises(VesicleError, match="plan has 3 layers; this model has 5"):
        plan.check(replace(shape, n_layers=5))


def test_tokens(plan: Plan):
    first, second = plan.tokens(0, 13), plan.tokens(13)
    assert (first.n_tokens, second.n_tokens) == (13, T - 13)
    assert np.array_equal(np.concatenate([first.rows, second.rows]), plan.rows)
    assert not first.equals(plan)
    assert plan.tokens(5, 5).n_tokens == 0


@pytest.mark.parametrize("name", NAMES)
def test_equals_sees_every_field(plan: Plan, shape: ModelShape, name: str):
    assert not plan.with_fields(**{name: getattr(Plan.rest(shape, T), name)}).equals(plan)


def test_save_and_load(plan: Plan, tmp_path: Path):
    path = tmp_path / "new" / "a.safetensors"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded.equals(plan)
    assert all(getattr(loaded, n).dtype == np.int32 for n in NAMES)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    plan.tokens(0, 3).save(path)
    assert Plan.load(str(path)).equals(plan.tokens(0, 3))


def test_a_pipe_stays_a_pipe(plan: Plan, tmp_path: Path):
    """As a device must: it is written to, never replaced by a file."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    plan.save(path)
    assert path.is_fifo()
    (tmp_path / "copy").write_bytes(os.read(reader, 1_000_000))
    os.close(reader)
    assert Plan.load(tmp_path / "copy").equals(plan)


def test_a_plan_saved_before_the_head_was_a_field_has_the_whole_head(tmp_path: Path, plan: Plan):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    old = {name: np.ascontiguousarray(getattr(plan, name)) for name in NAMES if name not in OF_HEAD}
    save_file(old, path, metadata={"format": "vesicle-plan-1"})
    none = np.zeros(T, np.int32)
    assert Plan.load(path).equals(plan.with_fields(**dict.fromkeys(OF_HEAD, none)))
    assert Plan.of(**old).head.tolist() == [0] * T


def test_a_plan_of_the_format_before_is_read(
    tmp_path: Path, plan: Plan, forgetful: Plan, shape: ModelShape
):
    """With its head as (T,), when entries end as an array, and where passes had to end."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(getattr(plan, name)) for name in NAMES}
    arrays |= {"retained": forgetful.evict_after, "turns": np.array([5, 9], np.int32)}
    save_file(arrays, tmp_path / "old", metadata={"format": "vesicle-plan-1"})
    found = Plan.load(tmp_path / "old")
    found.check(shape)
    assert found.equals(forgetful)


def test_events_that_tell_nothing_any_more_are_passed_over(
    tmp_path: Path, forgetful: Plan, shape: ModelShape
):
    """Plans once told where passes had to end."""
    turn = np.array([(7, -1, -1, -1, -1, 1, 0)], forgetful.events.dtype)
    events = np.concatenate([turn, forgetful.events])
    Plan(rows=forgetful.rows, events=events).save(tmp_path / "plan.safetensors")
    found = Plan.load(tmp_path / "plan.safetensors")
    found.check(shape)
    assert np.array_equal(found.events, forgetful.events)


def test_an_empty_plan_is_saved_too(shape: ModelShape, tmp_path: Path):
    Plan.rest(shape, 0).save(tmp_path / "a")
    assert Plan.load(tmp_path / "a").n_tokens == 0


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "text", "truncated", "header"])
def test_a_broken_file_is_one_line(plan: Plan, tmp_path: Path, damage: str):
    path = tmp_path / "a.safetensors"
    plan.save(path)
    whole = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a plan")
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "header":
            path.write_bytes(whole[:8] + b"\0" * 40 + whole[48:])
    with pytest.raises(VesicleError) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_safetensors_file_is_refused(tmp_path: Path, plan: Plan):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    arrays = {name: np.ascontiguousarray(getattr(plan, name)) for name in NAMES}
    stamp = {"format": "vesicle-plan-1"}
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(VesicleError, match="is not a vesicle plan"):
        Plan.load(path)
    save_file({n: a for n, a in arrays.items() if n != "bits"}, path, metadata=stamp)
    with pytest.raises(VesicleError, match="bits"):
        Plan.load(path)
    save_file({**arrays, "ffn": arrays["ffn"].astype(np.int64)}, path, metadata=stamp)
    with pytest.raises(VesicleError, match="must hold int32"):
        Plan.load(path)


def test_a_loaded_plan_of_wrong_rank_is_refused(tmp_path: Path, plan: Plan, shape: ModelShape):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    arrays = {name: np.ascontiguousarray(plan.rows[name]) for name in NAMES}
    arrays["ffn"] = np.ascontiguousarray(plan.ffn[:, 0])
    save_file(arrays, path, metadata={"format": "vesicle-plan-2"})
    with pytest.raises(VesicleError, match="ffn"):
        Plan.load(path)


def write(author: Author, shape: ModelShape, positions: IntArray) -> Rows:
    """What an author writes of tokens, layer by layer."""
    rows = resting_rows(shape, positions)
    for layer in range(shape.n_layers):
        author.attention(layer, positions, rows[:, layer])
        author.ffn(layer, None, positions, rows[:, layer])  # type: ignore[arg-type]
    return rows


def test_builder_collects_layers_and_chunks(plan: Plan, shape: ModelShape):
    author, builder = Replay(plan).author(shape), PlanBuilder(shape)
    for start, stop in ((0, 17), (17, 18), (18, T)):
        builder.add(write(author, shape, np.arange(start, stop, dtype=np.int32)))
        assert builder.build().equals(plan.tokens(0, stop))
    assert PlanBuilder(shape).build().n_tokens == 0


def test_replay_ends_with_its_plan(plan: Plan, shape: ModelShape):
    author = Replay(plan).author(shape)
    rows = resting_rows(shape, POSITIONS[:2])[:, 0]
    with pytest.raises(VesicleError, match="the plan covers 40 tokens; token 40 was asked for"):
        author.attention(0, np.array([39, 40], np.int32), rows)


def test_replay_refuses_a_plan_that_does_not_fit(plan: Plan, shape: ModelShape):
    with pytest.raises(VesicleError, match="plan has 3 layers"):
        Replay(plan).author(replace(shape, n_layers=2))


def test_dense_rests(shape: ModelShape):
    author, positions = Dense().author(shape), np.arange(30, 35, dtype=np.int32)
    builder = PlanBuilder(shape)
    builder.add(write(author, shape, positions))
    assert builder.build().equals(Plan.rest(shape, 35).tokens(30))
    assert author.levels is None
    assert author.rests


# Entries that are forgotten ----------------------------------------------------------------------


@pytest.fixture
def forgetful(plan: Plan, shape: ModelShape) -> Plan:
    """Of 40 tokens: 16 entries go after 20 tokens, in layer 1; 16 after 40, in layer 2."""
    evict_after = np.full((T, shape.n_layers, shape.n_kv_heads), FOREVER, np.int32)
    evict_after[:16, 1] = 19
    evict_after[3:19, 2, 0], evict_after[16:32, 2, 1] = 39, 39
    return plan.with_fields(evict_after=evict_after)


def test_a_plan_without_evict_after_forgets_nothing(plan: Plan, shape: ModelShape):
    assert plan.evict_after.shape == (T, shape.n_layers, 1)
    assert (plan.evict_after == FOREVER).all()
    assert not plan.forgets
    wide = np.full((T, shape.n_layers, shape.n_kv_heads), FOREVER, np.int32)
    assert plan.with_fields(evict_after=wide).equals(plan)
    assert plan.equals(plan.with_fields(evict_after=wide))
    assert not plan.with_fields(evict_after=wide).forgets


def test_what_is_forgotten_is_cut_compared_and_saved(
    plan: Plan, forgetful: Plan, shape: ModelShape, tmp_path: Path
):
    forgetful.check(shape)
    assert forgetful.forgets
    assert not forgetful.equals(plan)
    assert not plan.equals(forgetful)
    parts = forgetful.tokens(0, 25).evict_after, forgetful.tokens(25).evict_after
    assert (np.concatenate(parts) == forgetful.evict_after).all()
    forgetful.tokens(0, 39).check(shape)  # what goes later than the last token has no effect
    path = tmp_path / "plan"
    forgetful.save(path)
    assert Plan.load(path).equals(forgetful)
    assert Plan.load(path).evict_after.dtype == np.int32


def test_a_plan_that_forgets_nothing_is_saved_as_before(plan: Plan, tmp_path: Path):
    from safetensors import safe_open

    plan.save(tmp_path / "plan")
    with safe_open(tmp_path / "plan", framework="numpy") as file:
        assert set(file.keys()) == set(NAMES)
    assert Plan.load(tmp_path / "plan").equals(plan)


@pytest.mark.parametrize(
    ("where", "value", "line"),
    [
        ((np.s_[17], 0, 1), 30, r"'evict_after' is 30 at \(17, 0, 1\); allowed: 31 and above"),
        ((np.s_[:15], 0, 1), 25, "'evict_after' does not fit pages in layer 0; allowed: at a time"),
        ((np.s_[:15], 2, np.s_[:]), 35, "'evict_after' does not fit pages in layer 2"),
        ((np.s_[:1], 2, np.s_[:]), 35, "'evict_after' does not fit pages in layer 2"),
    ],
)
def test_check_refuses_what_pages_cannot_do(
    plan: Plan, shape: ModelShape, where: tuple, value: int, line: str
):
    evict_after = np.full((T, shape.n_layers, shape.n_kv_heads), FOREVER, np.int32)
    evict_after[where] = value
    with pytest.raises(VesicleError, match=line):
        plan.with_fields(evict_after=evict_after).check(shape)


def test_check_refuses_other_heads(plan: Plan, forgetful: Plan, shape: ModelShape):
    forgetful.check(replace(shape, n_kv_heads=4))  # the others forget nothing
    with pytest.raises(VesicleError, match=r"plan event 'kv_head' is 1 at \d; allowed: -1 to 0"):
        forgetful.check(replace(shape, n_kv_heads=1))
    with pytest.raises(VesicleError, match=r"plan field 'evict_after' has shape \(39, 3, 1\)"):
        plan.with_fields(evict_after=plan.evict_after[1:])


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("kind", 2, "0 to 0"),
        ("layer", 3, "0 to 2"),
        ("first", -1, "0 to 39"),
        ("last", 40, "0 to 39"),
        ("kv_head", 2, "-1 to 1"),
    ],
)
def test_check_names_what_is_wrong_with_an_event(
    forgetful: Plan, shape: ModelShape, name: str, value: int, allowed: str
):
    events = forgetful.events.copy()
    events[name][1] = value
    with pytest.raises(VesicleError) as caught:
        replace(forgetful, events=events).check(shape)
    assert str(caught.value) == f"plan event {name!r} is {value} at 1; allowed: {allowed}"


def test_events_and_evict_after_say_the_same(rng: np.random.Generator):
    for heads in (1, 3):
        ends = np.array([40, 50, FOREVER], np.int32)
        evict_after = rng.choice(ends, (30, 4, heads))
        evict_after[:, 2] = FOREVER
        events = forgetting(evict_after)
        assert (np.sort(events, order=EVENT.names) == events).all()
        assert (evict_after_of(events, 30, 4, heads) == evict_after).all()
    assert len(forgetting(np.full((5, 2, 2), FOREVER, np.int32))) == 0


def test_replay_and_builder_hand_it_on(plan: Plan, forgetful: Plan, shape: ModelShape):
    assert Replay(plan).author(shape).evict_after is None
    evict_after = Replay(forgetful).author(shape).evict_after
    builder = PlanBuilder(shape, evict_after)
    for start, stop in ((0, 25), (25, 55)):
        builder.add(resting_rows(shape, np.arange(start, stop, dtype=np.int32)))
    assert (builder.build().evict_after[:T] == forgetful.evict_after).all()
    assert (builder.build().evict_after[T:] == FOREVER).all()
    assert (builder.opening(9).build().evict_after == forgetful.evict_after[:9]).all()
