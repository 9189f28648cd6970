"""Linear attention (Katharopoulos et al. 2020): a state of fixed size in the place of a cache.

    out_t = phi(q_t) . sum_s phi(k_s) v_s / phi(q_t) . sum_s phi(k_s),  phi(x) = elu(x) + 1

Computed here by all pairs, which gives the same. A query reads the state: K (K + 1) numbers, as
many as (K + 1) / 2 entries of a cache have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu

from vesicle.scratch.patterns.base import Pattern, causal_mask


class Linear(Pattern):
    """A sum over all that was, without a softmax."""

    kind = "linear"

    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See the base class."""
        group = query.shape[1] // key.shape[1]
        self.reads = torch.tensor((query.shape[-1] + 1) / 2)
        causal = causal_mask(query, key)
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        pairs = (elu(query) + 1) @ (elu(key) + 1).transpose(-1, -2)
        pairs = pairs.masked_fill(~causal, 0.0)
        return pairs @ value / pairs.sum(-1, keepdim=True)
