"""A NAMM as a press of kvpress: it shrinks the cache of transformers when a prompt has been read.

    with NAMMPress(memory=0.25)(model):
        model(ids, past_key_values=cache)

It keeps what the engine's `NammMemory` keeps that is asked once, at the end of the prompt: KV heads
get the parts of the memory that the profile says, and in each those entries stay that are first,
newest, or scored highest. What the network sees is worked out from the newest queries alone, so
attention may run as it likes. Text that follows is not forgotten from; the engine does that.

A cache of transformers holds as many entries in each KV head of a layer. Where heads keep fewer
than the layer's largest, others fill them up, and these are hidden from attention; they are marked
as `AdaKVPress` marks them (`masked_key_indices`). So the answer is the engine's, and more memory is
held.

kvpress has its own way to hook presses in (`BasePress`); what is ours is the choice, and masks for
layers and heads that hold unequally many entries (see `uneven`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.families import find_cache, find_family
from vesicle.integrations.kvpress.names import find_kvpress
from vesicle.integrations.kvpress.namm_kept import Choice, filled, rotated
from vesicle.integrations.kvpress.uneven import fit_masks, hide
from vesicle.models.default import DEFAULT_MODEL
from vesicle.namm import Namm
from vesicle.shipped import shipped_namms

try:
    from kvpress import BasePress
except ImportError:  # the class can still be named, and says what is missing when it is called
    BasePress = object


@dataclass
class NAMMPress(BasePress):  # type: ignore[misc]  # kvpress ships no types
    """Keeps a share of a prompt's entries, chosen by a NAMM.

    Attributes:
        namm: Which one, or the name of a model that one is shipped for.
        memory: Share of the entries to keep, above 0 and up to 1.

    Raises:
        VesicleError: If there is no such NAMM, `memory` is outside (0, 1], or kvpress is missing.
    """

    namm: Namm | str = DEFAULT_MODEL
    memory: float = 0.25
    _choice: Choice | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what was given."""
        find_kvpress()
        _check_memory(self.memory)
        if isinstance(self.namm, str):
            known = shipped_namms()
            if self.namm not in known:
                raise VesicleError(
                    f"no NAMM of the name {self.namm!r} is shipped; allowed: {', '.join(known)}, "
                    "or a Namm such as Namm.load(folder)"
                )
            self.namm = Namm.load(known[self.namm])
        if not isinstance(self.namm, Namm):
            raise VesicleError(
                f"namm is a {type(self.namm).__name__}; allowed: a Namm such as Namm.load(folder), "
                "or the name of one that is shipped"
            )

    @property
    def compression_ratio(self) -> float:
        """Share of the entries to drop, as other presses have it."""
        return 1 - self.memory

    @compression_ratio.setter
    def compression_ratio(self, ratio: float) -> None:
        _check_memory(1 - ratio)
        self.memory = 1 - ratio

    def post_init_from_model(self, model: Any) -> None:
        """Fit it to a model; kvpress calls it when the context is entered.

        Raises:
            VesicleError: If the model's family is not known, all of its layers have windows, its
                attention is flex attention, or the NAMM is for another model's KV heads.
        """
        _check_memory(self.memory)
        assert isinstance(self.namm, Namm)
        config = model.config.get_text_config()
        decoder = find_family(config).decoder_config(config)
        if decoder.shape.layer_windows.all():
            raise VesicleError(
                "all layers of this model have windows, which a NAMM leaves alone; allowed: models "
                "with a layer that sees the whole text"
            )
        if config._attn_implementation == "flex_attention":
            raise VesicleError(
                "attention of this model is 'flex_attention', whose masks cannot differ between "
                "layers; allowed: sdpa, eager and flash attention"
            )
        self._choice = Choice(namm=self.namm, memory=self.memory, decoder=decoder)

    @torch.no_grad()
    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """What is left of a layer's keys and values; kvpress calls it when a prompt was read.

        Args:
            module: The layer's attention.
            hidden_states: (B, T, D) that it was given.
            keys: (B, G, T, K) rotated.
            values: (B, G, T, K).
            attentions: Not looked at.
            kwargs: Of its forward pass.

        Returns:
            Keys and values (B, G, n, K), in order of position. A prompt that is shorter than what
            the NAMM observes stays whole.

        Raises:
            VesicleError: If another press was here before, or rows of the batch have padding.
        """
        choice = self._choice
        if choice is None:
            raise VesicleError("this NAMMPress was not yet fitted to a model: with press(model): ")
        if choice.memory == 1:
            return keys, values
        layer: Any = module.layer_idx
        # Layers with windows too: transformers makes their masks by the length of the first layer.
        window = int(choice.decoder.shape.layer_windows[layer])
        cache = find_cache(kwargs)
        fit_masks(cache, module, layer, window)
        length, w = hidden_states.shape[1], choice.observes
        if not choice.forgets(layer) or length < w:
            return keys, values
        if keys.shape[2] != length:
            raise VesicleError(
                f"layer {layer} holds {keys.shape[2]} entries of {length} tokens; a NAMMPress must "
                "be the first to choose, and read the prompt in one pass"
            )
        _check_padding(kwargs.get("attention_mask"))
        queries = _newest_queries(module, hidden_states, kwargs, choice) if w else None
        rows = [
            filled(choice.kept(layer, None if queries is None else queries[i], *own), length)
            for i, own in enumerate(zip(keys, values, strict=True))
        ]
        places, hidden = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
        hide(cache, module, layer, hidden.to(keys.device))
        index = places.long().to(keys.device)[..., None]
        return (
            keys.gather(2, index.expand(-1, -1, -1, keys.shape[-1])),
            values.gather(2, index.expand(-1, -1, -1, values.shape[-1])),
        )


def _newest_queries(
    module: nn.Module, hidden: Tensor, kwargs: dict[str, Any], choice: Choice
) -> Tensor:
    """(B, H, w, K) queries of the newest tokens, once more; normed and rotated as the layer has it.

    Attention does not hand them out.
    """
    from kvpress.utils import get_prerope_query_states

    w = choice.observes
    queries: Tensor = get_prerope_query_states(module, hidden[:, -w:])
    if choice.decoder.rotary_layers[module.layer_idx] is None:  # type: ignore[index]  # kvpress' too
        return queries
    cosines, sines = (phase[:, None, -w:] for phase in kwargs["position_embeddings"])
    return rotated(queries, cosines, sines)


def _check_memory(memory: float) -> None:
    if not 0 < memory <= 1:
        raise VesicleError(f"memory is {memory}; allowed: above 0 and up to 1")


def _check_padding(mask: Tensor | None) -> None:
    """Refuse padding, which would be among the entries kept.

    Args:
        mask: Whatever attention of any kind was given; the last query of a text sees all of it.
    """
    if mask is None:
        return
    last = mask[..., -1, :] if mask.ndim == 4 else mask
    seen = last if last.dtype == torch.bool or mask.ndim != 4 else last >= 0
    if not bool(seen.all()):
        raise VesicleError(
            "texts of this batch have padding; allowed: texts of one length, or one at a time"
        )
