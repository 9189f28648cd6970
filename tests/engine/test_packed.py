"""Packed weights: the byte layout against a naive packer, arithmetic against floats, exactness."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from vesicle.engine import core, linear
from vesicle.engine.packed import PackedHead, PackedPair, PackedWeight, quantize_activations
from vesicle.errors import ModelError

SIZES = [(32, 64), (64, 128), (70, 200), (33, 300), (32, 1100), (1, 1)]
"""Channels and outputs: whole and half tiles, short groups, outputs that are no whole tile."""
HEAD_SIZES = [(32, 16), (48, 97), (33, 5)]


def random_weight(n_in: int, n_out: int, seed: int = 0) -> Tensor:
    """Row-major (out, in), uneven in size from group to group."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n_out, 1, generator=generator) + 0.1
    return scale * torch.randn(n_out, n_in, generator=generator) + 0.05


def naive_codes(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (groups, 32, out), scales and lows (groups, out), one group at a time."""
    values = weight.numpy().astype(np.float32)
    n_out, n_in = values.shape
    groups = -(-n_in // 32)

    def encode(symmetric: bool) -> tuple[np.ndarray, ...]:
        codes = np.zeros((groups, 32, n_out), np.uint8)
        scales, lows = (np.zeros((groups, n_out), np.float16) for _ in range(2))
        worst = 0.0
        for g, n in product(range(groups), range(n_out)):
            part = values[n, 32 * g : 32 * g + 32]
            if symmetric:
                scale = np.float16(np.abs(part).max() / np.float32(127))
                low = np.float16(-128 * np.float32(scale))
            else:
                span = part.max() - part.min()
                scale = np.float16(span / np.float32(2**bits - 1))
                low = np.float16(part.min())
            step, start = np.float32(scale), np.float32(low)
            inverse = np.float32(1) / step if step > 0 else np.float32(0)
            code = np.clip(np.rint((part - start) * inverse), 0, 2**bits - 1)
            codes[g, : len(part), n], scales[g, n], lows[g, n] = code, scale, low
            worst = max(worst, float(np.abs(start + code * step - part).max()))
        return codes, scales, lows, worst

    *asymmetric, error = encode(False)
    if bits == 8:
        *symmetric, other = encode(True)
        if other <= error:
            return tuple(symmetric)
    return tuple(asymmetric)


def naive_pack(weight: Tensor, bits: int) -> tuple[bytes, bytes]:
    """The two planes of a projection, byte by byte."""
    codes, scales, lows = naive_codes(weight, bits)
    groups, _, n_out = codes.shape
    padded = -(-n_out // 64) * 64
    codes = np.pad(codes, ((0, 0), (0, 0), (0, padded - n_out)))
    scales, lows = (np.pad(x, ((0, 0), (0, padded - n_out))) for x in (scales, lows))
    high, rest = bytearray(), bytearray()
    for start in range(0, padded, 128):
        tile = min(128, padded - start)
        for g in range(groups):
            for r in range(32):
                row = codes[g, r, start : start + tile].astype(int)
                rows = [bytearray(tile // 2), bytearray(tile // 2)]
                for l, i, b in product(range(tile // 32), range(4), range(4)):
                    first = tile // 8 * i + 4 * l + b
                    pair = row[first], row[tile // 2 + first]
                    for plane, shift in ((0, 4), (1, 0)) if bits == 8 else ((0, 0),):
                        low, top = (code >> shift & 15 for code in pair)
                        rows[plane][16 * l + 4 * i + b] = low | top << 4
                high += rows[0]
                rest += rows[1]
            for numbers in (scales, lows):
                high += numbers[g, start : start + tile].tobytes()
    return bytes(high), bytes(rest) if bits == 8 else b""


def naive_head(weight: Tensor, bits: int) -> tuple[bytes, bytes]:
    """The two planes of a head, byte by byte."""
    codes, scales, lows = naive_codes(weight, bits)
    groups, _, n_out = codes.shape
    padded = -(-n_out // 16) * 16
    codes = np.pad(codes, ((0, 0), (0, 0), (0, padded - n_out))).astype(int)
    scales, lows = (np.pad(x, ((0, 0), (0, padded - n_out))) for x in (scales, lows))
    high, rest = bytearray(), bytearray()
    for start, g in product(range(0, padded, 16), range(groups)):
        for j in range(4):
            rows = [bytearray(64), bytearray(64)]
            for o, c in product(range(16), range(4)):
                pair = codes[g, 8 * j + c, start + o], codes[g, 8 * j + 4 + c, start + o]
                for plane, shift in ((0, 4), (1, 0)) if bits == 8 else ((0, 0),):
                    low, top = (code >> shift & 15 for code in pair)
                    rows[plane][4 * o + c] = low | top << 4
            high += rows[0]
            rest += rows[1]
        for numbers in (scales, lows):
            high += numbers[g, start : start + 16].tobytes()
    return bytes(high), bytes(rest) if bits == 8 else b""


def naive_values(weight: Tensor, stored: int, bits: int) -> Tensor:
    """(in, out) at `bits` bits, in fp32."""
    codes, scales, lows = naive_codes(weight, stored)
    codes = codes.astype(np.int64)
    if bits < stored:
        drop = stored - bits
        codes = (codes >> drop << drop) + 2**drop // 2
    step, start = scales.astype(np.float32)[:, None], lows.astype(np.float32)[:, None]
    values = start + step * codes.astype(np.float32)
    return torch.from_numpy(values.reshape(-1, values.shape[2])[: weight.shape[1]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_layout(size: tuple[int, int], bits: int):
    weight = random_weight(*size)
    packed = PackedWeight.pack(weight, bits)
    # Every 1024 outputs choose by themselves how 8-bit codes spend their range.
    parts = [naive_pack(part, bits) for part in weight.split(1024)]
    assert packed.high.numpy().tobytes() == b"".join(high for high, _ in parts)
    rest = b"" if packed.trailing is None else packed.trailing.numpy().tobytes()
    assert rest == b"".join(rest for _, rest in parts)
    groups, padded = -(-size[0] // 32), -(-size[1] // 64) * 64
    assert len(packed.high) == groups * padded // 64 * 1280
    assert packed.high.data_ptr() % 64 == 0
    assert packed.bytes_held == groups * padded * (20 if bits == 4 else 36)
    assert (packed.groups, packed.padded_out) == (groups, padded)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", HEAD_SIZES, ids=str)
def test_the_layout_of_a_head(size: tuple[int, int], bits: int):
    weight = random_weight(*size)
    packed = PackedHead.pack(weight, bits)
    high, rest = naive_head(weight, bits)
    assert packed.high.numpy().tobytes() == high
    assert (b"" if packed.trailing is None else packed.trailing.numpy().tobytes()) == rest
    assert packed.high.data_ptr() % 64 == 0
    assert packed.bytes_held == len(high) + len(rest)


@pytest.mark.parametrize("stored", [4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_dequantize(stored: int, bits: int):
    weight = random_weight(70, 200)
    packed = PackedWeight.pack(weight, stored)
    expected = naive_values(weight, stored, bits)
    assert torch.equal(packed.dequantize(bits), expected)
    channels = torch.tensor([69, 0, 33, 31])
    for columns in (1, 128, 150, 200):
        part = packed.dequantize(bits, channels, columns)
        assert torch.equal(part, expected[channels, :columns])
    if bits >= stored:
        assert torch.equal(packed.dequantize(packed.bits), expected)
        assert torch.equal(packed.dequantize(packed.bits, columns=130), expected[:, :130])


@pytest.mark.parametrize("stored", [4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, None])
def test_rows_of_a_head(stored: int, bits: int | None):
    weight = random_weight(48, 97)
    packed = PackedHead.pack(weight, stored)
    expected = naive_values(weight, stored, bits or stored).t()
    ids = torch.tensor([96, 0, 15, 16, 17, 96])
    assert torch.equal(packed.rows(ids, bits), expected[ids])
    assert packed.rows(ids[:0]).shape == (0, 48)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_near_what_was_packed(bits: int):
    weight = random_weight(70, 200)
    packed = PackedWeight.pack(weight, bits)
    span = weight.amax() - weight.amin()
    assert not packed.exact
    assert (packed.dequantize(packed.bits) - weight.t()).abs().max() < 0.51 * span / (2**bits - 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_decoded_is_encoded_exactly(bits: int):
    decoded = PackedWeight.pack(random_weight(96, 130), bits).dequantize(bits).t()
    if bits == 4:
        again = PackedWeight.pack(decoded, bits)
        assert again.exact
        assert torch.equal(again.dequantize(again.bits).t(), decoded)
        assert not PackedWeight.pack(decoded + 1e-3 * torch.eye(130, 96), bits).exact


def test_symmetric_eight_bits_are_exact():
    """As GGUF Q8_0 has them: whole numbers up to 127 times an fp16 scale."""
    codes = torch.randint(-127, 128, (97, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::32] = 127
    scale = torch.rand(97, 2, 1, generator=torch.Generator().manual_seed(1)).half().float()
    weight = (codes.view(97, 2, 32) * scale).view(97, 64)
    head = PackedHead.pack(weight, 8)
    assert head.exact
    assert torch.equal(head.rows(torch.arange(97)), weight)


def test_flat_groups_and_zeros():
    weight = torch.zeros(65, 40)
    weight[3] = 0.5
    for bits in (4, 8):
        assert torch.equal(PackedWeight.pack(weight, bits).dequantize(16), weight.t())
        assert torch.equal(PackedHead.pack(weight, bits).rows(torch.arange(65)), weight)
        product, _ = PackedWeight.pack(weight, bits).multiply(torch.zeros(1, 40), full(1, 40), 16)
        assert (product == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 40000.0])
@pytest.mark.parametrize("pack", [PackedWeight.pack, PackedHead.pack])
def test_weights_that_cannot_be_packed_are_refused(bad: float, pack: Callable[..., object]):
    weight = random_weight(40, 20)
    weight[7, 33] = bad
    with pytest.raises(ModelError, match="packed weights must be finite and below 32768"):
        pack(weight, 8)
    with pytest.raises(ValueError, match="bits is 5; allowed: 4, 8"):
        pack(random_weight(40, 20), 5)


def test_stack_joins_outputs_and_biases():
    first, second = random_weight(40, 30), random_weight(40, 50, seed=1)
    bias = torch.arange(50.0)
    joined = PackedWeight.stack([first, second], [None, bias.bfloat16()], 4)
    apart = [PackedWeight.pack(w, 4).dequantize(4) for w in (first, second)]
    assert torch.equal(joined.dequantize(joined.bits), torch.cat(apart, dim=1))
    assert torch.equal(joined.bias, torch.cat([torch.zeros(30), bias.bfloat16().float()]))
    assert PackedWeight.stack([first], [None], 4).bias is None


def full(t: int, n_in: int) -> np.ndarray:
    return np.full(t, n_in, np.int32)


def activations(t: int, n_in: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(t, n_in, generator=generator) * torch.rand(t, n_in, generator=generator)


def test_activations_are_rounded_within_their_group():
    x = activations(3, 70)
    code, step = quantize_activations(x)
    assert code.shape == (3, 3, 32)
    assert torch.equal(code, code.round())
    assert code.abs().amax(-1).tolist() == [[127] * 3] * 3
    assert (code[:, 2, 6:] == 0).all()
    error = (code * step[..., None]).flatten(1)[:, :70] - x
    limit = 0.501 * step.repeat_interleave(32, 1)[:, :70]
    assert (error.abs() <= limit).all()


@pytest.mark.parametrize("stored", [4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [(70, 200), (96, 300)], ids=str)
def test_multiply(size: tuple[int, int], stored: int, bits: int):
    n_in, n_out = size
    bias = torch.linspace(-1, 1, n_out)
    packed = PackedWeight.pack(random_weight(n_in, n_out), stored, bias)
    x = activations(5, n_in)
    x[2] = x[2].abs().round(decimals=1)  # ties
    counts = np.array([n_in, 40, 25, 1, 1000], np.int32)
    out, read = packed.multiply(x, counts, bits)
    assert read.tolist() == [n_in, 40, 25, 1, n_in]
    decoded = packed.dequantize(bits)
    for t, count in enumerate(read.tolist()):
        kept = torch.zeros(n_in)
        channels = linear.chosen_channels(x[t], count)
        kept[channels] = x[t, channels]
        code, step = quantize_activations(kept[None])
        rounded = (code * step[..., None]).flatten()[:n_in]
        exact = rounded.double() @ decoded.double() + bias.double()
        torch.testing.assert_close(out[t].double(), exact, rtol=1e-5, atol=1e-5)
        # And near the product that rounds nothing: half a step for every channel that is read.
        limit = 0.51 * (step.repeat_interleave(32, 1)[0, channels] @ decoded[channels].abs())
        assert ((out[t] - bias - kept @ decoded).abs() <= limit + 1e-4).all()
    for columns in (1, 64, 128, 150):
        part, _ = packed.multiply(x, counts, bits, columns)
        torch.testing.assert_close(part, out[:, :columns], rtol=1e-6, atol=1e-6)


def test_a_group_without_channels_adds_nothing():
    packed = PackedWeight.pack(random_weight(64, 64), 4)
    x = torch.zeros(1, 64)
    x[0, 40:44] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    some, _ = packed.multiply(x, np.array([4], np.int32), 16)
    every, _ = packed.multiply(x, full(1, 64), 16)
    torch.testing.assert_close(some, every)


def test_head_products():
    weight, x = random_weight(48, 97), activations(3, 48)
    bias = torch.linspace(-2, 2, 97)
    head = PackedHead.pack(weight, 8, bias)
    code, step = quantize_activations(x)
    rounded = (code * step[..., None]).flatten(1)[:, :48]
    expected = rounded @ naive_values(weight, 8, 8) + bias
    torch.testing.assert_close(head.multiply(x), expected, rtol=1e-5, atol=1e-5)
    screened = rounded @ naive_values(weight, 8, 4) + bias
    torch.testing.assert_close(head.multiply(x, 4), screened, rtol=1e-5, atol=1e-5)

    ids, logits = head.survivors(x, 10)
    assert ids.shape == logits.shape == (3, 10)
    assert (ids.diff() > 0).all()
    torch.testing.assert_close(logits, expected.gather(1, ids), rtol=1e-5, atol=1e-5)
    assert ids.tolist() == screened.topk(10).indices.sort().values.tolist()
    every, logits = head.survivors(x, 1000)
    assert every.tolist() == [list(range(97))] * 3
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def pair(bits: int = 4) -> PackedPair:
    first = PackedWeight.pack(random_weight(70, 40), bits, torch.linspace(0, 1, 40))
    return PackedPair(parts=(first, PackedWeight.pack(random_weight(70, 100, 1), bits)))


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native operations."""
    monkeypatch.setattr(core, "available", lambda: False)


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("stored", [4, 8])
@pytest.mark.parametrize("t", [1, 9, 70])
def test_project(stored: int, t: int, rng: np.random.Generator):
    """Tokens side by side, each with its own channels and bits, are each token alone."""
    w, x = pair(stored), activations(t, 70)
    counts = rng.integers(1, 90, t).astype(np.int32)
    bits = rng.choice(np.array([2, 3, 4, 8, 16], np.int32), t)
    for columns in (None, 40, 20):
        out, read = linear.project(x, w, counts, bits, columns)
        assert read.tolist() == np.minimum(counts, 70).tolist()
        alone = [
            torch.cat(
                [p.multiply(x[i : i + 1], counts[i : i + 1], b, n)[0] for p, n in w.split(columns)],
                dim=1,
            )
            for i, b in enumerate(bits.tolist())
        ]
        torch.testing.assert_close(out, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
@pytest.mark.parametrize("stored", [4, 8])
@pytest.mark.parametrize("t", [1, 9, 20])
def test_native_products_are_those_of_torch(
    stored: int, t: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    w, x = pair(stored), activations(t, 70)
    counts = rng.integers(1, 90, t).astype(np.int32)
    bits = rng.choice(np.array([2, 3, 4, 8, 16], np.int32), t)
    head = PackedHead.pack(random_weight(70, 97), 8, torch.linspace(-1, 1, 97))
    native = [linear.project(x, w, counts, bits, n)[0] for n in (None, 40, 20)]
    native.append(linear.logits(x, head, None))
    monkeypatch.setattr(core, "available", lambda: False)
    in_torch = [linear.project(x, w, counts, bits, n)[0] for n in (None, 40, 20)]
    in_torch.append(linear.logits(x, head, None))
    for first, second in zip(native, in_torch, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
@pytest.mark.parametrize("stored", [4, 8])
def test_a_products_bits_do_not_depend_on_company(stored: int, rng: np.random.Generator):
    x = activations(150, 300)
    w = PackedWeight.pack(random_weight(300, 700), stored, torch.linspace(-1, 1, 700))
    head = PackedHead.pack(random_weight(300, 97), 8)
    counts = np.where(rng.integers(0, 2, 150), 300, rng.integers(1, 300, 150)).astype(np.int32)
    bits = rng.choice(np.array([2, 4, 8, 16], np.int32), 150)
    whole, _ = linear.project(x, w, counts, bits)
    logits = linear.logits(x, head, None)
    for stretch in (1, 2, 3, 5, 37):
        for start in range(0, 150, 29):
            part = slice(start, start + stretch)
            alone, _ = linear.project(x[part], w, counts[part], bits[part])
            assert torch.equal(alone, whole[part])
            assert torch.equal(linear.logits(x[part], head, None), logits[part])


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("t", [1, 40])
def test_a_token_without_attention_does_not_read_the_queries(t: int):
    w = pair()
    poisoned = PackedPair(parts=(w.parts[0], replace(w.parts[1], high=torch.zeros(0))))
    args = activations(t, 70), full(t, 70), full(t, 16)
    clean, _ = linear.project(args[0], w, *args[1:], 40)
    out, _ = linear.project(args[0], poisoned, *args[1:], 40)
    assert torch.equal(out, clean)


@pytest.mark.usefixtures("in_torch")
def test_logits_of_few_and_of_many_tokens():
    head = PackedHead.pack(random_weight(48, 97), 8, torch.linspace(-1, 1, 97))
    x = activations(40, 48)
    few = torch.cat([linear.logits(row[None], head, None) for row in x])
    torch.testing.assert_close(few, linear.logits(x, head, None))
    assert linear.logits(x[:0], head, None).shape == (0, 97)


@pytest.mark.model
def test_the_default_model_is_given_back_exactly():
    """Every projection by 4-bit codes and the head by 8-bit ones, against the float32 file."""
    from safetensors import safe_open

    from vesicle.engine.weights import from_folder
    from vesicle.models import ensure_default_model

    folder = ensure_default_model(progress=False)
    loaded = from_folder(folder)
    assert loaded.format == "int4"
    assert loaded.head is loaded.embedding
    assert loaded.bytes_held == 106168320 * 5 // 8 + 49152 * 576 * 9 // 8 + 61 * 576 * 4
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
        for start in range(0, 49152, 8192):
            ids = torch.arange(start, start + 8192)
            assert torch.equal(loaded.embed(ids), embedding[start : start + 8192])
        for number, layer in enumerate(loaded.layers):
            values_keys, queries = layer.attention_in.parts
            for packed, names in (
                (values_keys, ("self_attn.v_proj", "self_attn.k_proj")),
                (queries, ("self_attn.q_proj",)),
                (layer.attention_out, ("self_attn.o_proj",)),
                (layer.ffn_in, ("mlp.gate_proj", "mlp.up_proj")),
                (layer.ffn_out, ("mlp.down_proj",)),
            ):
                stored = [file.get_tensor(f"model.layers.{number}.{n}.weight") for n in names]
                whole = packed.dequantize(packed.bits)
                assert torch.equal(whole, torch.cat(stored).t()), (number, names)
