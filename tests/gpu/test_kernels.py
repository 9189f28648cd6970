"""Each kernel against PyTorch, on rows whose Plans differ."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_modulator
from vesicle.blocks import rank_blocks, summarise
from vesicle.engine.linear import chosen_channels
from vesicle.gpu import GpuEngine
from vesicle.gpu.steps import BLOCKS, FFN, RUN, Gear, Rows, Steps
from vesicle.gpu.weights import FORMATS, Packed
from vesicle.modulator import ModulatorAuthor, ModulatorMethod, decide_attention, decide_ffn

pytestmark = pytest.mark.gpu
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
"""fp32 sums in another order."""


def gear_of(engine: GpuEngine, modulator: Any = None) -> Gear:
    source = modulator or tiny_modulator(engine.shape)
    return Gear.make(
        source.ffn_standin,
        source.attention_standin,
        None if modulator is None else modulator.predictor,
        (source.dopamine, source.serotonin, source.gaba),
        True,
        torch.float32,
        engine.device,
    )


def made(engine: GpuEngine, n: int, modulator: Any = None) -> tuple[Steps, Rows]:
    """Steps and n rows whose Plan is at rest, with random hidden states."""
    weights, gear = engine.weights, gear_of(engine, modulator)
    from vesicle.gpu import kernels

    steps = Steps(kernels, weights, engine.pool, gear, engine._rotation)
    rows = Rows(weights, n, steps=2, most=16, wide=False, device=engine.device)
    rows.plan[..., :4] = torch.tensor(engine.shape.site_widths, device=engine.device)
    rows.plan[..., FFN], rows.plan[..., RUN] = 2, 1
    rows.step.fill_(1)  # the second step's rows
    generator = torch.Generator().manual_seed(n)
    rows.hidden.copy_(torch.randn(rows.hidden.shape, generator=generator))
    return steps, rows


def inputs(rows: Rows, width: int) -> Tensor:
    return rows.inputs[: rows.n * width].view(rows.n, width)


@pytest.mark.parametrize("counts", [[72], [31], [1], [72, 40, 7]])
def test_normalise_and_choose(engine: GpuEngine, counts: list[int]):
    steps, rows = made(engine, len(counts))
    rows.hidden[0, 3:9] = 0.7  # ties after a gain of one
    engine.weights.layers[1].attention_gain[3:9] = 1.0
    rows.plan[1, :, 1, 0] = torch.tensor(counts)
    steps._normalise(rows, 1, add=0, site=0)
    gain, eps = engine.weights.layers[1].attention_gain, engine.config.norm_eps
    expected = torch.nn.functional.rms_norm(rows.hidden, (72,), gain, eps)
    listed: set[int] = set()
    for row, count in enumerate(counts):
        chosen = chosen_channels(expected[row].cpu(), count).tolist()
        listed |= set(chosen)
        masked = torch.zeros(72, device=engine.device)
        masked[chosen] = expected[row, chosen]
        torch.testing.assert_close(inputs(rows, 72)[row], masked, **CLOSE)
    assert rows.counts[1, :, 1, 0].tolist() == counts
    if len(counts) > 1:
        unite(engine, steps, rows, 72)
    assert rows.list[: int(rows.count[0])].tolist() == sorted(listed)


def unite(engine: GpuEngine, steps: Steps, rows: Rows, width: int) -> None:
    steps._k.unite[(1,)](
        rows.inputs, rows.list, rows.count, rows.n, width=width, P=128, GROUPED=False
    )


def test_residual_takes_what_ran(engine: GpuEngine):
    """Whole: partial sums and bias. Small: the stand-in. Skipped: nothing. NaN is never read."""
    steps, rows = made(engine, 3)
    before, w = rows.hidden.clone(), engine.weights.layers[0].ffn_out
    splits = rows.splits(w)
    parts = rows.parts[: splits * 3 * 72].view(splits, 3, 72)
    parts.fill_(torch.nan)
    parts[:, 0] = torch.randn(splits, 72)
    rows.standin.fill_(torch.nan)
    rows.standin[1] = torch.randn(72)
    rows.plan[1, :, 0, FFN] = torch.tensor([2, 1, 0])
    steps._normalise(rows, 1, add=2, site=5)
    assert w.bias is not None
    torch.testing.assert_close(rows.hidden[0], before[0] + parts[:, 0].sum(0) + w.bias, **CLOSE)
    torch.testing.assert_close(rows.hidden[1], before[1] + rows.standin[1], **CLOSE)
    torch.testing.assert_close(rows.hidden[2], before[2])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", list(FORMATS))
def test_project(engine: GpuEngine, name: str, n: int):
    """Chosen channels alone are read: the others are poison, where a format can hold it."""
    steps, rows = made(engine, n)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(72, 96, generator=generator)
    packed = Packed.pack(weight, None, name, engine.device)
    dense = packed.dense(torch.float32).clone()
    x = torch.randn(n, 72, generator=generator).to(engine.device)
    x[:, 32:64] = 0  # a whole group is unread, and some channels of the first
    x[:, :9] = 0
    unread = (x == 0).all(0)
    if FORMATS[name] == 0:
        packed.data[unread] = torch.nan
    else:
        packed.scale[1], packed.low[1] = torch.nan, torch.nan
        packed.data[unread] = 255
    inputs(rows, 72).copy_(x)
    channels = (~unread).nonzero()[:, 0].int()
    if FORMATS[name]:
        channels = (channels // 32).unique().int()
    rows.list[: len(channels)] = channels
    rows.count[0] = len(channels)
    steps._grouped = FORMATS[name] > 0
    out = torch.zeros(2, n, 96, device=engine.device)
    steps._project(rows, 0, 2, packed, out)
    torch.testing.assert_close(out.sum(0), x @ dense, **CLOSE)


@pytest.mark.parametrize(("name", "step"), [("int8", 1 / 255), ("int4", 1 / 15)])
def test_packing(name: str, step: float):
    """Within half a step of each group's range; 4-bit weights come back as they were."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(70, 6, generator=generator)
    packed = Packed.pack(weight, None, name, torch.device("cpu"))
    assert (packed.dense(torch.float32) - weight).abs().max() < 0.55 * step * 6
    again = Packed.pack(packed.dense(torch.float32), None, name, torch.device("cpu"))
    torch.testing.assert_close(again.dense(torch.float32), packed.dense(torch.float32), **CLOSE)
    assert packed.n_bytes < 70 * 6 * (1.4 if name == "int8" else 0.9)


def test_query_columns_of_skipped_attention_are_not_read(engine: GpuEngine):
    steps, rows = made(engine, 1)
    rows.plan[1, :, 0, RUN] = 0
    packed = Packed.pack(torch.randn(72, 96), None, "fp32", engine.device)
    packed.data[:, 48:] = torch.nan
    inputs(rows, 72).normal_()
    rows.list[:72], rows.count[0] = torch.arange(72), 72
    out = torch.zeros(2, 1, 96, device=engine.device)
    steps._project(rows, 0, 0, packed, out)
    expected = inputs(rows, 72) @ packed.data[:, :48]
    torch.testing.assert_close(out.sum(0)[:, :48], expected, **CLOSE)
    assert (out[..., 48:] == 0).all()


def test_activation(engine: GpuEngine):
    steps, rows = made(engine, 2)
    w = engine.weights.layers[0]
    splits = rows.splits(w.ffn_in)
    parts = rows.parts[: splits * 2 * 176].view(splits, 2, 176)
    parts.normal_()
    rows.plan[1, :, 0, 3] = torch.tensor([20, 88])
    rows.plan[1, :, 0, FFN] = torch.tensor([2, 1])
    parts[:, 1] = torch.nan
    joint = parts.sum(0) + w.ffn_in.bias
    steps._k.activate[(2,)](
        rows.parts, w.ffn_in.bias, rows.inputs, rows.list, rows.count, rows.plan, rows.counts,
        rows.step, 0, 2, L=2, F=88, P=128, SPLITS=splits, BIAS=True, ALONE=False, GROUPED=False,
    )  # fmt: skip
    expected = torch.nn.functional.silu(joint[0, :88]) * joint[0, 88:]
    chosen = chosen_channels(expected.cpu(), 20)
    out = inputs(rows, 88)
    torch.testing.assert_close(out[0, chosen], expected[chosen], **CLOSE)
    assert int((out != 0).sum()) == 20  # and nothing in the row that runs its stand-in


def test_stand_in(engine: GpuEngine):
    modulator = tiny_modulator(engine.shape, dtype=torch.float32)
    steps, rows = made(engine, 3, modulator)
    rows.normed.normal_()
    rows.standin.fill_(7.0)
    rows.plan[1, :, 1, FFN] = torch.tensor([1, 2, 0])
    assert steps.gear.ffn is not None
    steps._stand_in(rows, 1, steps.gear.ffn, FFN, 1)
    expected = modulator.ffn_standin.float().apply_layer(1, rows.normed[:1].cpu())
    torch.testing.assert_close(rows.standin[:1].cpu(), expected, **CLOSE)
    assert (rows.standin[1:] == 7.0).all()


@pytest.mark.parametrize("bypass", [0.0, 0.3])
def test_release(engine: GpuEngine, bypass: float):
    """Levels as the modulator's own, and the decisions that its effectors make of them."""
    modulator = tiny_modulator(engine.shape, bypass_below=bypass, dtype=torch.float32)
    n, positions = 5, np.array([0, 3, 40, 100, 200], np.int32)
    steps, rows = made(engine, n, modulator)
    rows.positions.copy_(torch.from_numpy(positions))
    rows.released.copy_(torch.tensor([1, 1, 1, 1, 0]))
    dials = [0.3, 0.6, 0.2, 0.5, 0.5]
    rows.dial.copy_(torch.tensor([np.log((1 - d) / d) for d in dials]))
    given = rows.plan.clone()
    steps._normalise(rows, 0, add=0, site=2)
    for row in range(4):
        author = ModulatorAuthor(ModulatorMethod(modulator, dials[row]), engine.shape)
        author.attention(0, positions[row : row + 1])
        author.release(0, rows.hidden[row : row + 1].cpu(), positions[row : row + 1])
        levels = rows.levels[1, row, 0].cpu().numpy()
        assert np.abs(levels - author.levels[0, 0]).max() < 2.1e-6
        ffn = decide_ffn(modulator, engine.shape, levels[None])
        ahead = decide_attention(modulator, engine.shape, levels[None], positions[row : row + 1])
        assert rows.plan[1, row, 0].tolist()[2:5] == [*ffn.channels[0], ffn.module[0]]
        plan = rows.plan[1, row, 1].tolist()
        assert plan[:2] == [*ahead.channels[0]]
        assert plan[5:] == [ahead.run[0], ahead.kv_blocks[0]]
    assert (rows.plan[1, 4] == given[1, 4]).all()
    assert len({tuple(r) for r in rows.plan[1, :4, 0].tolist()}) > 1


# Attention --------------------------------------------------------------------------------------


def cached(engine: GpuEngine, n: int, length: int) -> tuple[Steps, Rows, Tensor, Tensor]:
    """Rows that see `length` cached positions of their own; keys and values (n, G, S, K)."""
    steps, rows = made(engine, n)
    pool, blocks = engine.pool, -(-length // 16)
    generator = torch.Generator().manual_seed(3)
    # Pages in no order, none of them shared.
    pages = 1 + torch.randperm(n * blocks, generator=generator).view(n, blocks)
    rows.table[:, :blocks] = pages
    keys, values = torch.randn(2, n, 2, blocks * 16, 12, generator=generator).to(engine.device)
    for row in range(n):
        for store, cache in ((keys, pool.keys), (values, pool.values)):
            cache[1, pages[row]] = store[row].unflatten(1, (blocks, 16)).transpose(0, 1)
    rows.query.copy_(torch.randn(n, 4, 12, generator=generator))
    rows.positions.fill_(length - 1)
    return steps, rows, keys[:, :, :length], values[:, :, :length]


@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_choose_and_attend(engine: GpuEngine, summary: str):
    """The blocks that blocks.py ranks first, and nothing but them."""
    steps, rows, keys, values = cached(engine, 3, 91)
    wanted = [4, 6, 2]
    rows.plan[1, :, 1, BLOCKS] = torch.tensor(wanted)
    rows.plan[1, 2, 1, RUN] = 0
    rows.kind.fill_(int(summary == "bounds"))
    steps.summarise(1, rows.table[:, :5].flatten().contiguous(), rows.kind)
    pool = engine.pool
    vectors = 1 if summary == "mean" else 2
    for row in range(3):
        mine = pool.summaries[1, rows.table[row, :5].long(), :, :vectors].transpose(0, 1)
        torch.testing.assert_close(mine, summarise(keys[row], summary), **CLOSE)
    scale = engine.shape.head_size**-0.5
    summaries = summarise(keys, summary)
    positions = torch.full((3, 1), 90, device=engine.device)
    rank = rank_blocks(rows.query[:, :, None], summaries, positions, scale)[:, 0]  # (n, G, N)
    steps._choose(rows, 1)
    assert [rows.blocks[0, g, :4].tolist() for g in range(2)] == [
        (rank[0, g] <= 4).nonzero()[:, 0].tolist() for g in range(2)
    ]
    # Poison what was not chosen, for either head.
    for row in (0, 2):
        for g in range(2):
            unread = rank[row, g] > wanted[row] if row == 0 else rank[row, g] > 0
            pages = rows.table[row, :6][unread].long()
            pool.keys[1, pages, g], pool.values[1, pages, g] = torch.nan, torch.nan
    rows.norms.fill_(torch.nan)
    rows.mixed.fill_(torch.nan)
    steps._attend_blocks(rows, 1)
    steps._k.combine[(3,)](
        rows.mixed, rows.norms, rows.inputs, rows.list, rows.count, rows.plan, rows.counts,
        rows.step, 1, 3, L=2, H=4, K=12, P=64, SPLITS=rows.attention_splits,
        ALONE=False, GROUPED=False,
    )  # fmt: skip
    out = inputs(rows, 48)
    for row in (0, 1):
        for head in range(4):
            g = head // 2
            seen = (rank[row, g] <= wanted[row]).repeat_interleave(16)[:91]
            logits = keys[row, g, seen] @ rows.query[row, head] * scale
            expected = logits.softmax(0) @ values[row, g, seen]
            torch.testing.assert_close(out[row, head * 12 : head * 12 + 12], expected, **CLOSE)
    assert (out[2] == 0).all()
    assert rows.counts[1, :, 1, 4].tolist() == [3 * 16 + 11, 91, 0]
    assert rows.counts[1, :, 1, 5].tolist() == [5, 0, 0]
    pool.keys.nan_to_num_()
    pool.values.nan_to_num_()


def test_append(engine: GpuEngine):
    """Rotated keys and queries, values as they are, in their pages; the block before summarised."""
    steps, rows, keys, _ = cached(engine, 2, 64)
    rows.positions.copy_(torch.tensor([48, 53]))
    packed = engine.weights.layers[1].attention_in
    splits = rows.splits(packed)
    parts = rows.parts[: splits * 2 * 96].view(splits, 2, 96)
    parts.normal_()
    engine.pool.summaries.zero_()
    before = rows.query.clone()
    rows.plan[1, 1, 1, RUN] = 0
    steps._append(rows, 1)
    joint = (parts.sum(0) + packed.bias).view(2, 8, 12)
    cos, sin = engine._rotation
    for row, position in enumerate([48, 53]):
        first, second = joint[row, 2:].split(6, -1)
        c, s = cos[position], sin[position]
        turned = torch.cat([first * c - second * s, second * c + first * s], -1)
        page = int(rows.table[row, 3])
        torch.testing.assert_close(engine.pool.keys[1, page, :, position - 48], turned[:2], **CLOSE)
        torch.testing.assert_close(
            engine.pool.values[1, page, :, position - 48], joint[row, :2], **CLOSE
        )
        expected = turned[2:] if row == 0 else before[1]
        torch.testing.assert_close(rows.query[row], expected, **CLOSE)
    mean = engine.pool.summaries[1, int(rows.table[0, 2]), :, 0]
    torch.testing.assert_close(mean, keys[0, :, 32:48].mean(1), **CLOSE)
    assert (engine.pool.summaries[1, int(rows.table[1, 2])] == 0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_the_block_kernel(engine: GpuEngine):
    """Prefill's two ways over chosen blocks."""
    steps, rows, _, _ = cached(engine, 1, 90)
    wide = Rows(engine.weights, 6, steps=1, most=16, wide=True, device=engine.device)
    wide.table[0] = rows.table[0]
    wide.positions.copy_(torch.arange(84, 90))
    wide.plan[..., RUN] = 1
    wide.plan[0, 3, :, RUN] = 0
    wide.plan[..., BLOCKS] = torch.tensor([2, 3, 6, 4, 5, 3], device=engine.device)[:, None]
    wide.query.normal_()
    steps.summarise(1, wide.table[0, :5].contiguous(), wide.kind)
    steps._choose(wide, 1)
    steps._attend_blocks(wide, 1)
    expected = wide.mixed[:, :, 0] / wide.norms[:, :, 0, 1:]
    visited = wide.counts[0, :, 1, 4].clone()
    steps.attend_flex(wide, 1)
    runs = [0, 1, 2, 4, 5]
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if engine.device.type == "cuda" else CLOSE
    torch.testing.assert_close(wide.mixed[runs, :, 0], expected[runs], **tolerance)
    assert wide.counts[0, :, 1, 4].tolist() == visited.tolist()
