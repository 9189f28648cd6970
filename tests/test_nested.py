import pytest
import torch
from torch import Tensor

from vesicle.nested import GROUP, NestedWeight


def draw(n_in: int = 96, n_out: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(n_in, n_out, generator=torch.Generator().manual_seed(seed))


def four_bit(n_in: int = 96, n_out: int = 20) -> tuple[Tensor, Tensor]:
    """A weight as an asymmetric 4-bit format with groups of 32 stores it, and its 4-bit codes."""
    generator = torch.Generator().manual_seed(1)
    groups = -(-n_in // GROUP)
    step = torch.rand(groups, n_out, generator=generator).half().float() * 0.1 + 0.01
    low = torch.randn(groups, n_out, generator=generator).half().float()
    codes = torch.randint(0, 16, (groups * GROUP, n_out), generator=generator)
    codes[0::GROUP], codes[1::GROUP] = 0, 15  # both ends in use, as a quantiser leaves them
    group = torch.arange(n_in) // GROUP
    return low[group] + step[group] * codes[:n_in], codes[:n_in]


def test_four_bits_reproduce_a_four_bit_weight():
    weight, codes = four_bit()
    nested = NestedWeight.quantize(weight)
    assert torch.equal(nested.codes.long(), 17 * codes)
    scale = weight.abs().max().item()
    # Exact up to the two roundings of fp32 in low + span * level.
    torch.testing.assert_close(nested.dequantize(4), weight, rtol=0, atol=3e-7 * scale)
    torch.testing.assert_close(nested.dequantize(8), weight, rtol=0, atol=3e-7 * scale)


def test_error_falls_with_bits():
    weight = draw()
    nested = NestedWeight.quantize(weight)
    span = nested.span[torch.arange(96) // GROUP]
    errors = []
    for bits in (2, 3, 4, 8):
        error = (nested.dequantize(bits) - weight).abs()
        assert (error <= span / (2**bits - 1) * 1.001).all()
        errors.append(error.mean().item())
    assert errors[0] > 1.7 * errors[1] > 2.5 * errors[2]
    assert errors[3] < errors[2] / 10


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fewer_bits_are_the_leading_bits(bits: int):
    nested = NestedWeight.quantize(draw())
    group = torch.arange(96) // GROUP
    level = (nested.dequantize(bits) - nested.low[group]) / nested.span[group] * (2**bits - 1)
    assert torch.equal(level.round().to(torch.uint8), nested.codes >> (8 - bits))
    torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_in", [1, 31, 32, 33, 48, 80])
def test_any_number_of_channels(n_in: int):
    weight = draw(n_in)
    nested = NestedWeight.quantize(weight)
    assert nested.codes.shape == weight.shape
    assert nested.codes.dtype == torch.uint8
    assert nested.low.shape == nested.span.shape == (-(-n_in // GROUP), 20)
    error = (nested.dequantize(8) - weight).abs()
    assert (error <= nested.span[torch.arange(n_in) // GROUP] / 510 + 1e-6).all()


def test_some_channels_are_rows_of_all():
    nested = NestedWeight.quantize(draw(80))
    channels = torch.tensor([79, 3, 40, 3])
    for bits in (8, 4, 3, 2):
        assert torch.equal(nested.dequantize(bits, channels), nested.dequantize(bits)[channels])
    assert nested.dequantize(4, channels[:0]).shape == (0, 20)


def test_a_constant_group_is_exact():
    weight = torch.full((40, 3), 0.7)
    nested = NestedWeight.quantize(weight)
    for bits in (8, 4, 3, 2):
        assert torch.equal(nested.dequantize(bits), weight)


def test_half_precision_weights_are_taken():
    weight = draw().bfloat16()
    nested = NestedWeight.quantize(weight)
    assert nested.dequantize(8).dtype == torch.float32
    assert (nested.dequantize(8) - weight.float()).abs().max() < 0.02
