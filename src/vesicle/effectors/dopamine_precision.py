"""Dopamine: how many input channels of a projection are read, and how many bits of its weights.

Channels. At a site with C input channels the level d keeps the ceil(C s(d)) channels of largest
magnitude |x_i| (as TEAL, Liu et al. 2024; weighting by column norms as in WINA, Chen et al. 2025,
measured no better on the default model), where s(d) = 1 - r (1 - d), r = `site_rates[site]`, never
below `floor`. Rates differ because the sites do: the FFN's inner channels are sparse and cheap to
drop, its input is not. Only the rows of a channel-major weight that belong to kept channels are
read.

Bits. `bits_ladder` lists (level, bits) steps from the top: the weight is read with the bits of the
first step whose level is at most d. The stored 16-bit weights are rest; 8, 4, 3 and 2 are the
leading bits of one nested 8-bit store (Matryoshka quantization, Nair et al. 2025).

LM head. Where the last layer's level is below `head_below` and only the likeliest token is wanted,
all words are screened by the leading four bits of the head's weights, and the `head_survivors` best
are ranked exactly. It is off unless `head_survivors` is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vesicle.effectors.base import Effector
from vesicle.effectors.rules import Ladder, Rules, Share
from vesicle.plan import FULL_BITS, SITES
from vesicle.shapes import ModelShape

BITS = (16, 8, 4, 3, 2)
_NO_LADDER = ((0.0, FULL_BITS),)
_STRAIGHT = 0.2
"""Width of the sigmoid whose gradient the hard mask borrows."""


@dataclass(frozen=True, kw_only=True)
class DopaminePrecision(Effector):
    """Level to channels and bits.

    Attributes:
        site_rates: Share of a site's channels lost from level 1 to level 0, for each of the four
            sites.
        floor: Least share of channels ever read.
        bits_ladder: Steps (least level, bits), levels falling; the last level must be 0.
        head_survivors: Words that a screened LM head ranks exactly; 0 for the whole head.
        head_below: Last layer's level from which on the whole head runs.
    """

    transmitter: ClassVar[str] = "dopamine"
    site_rates: tuple[float, ...] = (0.5, 1.0, 0.5, 1.0)
    floor: float = 0.05
    bits_ladder: tuple[tuple[float, int], ...] = _NO_LADDER
    head_survivors: int = 0
    head_below: float = 1.0

    def __post_init__(self) -> None:
        """Check that all settings are in range; steps of the ladder become (float, int).

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        object.__setattr__(
            self, "bits_ladder", tuple((float(a), int(b)) for a, b in self.bits_ladder)
        )
        if len(self.site_rates) != len(SITES) or any(not 0 <= r <= 4 for r in self.site_rates):
            raise ValueError(f"site_rates is {self.site_rates}; give four numbers from 0 to 4")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor is {self.floor}; allowed: above 0, up to 1")
        levels = [level for level, _ in self.bits_ladder]
        if levels != sorted(levels, reverse=True) or levels[-1] != 0.0:
            raise ValueError(f"bits_ladder levels are {levels}; they must fall to 0")
        if any(bits not in BITS for _, bits in self.bits_ladder):
            raise ValueError(f"bits_ladder is {self.bits_ladder}; allowed bits: {BITS}")
        if self.head_survivors < 0:
            raise ValueError(f"head_survivors is {self.head_survivors}; allowed: 0 and above")
        if not 0 <= self.head_below <= 1:
            raise ValueError(f"head_below is {self.head_below}; allowed: 0 to 1")

    def rules(self, shape: ModelShape) -> Rules:
        """Channels and bits at the four sites, and the screened LM head."""
        found: list[Share | Ladder] = []
        ladder = self.bits_ladder
        top = () if ladder == _NO_LADDER else ((1.0, FULL_BITS),)
        for site, width in enumerate(shape.site_widths):
            place: Any = {
                "column": site,
                "transmitter": self.transmitter,
                "next_layer": site < 2,
            }
            rate = self.site_rates[site]
            found += [
                Share(field="channels", rate=rate, floor=self.floor, width=width, **place),
                Ladder(field="bits", steps=(*top, *ladder[:-1]), below=ladder[-1][1], **place),
            ]
        survivors = min(self.head_survivors, shape.vocabulary) if shape.screens_head else 0
        steps = ((self.head_below, 0),)
        head = Ladder(field="head", transmitter=self.transmitter, steps=steps, below=survivors)
        return (*found, head)

    def share(self, level: Tensor, site: int) -> Tensor:
        """Differentiable share of channels kept, same shape as `level`."""
        return (1.0 - self.site_rates[site] * (1.0 - level)).clamp(self.floor, 1.0)

    def mask(self, level: Tensor, site: int, magnitude: Tensor, temperature: float) -> Tensor:
        """Soft mask over channels.

        The threshold is the kept share's quantile of the token's own magnitudes; its slope with
        respect to the level is the local spacing of those magnitudes (a central difference over 4 %
        of the channels).

        Args:
            level: (B, T) in [0, 1].
            site: Index into `plan.SITES`.
            magnitude: (B, T, C), not negative.
            temperature: Width of the sigmoid, as a share of the threshold; 0 gives the hard mask
                with the gradient of temperature 0.2 (straight-through).

        Returns:
            (B, T, C) in [0, 1]; exactly 1 where the share is 1.
        """
        width = magnitude.shape[-1]
        share = self.share(level, site)
        count = share * width
        magnitude = magnitude.detach()
        if temperature == 0:
            kept: Tensor = _StraightThrough.apply(count, magnitude)  # type: ignore[no-untyped-call]  # torch
            return kept
        _, threshold, slope = _threshold(count.detach(), magnitude)
        moving = threshold + slope * (count - count.detach()).unsqueeze(-1)
        soft = torch.sigmoid((magnitude / moving.clamp(min=1e-12) - 1.0) / temperature)
        return torch.where((share >= 1.0).unsqueeze(-1), torch.ones_like(soft), soft)


def _threshold(count: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a count of channels cuts a token's magnitudes.

    Args:
        count: (B, T), not whole.
        magnitude: (B, T, C).

    Returns:
        (B, T, 1) each: index of the smallest kept magnitude in falling order, that magnitude, and
        its slope with respect to the count (negative).
    """
    width = magnitude.shape[-1]
    ordered = rising(magnitude).to(magnitude.dtype)
    last = (count - 1e-6).ceil().long().clamp(1, width).unsqueeze(-1) - 1
    span = max(1, width // 50)
    low, high = (last - span).clamp(min=0), (last + span).clamp(max=width - 1)

    def at(position: Tensor) -> Tensor:
        return ordered.gather(-1, width - 1 - position)

    slope = (at(high) - at(low)) / (high - low).clamp(min=1)
    return last, at(last), slope


class _StraightThrough(torch.autograd.Function):
    """The hard mask, with the gradient of the soft one at temperature 0.2.

    With m = sigmoid((|x| / theta - 1) / w) and theta(count) the threshold,
    dm / dcount = - m (1 - m) |x| / (w theta^2) theta', summed against the incoming gradient at
    once, so that nothing but the result is kept per channel.
    """

    @staticmethod
    def forward(ctx: Any, count: Tensor, magnitude: Tensor) -> Tensor:
        last, threshold, slope = _threshold(count, magnitude)
        above, equal = magnitude > threshold, magnitude == threshold
        spare = last + 1 - above.sum(-1, keepdim=True)
        if bool((equal.sum(-1, keepdim=True) > spare).any()):
            # Ties, as of query heads that share one KV head at the first token, go to the lower
            # channels.
            equal = equal & (equal.cumsum(-1, dtype=torch.int32) <= spare)
        free = (count < magnitude.shape[-1]).unsqueeze(-1)
        ctx.save_for_backward(magnitude, threshold, slope * free)
        return (above | equal).to(magnitude.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        magnitude, threshold, slope = ctx.saved_tensors
        inverse = 1 / threshold.clamp(min=1e-12)
        relative = magnitude * inverse
        soft = torch.sigmoid((relative - 1) / _STRAIGHT)
        summed = (grads[0] * soft * (1 - soft) * relative).sum(-1, keepdim=True)
        return (-summed * inverse * slope / _STRAIGHT).squeeze(-1), None


def rising(x: Tensor) -> Tensor:
    """A tensor in fp32 or fp64, sorted along its last axis.

    NumPy's vectorised sort is 20 times PyTorch's speed on a CPU.
    """
    if x.is_cuda:
        return x.float().sort(dim=-1).values
    return torch.from_numpy(
        np.sort(x.double().numpy() if x.dtype == torch.float64 else x.float().numpy())
    )


def largest(x: Tensor, count: Tensor) -> Tensor:
    """The `count`-th largest values (..., 1) of x (..., C), count (...) from 1 to C."""
    ordered = rising(x.detach()).to(x.dtype)
    return ordered.gather(-1, (x.shape[-1] - count).clamp(0, x.shape[-1] - 1).unsqueeze(-1))
