"""Triton kernels of the GPU engine: one token per row, and a Plan that lies in device memory.

Every launch has the same grid whatever the Plan says. Programs read their row of the Plan first,
and return, or loop over fewer channels or blocks, accordingly; so one captured CUDA graph serves
every Plan. Letters are those of docs/notation.md: n rows (tokens), D width, H query heads, G KV
heads, R = H / G, K head size, F FFN width, L layers; P is a power of two that covers an axis.

A row of the Plan is `FIELDS` int32 numbers: channels at the four sites, FFN module, attention run,
KV blocks. A row of counts is `COUNTS` numbers: channels read at the four sites, cached positions
visited, block summaries compared. Both lie at [step, row, layer], where `step` is in device memory
too.

A projection writes `splits` partial sums (splits, n, O), each over a part of the input channels,
and the kernel that reads them adds them up: sums have one order, and no atomic float is needed.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(7)
FFN, RUN, BLOCKS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
COUNTS = tl.constexpr(6)
VISITED, COMPARED = tl.constexpr(4), tl.constexpr(5)
BLOCK = tl.constexpr(16)
GROUP = tl.constexpr(32)
SMALL, BIG = tl.constexpr(1), tl.constexpr(2)
FLOAT, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_jit = triton.jit(do_not_specialize=["layer", "n"])


@triton.jit
def _cell(step_ptr, row, layer, n, L: tl.constexpr):
    """Index of a (step, row, layer) cell."""
    return (tl.load(step_ptr).to(tl.int32) * n + row) * L + layer


# Choosing the largest ---------------------------------------------------------------------------


@triton.jit
def _largest(value, wanted, valid, width):
    """Marks the `wanted` largest |value| (P,) among valid ones; ties go to the lower index.

    Positive floats order as their bit patterns do: eight passes fix four bits of the threshold
    each.
    """
    keep = valid & (wanted > 0)
    if (wanted > 0) & (wanted < width):
        key = tl.where(valid, tl.abs(value).to(tl.int32, bitcast=True), -1)
        found = tl.full((), 0, tl.int32)
        for digit in range(8):
            steps = found + (tl.arange(0, 16) << (28 - 4 * digit))
            reached = tl.sum((key[:, None] >= steps[None, :]).to(tl.int32), 0)
            found = tl.max(tl.where(reached >= wanted, steps, found), 0)
        above = key > found
        level = key == found
        spare = wanted - tl.sum(above.to(tl.int32), 0)
        keep = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= spare))
    return keep


@triton.jit
def _compact(keep, list_ptr, count_ptr, P: tl.constexpr, GROUPED: tl.constexpr):
    """Lists kept channels, or the groups of 32 that hold any, rising."""
    chosen = keep.to(tl.int32)
    if GROUPED:
        chosen = tl.max(tl.reshape(chosen, (P // GROUP, GROUP)), 1)
        index = tl.arange(0, P // GROUP)
    else:
        index = tl.arange(0, P)
    place = tl.cumsum(chosen, 0)
    tl.store(list_ptr + place - 1, index, mask=chosen > 0)
    tl.store(count_ptr, tl.sum(chosen, 0))


@triton.jit
def _offer(
    x, keep, i, row, width: tl.constexpr, xs_ptr, list_ptr, count_ptr, counter_ptr,
    P: tl.constexpr, ALONE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Writes a projection's input: chosen channels as they are, 0 elsewhere, and how many."""
    tl.store(xs_ptr + row * width + i, tl.where(keep, x, 0.0), mask=i < width)
    tl.store(counter_ptr, tl.sum(keep.to(tl.int32), 0))
    if ALONE:
        _compact(keep, list_ptr, count_ptr, P, GROUPED)


@_jit
def unite(
    xs_ptr, list_ptr, count_ptr, n,
    width: tl.constexpr, P: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Lists the channels that any of n rows chose. Grid (1,)."""
    i = tl.arange(0, P)
    keep = i < 0
    for row in range(n):
        keep = keep | (tl.load(xs_ptr + row * width + i, mask=i < width, other=0.0) != 0)
    _compact(keep, list_ptr, count_ptr, P, GROUPED)


# Residual stream, release, normalisation --------------------------------------------------------


@triton.jit
def _total(parts_ptr, row, i, live, n, width: tl.constexpr, SPLITS: tl.constexpr):
    """Sum of the partial sums (SPLITS, n, width) of a row at columns i."""
    total = tl.load(parts_ptr + row * width + i, mask=live, other=0.0)
    for s in range(1, SPLITS):
        total += tl.load(parts_ptr + (s * n + row) * width + i, mask=live, other=0.0)
    return total


@triton.jit
def _channels(level, rate_ptr, floor, width: tl.constexpr):
    """Channels read at a site of `width` channels, as `DopaminePrecision.channels`."""
    share = 1.0 - tl.load(rate_ptr) * (1.0 - level)
    share = tl.minimum(tl.maximum(share, floor), 1.0)
    return tl.ceil(share * width - 1e-9).to(tl.int32)


@triton.jit
def _release(
    hidden, i, row, layer, n, cell, position, rows_ptr, levels_ptr, dial_ptr,
    readout_ptr, bias_ptr, settings_ptr, column_ptr,
    L: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, F: tl.constexpr, A: tl.constexpr,
    DOPAMINE: tl.constexpr, SEROTONIN: tl.constexpr, GABA: tl.constexpr,
):  # fmt: skip
    """The linear predictor and the effectors, as in predictors/ and effectors/.

    readout (L, A, D) fp32; bias (L, A, 3) fp64: offset, slope, place; settings (9,) fp64: rates at
    the four sites, floor, ffn_below, attention_below, bypass_below, least; DOPAMINE, SEROTONIN and
    GABA are their places among the A released, or -1.
    """
    live = i < D
    scale = 1.0 / tl.sqrt((tl.sum(hidden * hidden, 0) / D).to(tl.float64) + 1e-6)
    pressure = tl.load(dial_ptr + row)
    place = tl.log2((position + 1).to(tl.float64) / 16) / 8
    dopamine = tl.full((), 1.0, tl.float64)
    serotonin = dopamine
    gaba = dopamine
    for a in tl.static_range(A):
        at = layer * A + a
        weight = tl.load(readout_ptr + at * D + i, mask=live, other=0.0)
        z = tl.sum(weight * hidden, 0).to(tl.float64) * scale + tl.load(bias_ptr + at * 3)
        z += tl.load(bias_ptr + at * 3 + 1) * pressure + tl.load(bias_ptr + at * 3 + 2) * place
        # Rounded as in `modulator`, so that other routes to the same level decide alike.
        level = tl.floor(1e6 / (1.0 + tl.exp(z)) + 0.5) / 1e6
        tl.store(levels_ptr + cell * 5 + tl.load(column_ptr + a), level)
        if a == DOPAMINE:
            dopamine = level
        if a == SEROTONIN:
            serotonin = level
        if a == GABA:
            gaba = level
    here = rows_ptr + cell * FIELDS
    floor = tl.load(settings_ptr + 4)
    wanted = _channels(dopamine, settings_ptr + 2, floor, D)
    tl.store(here + 2, wanted)
    tl.store(here + 3, _channels(dopamine, settings_ptr + 3, floor, F))
    module = 2 - (serotonin < tl.load(settings_ptr + 5)).to(tl.int32)
    module = tl.where(serotonin < tl.load(settings_ptr + 7), 0, module)
    tl.store(here + FFN, module)
    if layer + 1 < L:
        ahead = here + FIELDS
        tl.store(ahead, _channels(dopamine, settings_ptr, floor, D))
        tl.store(ahead + 1, _channels(dopamine, settings_ptr + 1, floor, Q))
        tl.store(ahead + RUN, (serotonin >= tl.load(settings_ptr + 6)).to(tl.int32))
        visible = position // BLOCK + 1
        blocks = tl.ceil(gaba * visible.to(tl.float64) - 1e-9).to(tl.int32)
        least = tl.minimum(visible, tl.load(settings_ptr + 8).to(tl.int32))
        tl.store(ahead + BLOCKS, tl.minimum(tl.maximum(blocks, least), visible))
    return wanted, module


@_jit
def normalise(
    hidden_ptr, parts_ptr, bias_ptr, standin_ptr, gain_ptr, normed_ptr,
    xs_ptr, list_ptr, count_ptr,
    rows_ptr, counters_ptr, step_ptr, position_ptr,
    levels_ptr, dial_ptr, released_ptr, readout_ptr, release_bias_ptr, settings_ptr, column_ptr,
    layer, n, eps,
    L: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, F: tl.constexpr, P: tl.constexpr,
    ADD: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, STANDIN: tl.constexpr,
    SITE: tl.constexpr, A: tl.constexpr,
    DOPAMINE: tl.constexpr, SEROTONIN: tl.constexpr, GABA: tl.constexpr,
    ALONE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Adds the last module's output to the residual stream, releases, normalises, chooses.

    Grid (n,). ADD: 0 nothing, 1 this layer's attention, 2 the previous layer's FFN. SITE: 0
    attention_in, 2 ffn_in, 4 the LM head, 5 none (the residual sum alone). A: transmitters
    released, 0 for none.
    """
    row = tl.program_id(0)
    i = tl.arange(0, P)
    live = i < D
    cell = _cell(step_ptr, row, layer, n, L)
    plan = rows_ptr + cell * FIELDS
    hidden = tl.load(hidden_ptr + row * D + i, mask=live, other=0.0)
    if ADD > 0:
        if ADD == 1:
            whole = tl.where(tl.load(plan + RUN) == 1, D, 0)
            small = D - whole
        else:
            module = tl.load(plan - FIELDS + FFN)
            whole = tl.where(module == BIG, D, 0)
            small = tl.where(module == SMALL, D, 0)
        # What a module did not write is not read.
        hidden += _total(parts_ptr, row, i, i < whole, n, D, SPLITS)
        if BIAS:
            hidden += tl.load(bias_ptr + i, mask=i < whole, other=0.0).to(tl.float32)
        if STANDIN:
            hidden += tl.load(standin_ptr + row * D + i, mask=i < small, other=0.0)
        tl.store(hidden_ptr + row * D + i, hidden, mask=live)
    if SITE < 5:
        wanted = tl.full((), D, tl.int32)
        if SITE == 0:
            wanted = tl.load(plan)
        if SITE == 2:
            wanted = tl.load(plan + 2)
            module = tl.load(plan + FFN)
            if A > 0:
                if tl.load(released_ptr + row) == 1:
                    position = tl.load(position_ptr + row).to(tl.int32)
                    wanted, module = _release(
                        hidden, i, row, layer, n, cell, position, rows_ptr, levels_ptr, dial_ptr,
                        readout_ptr, release_bias_ptr, settings_ptr, column_ptr,
                        L, D, Q, F, A, DOPAMINE, SEROTONIN, GABA,
                    )  # fmt: skip
            wanted = tl.where(module == BIG, wanted, 0)
        scale = 1.0 / tl.sqrt(tl.sum(hidden * hidden, 0) / D + eps)
        x = hidden * scale * tl.load(gain_ptr + i, mask=live, other=0.0).to(tl.float32)
        if STANDIN:
            tl.store(normed_ptr + row * D + i, x, mask=live)
        keep = _largest(x, wanted, live, D)
        # The head has no column among the counts; its count goes where no one reads.
        counter = counters_ptr + cell * COUNTS + SITE
        if SITE == 4:
            counter = count_ptr + 1
        _offer(x, keep, i, row, D, xs_ptr, list_ptr, count_ptr, counter, P, ALONE, GROUPED)


@_jit
def activate(
    parts_ptr, bias_ptr, xs_ptr, list_ptr, count_ptr, rows_ptr, counters_ptr, step_ptr, layer, n,
    L: tl.constexpr, F: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
    ALONE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """SiLU(gate) * up from partial sums (SPLITS, n, 2F), and the choice at ffn_out. Grid (n,)."""
    row = tl.program_id(0)
    i = tl.arange(0, P)
    cell = _cell(step_ptr, row, layer, n, L)
    plan = rows_ptr + cell * FIELDS
    big = tl.load(plan + FFN) == BIG
    live = i < tl.where(big, F, 0)
    gate = _total(parts_ptr, row, i, live, n, 2 * F, SPLITS)
    up = _total(parts_ptr, row, F + i, live, n, 2 * F, SPLITS)
    if BIAS:
        gate += tl.load(bias_ptr + i, mask=live, other=0.0).to(tl.float32)
        up += tl.load(bias_ptr + F + i, mask=live, other=0.0).to(tl.float32)
    x = gate / (1.0 + tl.exp(-gate)) * up
    keep = _largest(x, tl.where(big, tl.load(plan + 3), 0), live, F)
    counter = counters_ptr + cell * COUNTS + 3
    _offer(x, keep, i, row, F, xs_ptr, list_ptr, count_ptr, counter, P, ALONE, GROUPED)


@_jit
def stand_in(
    x_ptr, down_ptr, up_ptr, bias_ptr, out_ptr, rows_ptr, step_ptr, layer, n,
    L: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr, TILE: tl.constexpr,
    FIELD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Writes out (n, D) = up (down x) + bias, where FIELD of the Plan is VALUE.

    Grid (n,). down (L, RANK, D), up (L, D, RANK), bias (L, D).
    """
    row = tl.program_id(0)
    cell = _cell(step_ptr, row, layer, n, L)
    if tl.load(rows_ptr + cell * FIELDS + FIELD) != VALUE:
        return
    r = tl.arange(0, PR)
    tile = tl.arange(0, TILE)
    inner = tl.zeros((PR,), tl.float32)
    for start in range(0, D, TILE):
        d = start + tile
        x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0)
        at = (layer * RANK + r[:, None]) * D + d[None, :]
        w = tl.load(down_ptr + at, mask=(r[:, None] < RANK) & (d[None, :] < D), other=0.0)
        inner += tl.sum(w.to(tl.float32) * x[None, :], 1)
    for start in range(0, D, TILE):
        d = start + tile
        at = (layer * D + d[:, None]) * RANK + r[None, :]
        w = tl.load(up_ptr + at, mask=(d[:, None] < D) & (r[None, :] < RANK), other=0.0)
        out = tl.sum(w.to(tl.float32) * inner[None, :], 1)
        out += tl.load(bias_ptr + layer * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + d, out, mask=d < D)


# Projections ------------------------------------------------------------------------------------


@_jit
def project(
    xs_ptr, list_ptr, count_ptr, w_ptr, scale_ptr, low_ptr, parts_ptr,
    rows_ptr, step_ptr, layer, n, leading,
    L: tl.constexpr, C: tl.constexpr, O: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, SPLITS: tl.constexpr,
    SKIPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of xs (n, C) times w (C, O), over listed channels.

    Grid (O / BLOCK_O, SPLITS). A float w is read at listed channels, whole tiles of them at a time;
    in an int8 or int4 w, whose groups of 32 channels share scale and low (C / 32, O), listed groups
    are passed and the channels that no row chose are left out of each load. N is 1 for one row,
    else 16, for the tensor cores. With SKIPS, only `leading` columns are computed where no row
    runs attention.
    """
    split = tl.program_id(1)
    count = tl.load(count_ptr)
    if count == 0:
        return
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    b = tl.arange(0, N)
    columns = tl.full((), O, tl.int32)
    if SKIPS:
        cell = _cell(step_ptr, b, layer, n, L)
        runs = tl.max(tl.load(rows_ptr + cell * FIELDS + RUN, mask=b < n, other=0), 0)
        columns = tl.where(runs == 1, O, leading)
    if tl.program_id(0) * BLOCK_O >= columns:
        return
    wide = o < columns
    entries = BLOCK_C if FORMAT == FLOAT else 1
    share = tl.cdiv(count, SPLITS * entries) * entries
    stop = tl.minimum(count, (split + 1) * share)
    c = tl.arange(0, BLOCK_C)
    single = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)
    several = tl.zeros((N, BLOCK_O), tl.float32)
    for at in range(split * share, stop, entries):
        if FORMAT == FLOAT:
            channel = tl.load(list_ptr + at + c, mask=at + c < stop, other=0)
            here = at + c < stop
        else:
            group = tl.load(list_ptr + at)
            channel = group * GROUP + c
            here = channel < C
        index = b[:, None] * C + channel[None, :]
        x = tl.load(xs_ptr + index, mask=(b[:, None] < n) & here[None, :], other=0.0)
        read = here & (tl.max((x != 0).to(tl.int32), 0) > 0)
        first = channel.to(tl.int64)[:, None]
        if FORMAT == INT4:
            pair = tl.program_id(0) * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
            mask = read[:, None] & (pair < columns // 2)[None, :]
            codes = tl.load(w_ptr + first * (O // 2) + pair[None, :], mask=mask, other=0)
            w = tl.interleave((codes & 15).to(tl.float32), (codes >> 4).to(tl.float32))
        else:
            mask = read[:, None] & wide[None, :]
            w = tl.load(w_ptr + first * O + o[None, :], mask=mask, other=0).to(tl.float32)
        if FORMAT != FLOAT:
            scale = tl.load(scale_ptr + group * O + o, mask=wide, other=0.0).to(tl.float32)
            low = tl.load(low_ptr + group * O + o, mask=wide, other=0.0).to(tl.float32)
            w = w * scale[None, :] + low[None, :]
        if N == 1:
            single += tl.reshape(x, (BLOCK_C, 1)) * w
        else:
            several += tl.dot(x, w, input_precision=PRECISION)
    if N == 1:
        out = tl.sum(single, 0)
        tl.store(parts_ptr + split * O + o, out, mask=wide)
    else:
        index = (split * n + b[:, None]) * O + o[None, :]
        tl.store(parts_ptr + index, several, mask=(b[:, None] < n) & wide[None, :])


# Attention --------------------------------------------------------------------------------------


@triton.jit
def _summarise(
    keys_ptr, summary_ptr, page, g, kind,
    G: tl.constexpr, K: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """The summary of a complete block: its mean key, or its least and largest keys."""
    j = tl.arange(0, BLOCK)
    k = tl.arange(0, PK)
    block = (page.to(tl.int64) * G + g) * BLOCK * K
    keys = tl.load(
        keys_ptr + block + j[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0
    ).to(tl.float32)
    first = tl.where(kind == 0, tl.sum(keys, 0) / BLOCK, tl.min(keys, 0))
    out = summary_ptr + (page.to(tl.int64) * G + g) * 2 * K + k
    tl.store(out, first.to(summary_ptr.dtype.element_ty), mask=k < K)
    tl.store(out + K, tl.max(keys, 0).to(summary_ptr.dtype.element_ty), mask=k < K)


@_jit
def append(
    parts_ptr, bias_ptr, cos_ptr, sin_ptr, query_ptr, keys_ptr, values_ptr, summary_ptr,
    table_ptr, kind_ptr, rows_ptr, step_ptr, position_ptr, layer, n, table_row,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, PK: tl.constexpr,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, ROTATES: tl.constexpr, SUMMARISE: tl.constexpr,
):  # fmt: skip
    """Values, keys and queries from partial sums; rotated; the first two into their page.

    Grid (n, 2G + H). keys, values (pages, G, 16, K); cos, sin (positions, K / 2). With SUMMARISE,
    the first token of a block summarises the block before: its keys came in earlier launches.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    cell = _cell(step_ptr, row, layer, n, L)
    if head >= 2 * G:
        if tl.load(rows_ptr + cell * FIELDS + RUN) == 0:
            return
    width: tl.constexpr = (2 * G + H) * K
    half: tl.constexpr = K // 2
    position = tl.load(position_ptr + row).to(tl.int32)
    k = tl.arange(0, PK)
    live = k < K
    x = _total(parts_ptr, row, head * K + k, live, n, width, SPLITS)
    if BIAS:
        x += tl.load(bias_ptr + head * K + k, mask=live, other=0.0).to(tl.float32)
    if ROTATES:
        if head >= G:
            other = tl.where(k < half, k + half, k - half)
            y = _total(parts_ptr, row, head * K + other, live, n, width, SPLITS)
            if BIAS:
                y += tl.load(bias_ptr + head * K + other, mask=live, other=0.0).to(tl.float32)
            angle = position * half + tl.where(k < half, k, other)
            cos = tl.load(cos_ptr + angle, mask=live, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=live, other=0.0)
            x = x * cos + tl.where(k < half, -y, y) * sin
    if head >= 2 * G:
        tl.store(query_ptr + (row * H + head - 2 * G) * K + k, x, mask=live)
        return
    own = position // BLOCK
    page = tl.load(table_ptr + row * table_row + own).to(tl.int64)
    g = head % G
    at = ((page * G + g) * BLOCK + position % BLOCK) * K + k
    if head < G:
        tl.store(values_ptr + at, x.to(values_ptr.dtype.element_ty), mask=live)
    else:
        tl.store(keys_ptr + at, x.to(keys_ptr.dtype.element_ty), mask=live)
        if SUMMARISE:
            if (position % BLOCK == 0) & (position > 0):
                before = tl.load(table_ptr + row * table_row + own - 1)
                _summarise(keys_ptr, summary_ptr, before, g, tl.load(kind_ptr + row), G, K, PK)


@triton.jit
def summarise(
    keys_ptr, summary_ptr, pages_ptr, kind_ptr,
    G: tl.constexpr, K: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """Summaries of complete blocks, by page. Grid (pages, G)."""
    page = tl.load(pages_ptr + tl.program_id(0))
    _summarise(keys_ptr, summary_ptr, page, tl.program_id(1), tl.load(kind_ptr), G, K, PK)


@_jit
def score_blocks(
    query_ptr, summary_ptr, table_ptr, kind_ptr, logits_ptr, rows_ptr, step_ptr, position_ptr,
    layer, n, table_row, scale,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, PK: tl.constexpr,
    MOST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Estimated logits (n, H, MOST) of the blocks before the query's own, see blocks.py.

    Grid (n, G, MOST / TILE); returns at once where every block is read.
    """
    row, g = tl.program_id(0), tl.program_id(1)
    plan = rows_ptr + _cell(step_ptr, row, layer, n, L) * FIELDS
    own = tl.load(position_ptr + row).to(tl.int32) // BLOCK
    first = tl.program_id(2) * TILE
    if (tl.load(plan + RUN) == 0) | (tl.load(plan + BLOCKS) > own) | (first >= own):
        return
    block = first + tl.arange(0, TILE)
    k = tl.arange(0, PK)
    known = block < own
    page = tl.load(table_ptr + row * table_row + block, mask=known, other=0).to(tl.int64)
    at = summary_ptr + (page * G + g)[:, None] * 2 * K + k[None, :]
    mask = known[:, None] & (k < K)[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = low
    if tl.load(kind_ptr + row) == 1:
        high = tl.load(at + K, mask=mask, other=0.0).to(tl.float32)
    for r in range(H // G):
        head = g * (H // G) + r
        q = tl.load(query_ptr + (row * H + head) * K + k, mask=k < K, other=0.0)[None, :]
        # max(q a, q b) over a <= b is q+ b + q- a; for a mean, a = b.
        logit = tl.sum(tl.maximum(q, 0.0) * high + tl.minimum(q, 0.0) * low, 1) * scale
        tl.store(logits_ptr + (row * H + head) * MOST + block, logit, mask=known)


@_jit
def choose_blocks(
    logits_ptr, blocks_ptr, rows_ptr, counters_ptr, step_ptr, position_ptr, layer, n,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, MOST: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The first block, the query's own, and those of the largest estimated mass, rising.

    Grid (n, G). Writes blocks (n, G, MOST).
    """
    row, g = tl.program_id(0), tl.program_id(1)
    cell = _cell(step_ptr, row, layer, n, L)
    plan = rows_ptr + cell * FIELDS
    own = tl.load(position_ptr + row).to(tl.int32) // BLOCK
    wanted = tl.load(plan + BLOCKS)
    if (tl.load(plan + RUN) == 0) | (wanted > own):
        return
    block = tl.arange(0, P)
    mass = tl.zeros((P,), tl.float32)
    for r in range(H // G):
        at = logits_ptr + (row * H + g * (H // G) + r) * MOST + block
        logit = tl.load(at, mask=block < own, other=-float("inf"))
        share = tl.exp(logit - tl.max(logit, 0))
        mass += share / tl.sum(share, 0)
    others = (block > 0) & (block < own)
    keep = _largest(mass, wanted - 2, others, own - 1) | (block == 0) | (block == own)
    chosen = keep.to(tl.int32)
    place = tl.cumsum(chosen, 0)
    tl.store(blocks_ptr + (row * G + g) * MOST + place - 1, block, mask=chosen > 0)
    if g == 0:
        tl.store(counters_ptr + cell * COUNTS + COMPARED, own)


@_jit
def attend(
    query_ptr, keys_ptr, values_ptr, table_ptr, blocks_ptr, mixed_ptr, norms_ptr,
    rows_ptr, counters_ptr, step_ptr, position_ptr, layer, n, table_row, scale,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, PK: tl.constexpr,
    M: tl.constexpr, MOST: tl.constexpr, SPLITS: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a row's R query heads per KV head over its blocks.

    Grid (n, G, SPLITS): each split takes a part of the blocks, MANY at a time, and leaves an
    unscaled sum (n, H, SPLITS, K) with its largest logit and its total weight (n, H, SPLITS, 2).
    """
    row, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cell = _cell(step_ptr, row, layer, n, L)
    plan = rows_ptr + cell * FIELDS
    if tl.load(plan + RUN) == 0:
        return
    position = tl.load(position_ptr + row).to(tl.int32)
    visible = position // BLOCK + 1
    wanted = tl.minimum(tl.load(plan + BLOCKS), visible)
    chosen = wanted < visible
    ratio: tl.constexpr = H // G
    r = tl.arange(0, M)  # query heads, padded for the tensor cores
    k = tl.arange(0, PK)
    j = tl.arange(0, MANY * BLOCK)
    mask = (r < ratio)[:, None] & (k < K)[None, :]
    head = row * H + g * ratio + r
    q = tl.load(query_ptr + head[:, None] * K + k[None, :], mask=mask, other=0.0)
    top = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, PK), tl.float32)
    visited = tl.full((), 0, tl.int32)
    share = tl.cdiv(wanted, SPLITS * MANY) * MANY
    stop = tl.minimum(wanted, (split + 1) * share)
    for at in range(split * share, stop, MANY):
        entry = at + j // BLOCK
        listed = blocks_ptr + (row * G + g) * MOST + entry
        limit = tl.where(chosen, stop, 0)
        block = tl.where(chosen, tl.load(listed, mask=entry < limit, other=0), entry)
        here = (entry < stop) & (block * BLOCK + j % BLOCK <= position)
        page = tl.load(table_ptr + row * table_row + block, mask=here, other=0).to(tl.int64)
        slot = ((page * G + g) * BLOCK + j % BLOCK)[:, None] * K + k[None, :]
        inside = here[:, None] & (k < K)[None, :]
        keys = tl.load(keys_ptr + slot, mask=inside, other=0.0).to(tl.float32)
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        logits = tl.where(here[None, :], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        fade = tl.exp(top - higher)
        values = tl.load(values_ptr + slot, mask=inside, other=0.0).to(tl.float32)
        out = out * fade[:, None] + tl.dot(weights, values, input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        top = higher
        visited += tl.sum(here.to(tl.int32), 0)
    part = head * SPLITS + split
    tl.store(mixed_ptr + part[:, None] * K + k[None, :], out, mask=mask)
    tl.store(norms_ptr + part * 2, top, mask=r < ratio)
    tl.store(norms_ptr + part * 2 + 1, total, mask=r < ratio)
    if g == 0:
        tl.atomic_add(counters_ptr + cell * COUNTS + VISITED, visited)


@_jit
def combine(
    mixed_ptr, norms_ptr, xs_ptr, list_ptr, count_ptr, rows_ptr, counters_ptr, step_ptr, layer, n,
    L: tl.constexpr, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr,
    ALONE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Joins the splits of attention, and chooses channels at attention_out. Grid (n,)."""
    row = tl.program_id(0)
    width: tl.constexpr = H * K
    i = tl.arange(0, P)
    cell = _cell(step_ptr, row, layer, n, L)
    plan = rows_ptr + cell * FIELDS
    run = tl.load(plan + RUN) == 1
    live = i < tl.where(run, width, 0)
    first = (row * H + i // K) * SPLITS
    top = tl.full((P,), -float("inf"), tl.float32)
    for s in range(SPLITS):
        top = tl.maximum(top, tl.load(norms_ptr + (first + s) * 2, mask=live, other=0.0))
    out = tl.zeros((P,), tl.float32)
    total = tl.zeros((P,), tl.float32)
    for s in range(SPLITS):
        fade = tl.exp(tl.load(norms_ptr + (first + s) * 2, mask=live, other=0.0) - top)
        total += fade * tl.load(norms_ptr + (first + s) * 2 + 1, mask=live, other=1.0)
        part = mixed_ptr + (first + s) * K + i % K
        out += fade * tl.load(part, mask=live, other=0.0)
    x = out / total
    keep = _largest(x, tl.where(run, tl.load(plan + 1), 0), live, width)
    counter = counters_ptr + cell * COUNTS + 1
    _offer(x, keep, i, row, width, xs_ptr, list_ptr, count_ptr, counter, P, ALONE, GROUPED)
