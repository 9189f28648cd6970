"""Gates trained by gradient: how fast an entry's worth decays.

Each entry has a rate b between 0 and 1, by its gate. The query that comes n tokens later pays it
attention as if its logit were n log b lower, so that keeping and forgetting become a matter of
degree, and have gradients. Gates are trained so that the model says what it says without them,

    loss = KL(dense || decayed) + price * mean over queries of max(0, held - allowed) / allowed

where `held` is the sum of b^n over all entries, and `allowed` the share of them that may be. When
it is over, entries with the least b^n are forgotten.

After TRIM-KV (Bui et al. 2025, arXiv:2512.03324), and no reproduction of it: a gate sees key and
value, as all gates here do; what is allowed is shared by all heads, whose parts become the profile;
the loss has no term of the next token; and b^n weighs what the softmax sums up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vesicle.families import DecoderConfig, find_family
from vesicle.namm import Namm
from vesicle.namm.gates import width_of
from vesicle.training.objectives import divergence

_NAME, _RULE = "vesicle_decay", "vesicle_decays"
_FIRST_RATE = 6.0
"""Logit of the rates that training begins with: 0.9975."""
_LEARNING_RATE = 0.02
_MOST_TOKENS = 1024
_MIN_TOKENS = 64


class _Decays:
    """The gates of one layer, and what the latest pass held."""

    def __init__(self, decoder: DecoderConfig, layer: int) -> None:
        shape = decoder.shape
        self.weights = torch.zeros(shape.n_kv_heads, width_of(shape.head_size))
        self.weights[:, -1] = _FIRST_RATE
        self.weights.requires_grad_()
        which = decoder.rotary_layers[layer]
        self._rotation = None if which is None else decoder.rotaries[which]
        self.held = torch.zeros(0)  # (G, T)

    def log_weights(self, key: Tensor, value: Tensor) -> Tensor:
        """(G, T, T) n log b of each query and entry; minus infinity of later entries.

        Args:
            key: (G, T, K) rotated.
            value: (G, T, K).
        """
        key, value = key.detach(), value.detach()
        positions = torch.arange(key.shape[1])
        if self._rotation is not None:
            key = self._rotation.undone(key, positions)
        inputs = torch.cat([key, value, torch.ones_like(key[..., :1])], -1)
        rates = logsigmoid(inputs @ self.weights[..., None])[..., 0]  # (G, T)
        ages = positions[:, None] - positions
        found = (rates[:, None] * ages.clamp(min=0)).masked_fill(ages < 0, -torch.inf)
        self.held = found.exp().sum(-1)
        return found


def by_decay(
    model: nn.Module,
    start: Namm,
    contexts: Sequence[Sequence[int]],
    memory: Sequence[float],
    *,
    price: float = 1.0,
    seed: int = 0,
    wait: Callable[[str], None] = lambda note: None,
) -> Namm:
    """A NAMM whose gates are trained on contexts, each seen once.

    Args:
        model: A Hugging Face causal LM in fp32; its own weights take no gradients any more.
        start: Whose settings it has; its network is left out.
        contexts: Token ids of each, of which the first 1,024 are read; those below 64 tokens are
            left out.
        memory: Shares of the entries; their mean is allowed.
        price: Nats for holding twice of what is allowed.
        seed: Of the order of contexts.
        wait: Takes a note of which context it is at.
    """
    config: Any = model.requires_grad_(False).config
    family, allowed = find_family(config), float(np.mean(memory))
    decoder = family.decoder_config(config)
    shape = decoder.shape
    layers = np.nonzero(shape.layer_windows == 0)[0].tolist()
    decays = {layer: _Decays(decoder, layer) for layer in layers}
    optimizer = torch.optim.Adam([d.weights for d in decays.values()], lr=_LEARNING_RATE)
    long = [list(ids[:_MOST_TOKENS]) for ids in contexts if len(ids) >= _MIN_TOKENS]
    shares = torch.zeros(shape.n_layers, shape.n_kv_heads)
    order = np.random.default_rng(seed).permutation(len(long)).tolist()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, max(1, len(order)))
    attention = {layer: family.modules(family.layers(model)[layer]).attention for layer in layers}
    for n, i in enumerate(order):
        wait(f"gates by gradient, context {n + 1} of {len(order)}")
        ids = torch.tensor([long[i]])
        with torch.no_grad():
            dense = model(ids, use_cache=False).logits
        with _decaying(model, attention, decays):
            found = model(ids, use_cache=False).logits
        held = torch.stack([d.held for d in decays.values()]).mean(
            (0, 1)
        )  # (T,) a head, on average
        may = allowed * torch.arange(1, len(held) + 1)
        later = slice(len(held) // 4, None)  # what is newest is much of a short text
        over = ((held - may) / may).clamp(min=0)[later].mean()
        loss = divergence(dense, found) + price * over
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([d.weights for d in decays.values()], 1.0)
        optimizer.step()
        schedule.step()
        weight = 2 * (n + 1) / (len(order) * (len(order) + 1))  # the later, the better trained
        for layer, d in decays.items():
            shares[layer] += weight * d.held.detach()[:, -1] / len(held)
    gates = np.zeros((shape.n_layers, shape.n_kv_heads, width_of(shape.head_size)), np.float32)
    for layer, d in decays.items():
        gates[layer] = d.weights.detach().numpy()
    return replace(
        start,
        settings=replace(start.settings, decays=True),
        parameters=np.zeros_like(start.parameters),
        gates=gates,
        ages=np.zeros((0, 0), np.float32),
        profile=shares.clamp(min=1e-3).log().numpy(),
    )


@contextmanager
def _decaying(
    model: nn.Module, attention: dict[int, nn.Module], decays: dict[int, _Decays]
) -> Iterator[None]:
    """Within, layers pay attention as their gates have it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config: Any = model.config
    before = config._attn_implementation
    handles = [
        module.register_forward_pre_hook(_handing(decays[layer]), with_kwargs=True)
        for layer, module in attention.items()
    ]
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        for handle in handles:
            handle.remove()


def _handing(decays: _Decays) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, _RULE: decays}

    return before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    decays: _Decays | None = kwargs.pop(_RULE, None)
    if decays is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    g = key.shape[1]
    grouped = query[0].unflatten(0, (g, -1))  # (G, R, T, K)
    scores = grouped @ key[0, :, None].mT * kwargs["scaling"]
    scores = scores + decays.log_weights(key[0], value[0])[:, None]
    out = scores.softmax(-1) @ value[0, :, None]  # (G, R, T, K)
    return out.flatten(0, 1).transpose(0, 1)[None], None
