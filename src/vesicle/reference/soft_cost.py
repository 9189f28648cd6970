"""The expected cost of soft levels: the ledger's formulas with shares in place of counts.

Summed in units of the dense FLOPs of the same tokens (LM head included), so that its value is the
share of the dense cost that a budget names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.modulator import Modulator
from vesicle.plan import BLOCK
from vesicle.plan.windows import seen, visible_blocks, whole_blocks
from vesicle.shapes import ModelShape, Overhead
from vesicle.transmitters import index


class SoftCost:
    """Accumulates executed and dense FLOPs, per token, over the layers of one pass."""

    def __init__(self, shape: ModelShape, modulator: Modulator, overhead: Overhead) -> None:
        """Start both sums at 0 FLOPs; they are (B, T) from the first charge on."""
        self._shape, self._modulator, self._overhead = shape, modulator, overhead
        self.executed: Tensor = torch.zeros(())  # (B, T)
        self.dense: Tensor = torch.zeros(())

    def head(self, positions: Tensor) -> None:
        """Charge the LM head and the predictor for tokens at positions (B, T)."""
        shape = self._shape
        head = 2.0 * shape.width * shape.vocabulary
        self.dense = self.dense + torch.full_like(positions, head, dtype=torch.float64)
        self.executed = self.executed + torch.full_like(
            positions, head + self._overhead.modulator_flops * shape.n_layers, dtype=torch.float64
        )

    def attention(self, levels: Tensor | None, positions: Tensor, window: int = 0) -> None:
        """Charge one attention layer at levels (B, T, 5), None for rest, and its window."""
        shape, modulator = self._shape, self._modulator
        inputs, outputs = shape.site_widths, shape.site_outputs
        places = positions.cpu().numpy()

        def count_of(kind: Callable[..., NDArray[Any]]) -> Tensor:
            return torch.from_numpy(kind(places, window)).to(positions.device).double()

        reads = count_of(seen)
        dense = 2.0 * (inputs[0] * outputs[0] + inputs[1] * outputs[1]) + (
            4.0 * shape.query_width * reads
        )
        self.dense = self.dense + dense
        if levels is None:
            self.executed = self.executed + dense
            return
        dopamine = levels[..., index("dopamine")].double()
        gaba = levels[..., index("gaba")].double()
        serotonin = modulator.serotonin
        runs = serotonin.mask(levels[..., index("serotonin")], serotonin.attention_below, 0.0)
        runs = runs.double()
        visible = count_of(visible_blocks)
        count = modulator.gaba.count(gaba, visible)
        chooses = count < visible
        visited = torch.where(chooses, (count - 1) * BLOCK + positions % BLOCK + 1, reads)
        choosing = chooses * 2.0 * modulator.gaba.vectors * count_of(whole_blocks)
        share = [modulator.dopamine.share(dopamine, site) for site in (0, 1)]
        self.executed = (
            self.executed
            + 2.0 * share[0] * inputs[0] * (2 * shape.kv_width + runs * shape.query_width)
            + runs * 2.0 * share[1] * inputs[1] * outputs[1]
            + runs * shape.query_width * (4.0 * visited + choosing)
            + (1 - runs) * 2.0 * self._overhead.small_attention_weights
        )

    def ffn(self, levels: Tensor) -> None:
        """Charge one FFN at levels (B, T, 5)."""
        shape, modulator = self._shape, self._modulator
        inputs, outputs = shape.site_widths, shape.site_outputs
        dense = 2.0 * (inputs[2] * outputs[2] + inputs[3] * outputs[3])
        dopamine = levels[..., index("dopamine")].double()
        serotonin = modulator.serotonin
        depth = levels[..., index("serotonin")]
        big = serotonin.mask(depth, serotonin.ffn_below, 0.0).double()
        small = (1 - big) * serotonin.mask(depth, serotonin.bypass_below, 0.0).double()
        share = [modulator.dopamine.share(dopamine, site) for site in (2, 3)]
        self.dense = self.dense + dense
        self.executed = (
            self.executed
            + big * 2.0 * (share[0] * inputs[2] * outputs[2] + share[1] * inputs[3] * outputs[3])
            + small * 2.0 * self._overhead.small_ffn_weights
        )

    def preview(self, levels: Tensor) -> None:
        """Charge a preview for the LM head where the last layer's levels (B, T, 5) say so."""
        shape, rank, gaba = self._shape, self._overhead.head_rank, self._modulator.gaba
        exact = gaba.logits
        if not rank or not 0 < exact < shape.vocabulary:
            return
        saved = shape.width * (shape.vocabulary - exact) - rank * (shape.width + shape.vocabulary)
        self.executed = self.executed - 2.0 * saved * gaba.previews(levels[..., index("gaba")])

    @property
    def share(self) -> Tensor:
        """Executed over dense FLOPs of all tokens, a scalar."""
        return self.executed.sum() / self.dense.sum()

    def share_of(self, tokens: Tensor) -> Tensor:
        """The same of some tokens, (B, T) booleans, of which there is one at least."""
        return self.executed[tokens].sum() / self.dense[tokens].sum()
