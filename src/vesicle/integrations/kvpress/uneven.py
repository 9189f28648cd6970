"""Going on from a cache whose layers hold different numbers of entries.

transformers makes one attention mask for all layers of a kind, as wide as what the first of them
holds. While one token is read at a time none is needed; where several are read at once, a question
say, a layer that holds another number of entries cannot use it. So here each layer gets a mask of
its own, by a hook on its attention module: all that it holds was read before, and of the new tokens
each sees those up to itself.

The hooks act on one cache and its copies, and are taken off the model when the last of them is
gone.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.families import find_cache

MASKED = ("eager", "sdpa")
"""Attention of transformers that takes a mask; flash attention aligns its queries by itself."""
_NAME = "_vesicle_uneven"


class _Mark:
    """Lies on a cache, and is shared by its copies."""

    def __init__(self) -> None:
        self.layers = set[int]()  # that have a hook

    def __copy__(self) -> _Mark:
        return self

    def __deepcopy__(self, memo: Any) -> _Mark:
        return self


def fit_masks(cache: Any, module: nn.Module, layer: int, window: int) -> None:
    """Give a layer masks of its own for as long as this cache, or a copy, is there.

    Args:
        cache: Of transformers. The texts in it must have no padding.
        module: The layer's attention module.
        layer: Its number.
        window: Of the layer; 0 for none.
    """
    mark: _Mark = vars(cache).setdefault(_NAME, _Mark())
    if layer in mark.layers:
        return
    mark.layers.add(layer)
    reference = weakref.ref(mark)

    def fit(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache, mark = find_cache(kwargs), reference()
        if cache is None or mark is None or vars(cache).get(_NAME) is not mark:
            return None
        if module.config._attn_implementation not in MASKED:
            return None
        given, hidden = kwargs.get("attention_mask"), kwargs["hidden_states"]
        if given is None and hidden.shape[1] == 1:
            return None
        seen = _seen(hidden.shape[1], _held(cache, layer), window, hidden.device)
        if given is not None and given.dtype != torch.bool:
            least = torch.finfo(given.dtype).min
            seen = torch.zeros_like(seen, dtype=given.dtype).masked_fill_(~seen, least)
        return args, {**kwargs, "attention_mask": seen}

    handle = module.register_forward_pre_hook(fit, with_kwargs=True)
    weakref.finalize(mark, handle.remove).atexit = False


def _held(cache: Any, layer: int) -> int:
    """Entries of a layer that its next queries are given beside their own."""
    if cache.is_sliding[layer]:  # its length is that of the text
        return int(cache.layers[layer].keys.shape[-2])
    return int(cache.get_seq_length(layer))


def _seen(n: int, held: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, n, held + n) which entries each of n new queries sees."""
    seen = torch.ones(n, held + n, dtype=torch.bool, device=device).tril(held)
    if window:
        seen = seen.triu(held - window + 1)
    return seen[None, None]
