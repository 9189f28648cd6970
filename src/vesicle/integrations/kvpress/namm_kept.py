"""Which entries of a prompt that was read at once a NAMM keeps, in one layer.

It is what `NammMemory` keeps in the engine that is asked for the first time when all of the prompt
has been read: the same features, of the attention that the newest queries paid, the same network,
the same parts of KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.families import DecoderConfig
from vesicle.namm import Namm
from vesicle.namm.allotment import allot
from vesicle.namm.gates import gate_scores
from vesicle.namm.method import best, protected
from vesicle.namm.spectrogram import Averages
from vesicle.plan import IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A NAMM's, in one model at one share of memory.

    Attributes:
        namm: Which.
        memory: Share of the entries to keep, above 0 and up to 1.
        decoder: Of the model.

    Raises:
        VesicleError: If the NAMM has a profile or gates of another model's KV heads.
    """

    namm: Namm
    memory: float
    decoder: DecoderConfig

    def __post_init__(self) -> None:
        """Check the sizes."""
        self.namm.check_fits(self.decoder.shape)

    @property
    def observes(self) -> int:
        """Newest queries that it needs to see; 0 for a network that prefers nothing."""
        return self.namm.settings.observes if self.namm.sees_attention else 0

    def forgets(self, layer: int) -> bool:
        """Whether a layer loses entries: those with a window hold no more than that anyway."""
        return not self.decoder.shape.layer_windows[layer]

    def kept(
        self, layer: int, queries: Tensor | None, keys: Tensor, values: Tensor
    ) -> list[IntArray]:
        """(n,) positions for each KV head, rising.

        Args:
            layer: One that forgets.
            queries: (H, observes, K) the newest, rotated and not scaled; None if it observes none.
            keys: (G, T, K) of the whole prompt, rotated.
            values: (G, T, K) of the same.
        """
        length = keys.shape[1]
        positions = np.arange(length, dtype=np.int32)
        always = protected(self.namm.settings, positions, length)
        gated, attention = self._gated(layer, keys, values), None
        if queries is not None:
            attention = newest_attention(queries, keys, self.decoder.attention_scale)
        kept = []
        for head, count in enumerate(self._allotted(layer, length)):
            scores = gated[head]
            if attention is not None:
                spectral = Averages().update(positions, attention[head], length)
                scores = scores + self.namm.scores(spectral, positions, length)
            kept.append(positions[best(scores, always, count)])
        return kept

    def _gated(self, layer: int, keys: Tensor, values: Tensor) -> list[NDArray[np.float32]]:
        """(T,) of each KV head, what gates give to entries."""
        if not self.namm.gates.size:
            return [np.zeros(keys.shape[1], np.float32)] * len(keys)
        plain, which = keys.float(), self.decoder.rotary_layers[layer]
        if which is not None:
            places = torch.arange(keys.shape[1], device=keys.device)
            plain = self.decoder.rotaries[which].undone(plain, places)
        given = (list(x.float().cpu().numpy()) for x in (plain, values))
        found = gate_scores(self.namm.gates[layer], *given)
        length = keys.shape[1]
        positions = np.arange(length, dtype=np.int32)
        return [
            self.namm.gated(layer, head, scores, positions, length)
            for head, scores in enumerate(found)
        ]

    def _allotted(self, layer: int, length: int) -> list[int]:
        """(G,) entries that the KV heads of a layer may keep."""
        shape, settings = self.decoder.shape, self.namm.settings
        forgets = np.nonzero(shape.layer_windows == 0)[0]
        profile = self.namm.profile_of(shape)[forgets]
        always = settings.sinks + settings.recent
        counts = allot(profile.ravel(), self.memory * length, length, always)
        g = shape.n_kv_heads
        row = int(np.searchsorted(forgets, layer)) * g
        return counts[row : row + g]


def filled(kept: list[IntArray], length: int) -> tuple[IntArray, NDArray[np.bool_]]:
    """(G, n) positions, rising, n the most that any KV head keeps; and which of them none kept.

    Args:
        kept: (n,) positions of each KV head below `length`, rising; others fill them up.
        length: Positions there are.
    """
    n = max(map(len, kept))
    places, hidden = np.empty((len(kept), n), np.int32), np.empty((len(kept), n), bool)
    for head, own in enumerate(kept):
        others = np.setdiff1d(np.arange(length, dtype=np.int32), own)[: n - len(own)]
        places[head] = np.sort(np.concatenate([own, others]))
        hidden[head] = np.isin(places[head], others)
    return places, hidden


def newest_attention(queries: Tensor, keys: Tensor, scale: float) -> NDArray[np.float32]:
    """(G, w, T) probabilities that the newest queries pay, mean over the query heads of a KV head.

    Args:
        queries: (H, w, K) of the newest w tokens.
        keys: (G, T, K) of all tokens.
        scale: Factor on the products.
    """
    (g, t, _), w = keys.shape, queries.shape[1]
    found = np.empty((g, w, t), np.float32)
    later = torch.ones(w, w, dtype=torch.bool, device=keys.device).triu(1)
    # fp32 whatever the model has, as in the engine; the scores of one KV head at a time in memory.
    for head, rows in enumerate(queries.unflatten(0, (g, -1))):
        scores = (rows.float() * scale) @ keys[head].float().T  # (H / G, w, T)
        scores[..., t - w :].masked_fill_(later, -torch.inf)
        found[head] = scores.softmax(-1).mean(0).cpu().numpy()
    return found


def rotated(queries: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(H, w, K) queries turned by rotary phases (w, R) in their first R dimensions."""
    r = cosines.shape[-1]
    turning, rest = queries[..., :r], queries[..., r:]
    left, right = turning[..., : r // 2], turning[..., r // 2 :]
    turned = turning * cosines + torch.cat([-right, left], -1) * sines
    return torch.cat([turned, rest], -1)
