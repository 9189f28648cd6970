"""Pattern: what the queries of one layer attend to, in plain, differentiable arithmetic.

Patterns have no projections of their own: a decoder keeps its queries, keys, values and number of
parameters whatever its pattern. Each tells how many cached entries (a key and a value) its queries
read, which is what patterns are compared at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb


class Pattern(nn.Module, ABC):
    """Attention of one layer.

    Attributes:
        kind: Its name.
        reads: Entries that a query read in the last pass, on average; differentiable where the
            pattern is learnt.
    """

    kind: ClassVar[str]
    reads: Tensor

    def __init__(self) -> None:
        """Nothing is remembered from one pass to the next."""
        super().__init__()
        self._remembers = False
        self._kept: tuple[Tensor, Tensor] | None = None

    def begin(self) -> None:
        """Remember what is read from here on, for a text that comes in parts."""
        self._remembers, self._kept = True, None

    def end(self) -> None:
        """Forget it, and remember nothing."""
        self._remembers, self._kept = False, None

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are held."""
        return 0 if self._kept is None else sum(x.nbytes for x in self._kept)

    def read(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """`forward` on what is new and, where it remembers, on what was before it."""
        if self._remembers:
            if self._kept is not None:
                key = torch.cat([self._kept[0], key], 2)
                value = torch.cat([self._kept[1], value], 2)
            self._kept = (key, value)
        return self(hidden, query, key, value, scale)

    @abstractmethod
    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """What queries attend to, those of the newest T of S positions.

        Args:
            hidden: (B, T, D) what the layer's projections read.
            query: (B, H, T, K), rotated.
            key: (B, G, S, K), rotated; H is a multiple of G.
            value: (B, G, S, K).
            scale: Of the logits.

        Returns:
            (B, H, T, K).
        """


class Dense(Pattern):
    """Every query reads all that is before it."""

    kind = "dense"

    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See the base class."""
        new, length = query.shape[2], key.shape[2]
        self.reads = torch.tensor(length - (new - 1) / 2)
        mask = None if new in (1, length) else causal_mask(query, key)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=new == length,
            scale=scale,
            enable_gqa=True,
        )


class Masked(Pattern):
    """A pattern that is a mask over positions; a subclass says which."""

    @abstractmethod
    def seen(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Where queries look, (T, S) or (B, H, T, S) booleans; what is not before them is cut."""

    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See the base class."""
        seen = self.seen(query, key, scale) & causal_mask(query, key)
        self.reads = seen.sum(-1, dtype=torch.float32).mean()
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
        )


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """(T, S) what is before the queries, which are those of the newest T of S positions."""
    return places(key) <= asking(query, key)[:, None]


def places(key: Tensor) -> Tensor:
    """(S,) positions of keys."""
    return torch.arange(key.shape[2], device=key.device)


def asking(query: Tensor, key: Tensor) -> Tensor:
    """(T,) positions of queries, the newest of those of keys."""
    return torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)


class PatternedAttention(nn.Module):
    """A layer's attention with its projections as they were, and a pattern."""

    def __init__(self, attention: LlamaAttention, pattern: Pattern) -> None:
        """Takes over the projections of transformers' module."""
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.head_size, self.pattern = attention.head_dim, pattern

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: hidden states (B, T, D) before and after."""
        shape = (*hidden_states.shape[:2], -1, self.head_size)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        out = self.pattern.read(hidden_states, query, key, value, self.head_size**-0.5)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def patterned(model: LlamaForCausalLM, make: Callable[[int], Pattern]) -> list[Pattern]:
    """Give each layer of a decoder a pattern, in place of the one that it has.

    Args:
        model: From `new_decoder`.
        make: A layer's number to its pattern.

    Returns:
        The patterns.
    """
    patterns = []
    for number, layer in enumerate(model.model.layers):
        patterns.append(make(number))
        layer.self_attn = PatternedAttention(layer.self_attn, patterns[-1])
    return patterns
