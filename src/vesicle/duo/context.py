"""One text under a base pattern, in which every token may take another pattern for itself.

Choices are not independent: what a token takes changes its keys and values, and so all later
tokens. Here they are made independent by definition. The loss at a token under a pattern is that of
a pass in which this token takes the pattern and all earlier ones the *base*. Its queries, and the
key and value by which it attends to itself, come from its own states; all other keys and values
from one pass under the base. Later tokens change nothing, so every token of a text is evaluated at
once under patterns of its own.

Sizes: S patterns side by side, M of the T tokens, G KV heads, R query heads for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.plan import FFN_BIG

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TOKENS = 64
"""Tokens taken together: they attend to no position after the last of them."""
ROWS = 4096
"""States (one pattern, one token) that are computed together; it bounds memory."""
_HEAD_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What N patterns cost T tokens.

    Attributes:
        loss: (N, T) nats by which the true next token is missed.
        divergence: (N, T) nats, KL from the output of the token with big FFNs only, in the same
            context. It needs no label.
    """

    loss: Tensor
    divergence: Tensor


class Context:
    """Keys and values of a text under a base pattern.

    Attributes:
        n_tokens: T, the tokens that are predicted from.
        n_layers: L.
        targets: (T,) what comes after each.
    """

    @torch.no_grad()
    def __init__(
        self, model: LlamaForCausalLM, tokens: Tensor, base: int | Tensor = FFN_BIG
    ) -> None:
        """Run the base pass.

        Args:
            model: With small FFNs.
            tokens: (T + 1,), the last of which is only predicted.
            base: What all earlier tokens take: one choice, or (T, L).

        Raises:
            VesicleError: There is nothing to predict.
        """
        if tokens.dim() != 1 or len(tokens) < 2:
            raise VesicleError(f"a text of shape {tuple(tokens.shape)}; allowed: 2 tokens or more")
        self.model, self.targets = model, tokens[1:]
        self._layers: list[Any] = list(model.model.layers)
        self.n_tokens, self.n_layers = len(self.targets), len(self._layers)
        self._embedded: Tensor = model.model.embed_tokens(tokens[:-1])  # (T, D)
        positions = torch.arange(self.n_tokens)[None]
        cosines, sines = model.model.rotary_emb(self._embedded[None], positions)
        self._cosines, self._sines = cosines[0, :, None], sines[0, :, None]  # (T, 1, K)
        self._keys: list[Tensor] = []  # (G, T, K) each
        self._values: list[Tensor] = []
        self._read_base(torch.as_tensor(base).expand(self.n_tokens, self.n_layers))
        logits = self.logits(torch.full((self.n_layers,), FFN_BIG))
        p = logits.softmax(-1)
        # KL(p, q) = log Σ exp z - Σ p z + Σ p log p for logits z = W y of q: Σ p z = (Σ p W) y.
        self._expected = p @ self._head  # (T, D)
        self._negentropy = (p * logits.log_softmax(-1)).sum(-1)

    def _read_base(self, base: Tensor) -> None:
        """Keep all keys and values under choices (T, L)."""
        everywhere = torch.arange(self.n_tokens)
        h = self.start(everywhere)
        for layer in range(self.n_layers):
            _, keys, values = self._project(layer, h, everywhere)
            self._keys.append(keys[0].transpose(0, 1).contiguous())
            self._values.append(values[0].transpose(0, 1).contiguous())
            h = self.attend(layer, h, everywhere)
            h = h + self.ffn(layer, h, base[None, :, layer])

    @property
    def _head(self) -> Tensor:
        return self.model.lm_head.weight  # (V, D)

    def start(self, at: Tensor) -> Tensor:
        """(1, M, D) states of tokens at positions `at` (M,), rising, before the first layer."""
        return self._embedded[at][None]

    def attend(self, layer: int, h: Tensor, at: Tensor) -> Tensor:
        """States h (S, M, D) of tokens at positions `at` (M,), rising, after attention."""
        queries, keys, values = self._project(layer, h, at)  # (S, M, H or G, K)
        n, m, n_kv, size = keys.shape
        stop = int(at[-1]) + 1
        old_keys, old_values = self._keys[layer], self._values[layer]
        grouped = queries.view(n, m, n_kv, -1, size).permute(2, 3, 0, 1, 4)  # (G, R, S, M, K)
        own = (grouped * keys.permute(2, 0, 1, 3)[:, None]).sum(-1)  # (G, R, S, M)
        flat = grouped.reshape(n_kv, -1, size)
        logits = (flat @ old_keys[:, :stop].transpose(1, 2)).view(*own.shape, stop)
        logits.masked_fill_(torch.arange(stop) > at[:, None], -torch.inf)
        # The base's key at a token's own position gives way to the token's own.
        places = (..., torch.arange(m), at)
        logits[places] = own
        shares = logits.softmax(-1)
        mixed = (shares.view(n_kv, -1, stop) @ old_values[:, :stop]).view(*own.shape, size)
        change = values.permute(2, 0, 1, 3) - old_values[:, at][:, None]  # (G, S, M, K)
        mixed = mixed + shares[places][..., None] * change[:, None]
        out = mixed.permute(2, 3, 0, 1, 4).reshape(n, m, -1)
        return h + self._layers[layer].self_attn.o_proj(out)

    def ffn(self, layer: int, h: Tensor, chosen: Tensor) -> Tensor:
        """What the FFN adds to states h (S, M, D) under choices (S, M)."""
        block = self._layers[layer]
        return block.mlp.hard(block.post_attention_layernorm(h), chosen)

    def each(self, layer: int, h: Tensor, choices: tuple[int, ...]) -> Tensor:
        """(S, n, M, D) states after the FFN under each of n choices for all of h (S, M, D)."""
        block = self._layers[layer]
        x = block.post_attention_layernorm(h)
        given = (block.mlp.hard(x, torch.full(x.shape[:-1], choice)) for choice in choices)
        return torch.stack([h + added for added in given], dim=1)

    def read(self, h: Tensor, at: Tensor) -> Measured:
        """What final states h (S, M, D) of tokens at positions `at` (M,) cost."""
        y = self.model.model.norm(h)
        head = self._head.T
        parts = [torch.logsumexp(rows @ head, -1) for rows in y.flatten(0, 1).split(_HEAD_ROWS)]
        total = torch.cat(parts).view(h.shape[:-1])  # (S, M)
        hit = (y * self._head[self.targets[at]]).sum(-1)
        near = (y * self._expected[at]).sum(-1) - self._negentropy[at]
        return Measured(loss=total - hit, divergence=(total - near).clamp_min(0))

    @torch.no_grad()
    def logits(self, pattern: Tensor) -> Tensor:
        """(T, V) under one pattern (L,) for all tokens, or one each (T, L)."""
        chosen = pattern.expand(1, self.n_tokens, self.n_layers)
        parts = [self._run(chosen[:, at], at)[0] for at in self.pieces()]
        return self.model.lm_head(self.model.model.norm(torch.cat(parts)))

    @torch.no_grad()
    def evaluate(self, patterns: Tensor) -> Measured:
        """What patterns cost.

        Args:
            patterns: (N, L), the same for all tokens, or (N, T, L).
        """
        chosen = patterns[:, None] if patterns.dim() == 2 else patterns
        chosen = chosen.expand(-1, self.n_tokens, -1)
        found = torch.empty(2, len(chosen), self.n_tokens)
        for at in self.pieces():
            step = max(1, ROWS // len(at))
            for first in range(0, len(chosen), step):
                part = slice(first, first + step)
                read = self.read(self._run(chosen[part][:, at], at), at)
                found[:, part, at] = torch.stack([read.loss, read.divergence])
        return Measured(loss=found[0], divergence=found[1])

    def pieces(self, most: int = TOKENS) -> tuple[Tensor, ...]:
        """Positions of all tokens, in pieces of at most so many."""
        return torch.arange(self.n_tokens).split(most)

    def _run(self, chosen: Tensor, at: Tensor) -> Tensor:
        """(S, M, D) final states under choices (S, M, L)."""
        h = self.start(at).expand(len(chosen), -1, -1)
        for layer in range(self.n_layers):
            h = self.attend(layer, h, at)
            h = h + self.ffn(layer, h, chosen[..., layer])
        return h

    def _project(self, layer: int, h: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (S, M, H, K), scaled, keys and values (S, M, G, K) of states h (S, M, D)."""
        block = self._layers[layer]
        x, attention = block.input_layernorm(h), block.self_attn
        queries, keys, values = (
            project(x).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turn = self._cosines[at], self._sines[at]
        return _rotate(queries, *turn) * attention.scaling, _rotate(keys, *turn), values


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(S, M, heads, K) with rotary phases, whose halves are turned together, as in Llama."""
    left, right = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-right, left], dim=-1) * sines
