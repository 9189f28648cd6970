"""Going on from a cache whose layers and KV heads hold different numbers of entries.

transformers makes one attention mask for all layers of a kind, as wide as what the first of them
holds. While one token is read at a time none is needed; where several are read at once, a question
say, a layer that holds another number of entries cannot use it. So here each layer gets a mask of
its own, by a hook on its attention module: all that it holds was read before, and of the new tokens
each sees those up to itself.

Entries that fill up a KV head are hidden by that mask too. kvpress has `masked_key_indices` for
them: it puts a key in their place that it searches for, against all queries of the pass. None may
exist where these are many, and eager attention does not look at the marks. So they are left to
attention that takes no mask. They lie on the module, whatever cache it is given; here they count
for the cache that they were made for alone.

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
_Places = tuple[Tensor, ...]


class _Mark:
    """Lies on a cache, and is shared by its copies."""

    def __init__(self) -> None:
        self.layers = set[int]()  # that have a hook
        self.hidden = dict[int, Tensor]()  # (B, H, n) by layer, for each query head
        self.places = dict[int, _Places]()  # the same, as kvpress has them

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
    mark: _Mark | None = vars(cache).get(_NAME)
    if mark is None or layer in mark.layers:  # it holds another text now, its copies need not
        mark = vars(cache)[_NAME] = _Mark()
    mark.layers.add(layer)
    reference = weakref.ref(mark)

    def fit(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache, mark = find_cache(kwargs), reference()
        if mark is None:
            return None
        _unmark(module, mark.places.get(layer))
        if cache is None or vars(cache).get(_NAME) is not mark:
            return None
        held = _held(cache, layer)
        if not held:  # emptied, to be filled anew
            del vars(cache)[_NAME]
            return None
        attention, hidden = module.config._attn_implementation, mark.hidden.get(layer)
        if attention not in MASKED:
            if hidden is not None:
                module.masked_key_indices = mark.places[layer]
            return None
        given, states = kwargs.get("attention_mask"), kwargs["hidden_states"]
        if given is None and states.shape[1] == 1 and hidden is None:
            return None
        seen = _seen(states.shape[1], held, window, states.device)
        if hidden is not None:
            seen = _without(seen, hidden)
        if attention == "eager":  # which adds it
            least = torch.finfo(states.dtype).min
            seen = torch.zeros_like(seen, dtype=states.dtype).masked_fill_(~seen, least)
        return args, {**kwargs, "attention_mask": seen}

    handle = module.register_forward_pre_hook(fit, with_kwargs=True)
    owner, places = weakref.ref(module), mark.places

    def release() -> None:
        handle.remove()
        _unmark(owner(), places.get(layer))

    weakref.finalize(mark, release).atexit = False


def hide(cache: Any, module: Any, layer: int, hidden: Tensor) -> None:
    """Let no later query see some of the entries that a layer holds now.

    Args:
        cache: One that `fit_masks` was called with, for this layer.
        module: The layer's attention module.
        layer: Its number.
        hidden: (B, G, n) which entries, for each KV head.
    """
    mark: _Mark = vars(cache)[_NAME]
    module.masked_key_indices = None
    if hidden.any():
        groups = module.config.num_attention_heads // hidden.shape[1]
        mark.hidden[layer] = hidden.repeat_interleave(groups, 1)
        mark.places[layer] = module.masked_key_indices = torch.where(hidden)


def _unmark(module: Any, places: _Places | None) -> None:
    """Take marks off a module, unless they are somebody else's."""
    if places is not None and getattr(module, "masked_key_indices", None) is places:
        module.masked_key_indices = None


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


def _without(seen: Tensor, hidden: Tensor) -> Tensor:
    """(B, H, n, m) what is left to see, of (1, 1, n, m), where the first entries are hidden."""
    left = seen.repeat(*hidden.shape[:2], 1, 1)
    n = min(hidden.shape[2], seen.shape[3])
    left[..., :n] &= ~hidden[:, :, None, :n]
    return left
