"""One nested weight store for 8, 4, 3 and 2 bits.

Each weight is an 8-bit code within its group of 32 input channels, w = low + span c / 255, and b
bits read the b leading bits of the code, w_b = low + span (c >> (8 - b)) / (2^b - 1) (Matryoshka
quantization, Nair et al. 2025). Weights that came from an asymmetric 4-bit group-32 format (GGUF
Q4_1) have codes 17 q, whose four leading bits are q, so 4 bits give them back exactly.

`low` and `span` are kept in fp32 here and priced as fp16 in the ledger's one bit per weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32


@dataclass(frozen=True, kw_only=True)
class NestedWeight:
    """Codes of a weight matrix, groups along the input channels.

    Attributes:
        codes: (in, out) uint8, channel-major.
        low: (in / 32 rounded up, out).
        span: Same shape as `low`.
    """

    codes: Tensor
    low: Tensor
    span: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> NestedWeight:
        """Encode a channel-major weight (in, out)."""
        n_in, n_out = weight.shape
        groups = -(-n_in // GROUP)
        padded = weight.float()
        if n_in % GROUP:
            # Repeating the last channel leaves a short group's range as it is.
            padded = torch.cat([padded, padded[-1:].expand(groups * GROUP - n_in, n_out)])
        grouped = padded.view(groups, GROUP, n_out)
        low, high = grouped.amin(1), grouped.amax(1)
        span = high - low
        scale = torch.where(span > 0, 255 / span.clamp(min=1e-20), torch.zeros_like(span))
        codes = ((grouped - low[:, None]) * scale[:, None]).round().clamp(0, 255).to(torch.uint8)
        return cls(
            codes=codes.reshape(groups * GROUP, n_out)[:n_in].contiguous(), low=low, span=span
        )

    def dequantize(self, bits: int, channels: Tensor | None = None) -> Tensor:
        """Rows `channels` (k,) (all by default) of the weight at `bits` bits: (k, out) fp32."""
        codes = self.codes if channels is None else self.codes[channels]
        rows = torch.arange(len(self.codes)) if channels is None else channels
        group = rows // GROUP
        levels = (codes >> (8 - bits)).float() / (2**bits - 1)
        return self.low[group] + self.span[group] * levels
