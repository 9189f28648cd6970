"""The sizes that costs and lengths depend on: of a decoder, and of what a method adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

FULL_BITS = 16
"""A Plan's bits for "the stored weights"."""
_NUMBER_FORMATS = (
    "weight_bytes",
    "kv_bytes",
    "kv_scale_bytes",
    "summary_bytes",
    "stored_bits",
    "head_bits",
)
MOST_POSITIONS = 2**31 - 1
"""Far beyond any model, and what a 32-bit count of positions holds."""


def context_window(settings: Mapping[str, Any]) -> int | None:
    """How many positions a model was made for, by its config.

    YaRN (Peng et al., 2023) stretches the positions that a model was trained on by its factor, and
    a config may give the longer window, or only those two numbers. The other scalings are used with
    the window that the config gives.

    Args:
        settings: Of `config.json`, in any spelling that transformers takes.

    Returns:
        The window, at most `MOST_POSITIONS`; None if the config gives none, or nonsense.
    """
    window = settings.get("max_position_embeddings")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        return None
    # In this order, as transformers does: the older spelling wins.
    rope = settings.get("rope_scaling") or settings.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) == "yarn":
        trained = settings.get("original_max_position_embeddings")
        trained = (
            rope.get("original_max_position_embeddings", window) if trained is None else trained
        )
        factor = rope.get("factor")
        if _is_positive(trained) and _is_positive(factor):
            window = max(window, int(min(trained * factor, MOST_POSITIONS)))
    return min(window, MOST_POSITIONS)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e100


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        n_layers: L.
        width: D, the residual stream.
        n_heads: H, query heads.
        n_kv_heads: G, key-value heads.
        head_size: K.
        ffn_width: F.
        gated: Whether the FFN has a gate projection beside the up projection.
        vocabulary: Rows of the LM head.
        windows: For each layer the newest entries that a query sees, its own included; 0 for all of
            them. Empty where all layers see all.
        weight_bytes: Bytes of one number outside packed stores: dense weights, stand-ins.
        kv_bytes: Bytes of one cached number.
        kv_scale_bytes: Bytes of the scale of one cached key or value of one KV head; 0 without.
        summary_bytes: Bytes of one number of a KV block's summary; None for `kv_bytes`.
        stored_bits: Bits of a code of packed projections, 4 or 8, or those of each layer at its
            four sites; None where they are dense.
        head_bits: The same for the LM head.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    ffn_width: int
    gated: bool
    vocabulary: int
    windows: tuple[int, ...] = ()
    weight_bytes: int = 4
    kv_bytes: int = 4
    kv_scale_bytes: int = 0
    summary_bytes: int | None = None
    stored_bits: int | tuple[tuple[int, ...], ...] | None = None
    head_bits: int | None = None

    @property
    def query_width(self) -> int:
        """HK, the width of the queries of all heads together."""
        return self.n_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """GK, the width of the keys, or values, of all KV heads together."""
        return self.n_kv_heads * self.head_size

    @property
    def site_widths(self) -> tuple[int, int, int, int]:
        """Input channels at the four sites, in the order of `plan.SITES`."""
        return (self.width, self.query_width, self.width, self.ffn_width)

    @property
    def site_outputs(self) -> tuple[int, int, int, int]:
        """Outputs fed by one input channel at each site."""
        return (
            self.query_width + 2 * self.kv_width,
            self.width,
            self.ffn_width * (2 if self.gated else 1),
            self.width,
        )

    @cached_property
    def layer_windows(self) -> NDArray[np.int64]:
        """(L,) what `windows` says, 0 where a layer sees all."""
        return np.array(self.windows or (0,) * self.n_layers, np.int64)

    def entries_held(self, n_tokens: int) -> int:
        """Entries of a KV head that all layers together hold after `n_tokens`, none forgotten."""
        windows = self.layer_windows
        return int(np.where(windows > 0, np.minimum(windows, n_tokens), n_tokens).sum())

    @property
    def position_bytes(self) -> int:
        """Bytes of one cached position in one layer: keys, values and their scales."""
        return 2 * (self.kv_width * self.kv_bytes + self.n_kv_heads * self.kv_scale_bytes)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry: a key and a value of one KV head, and their scales."""
        return self.position_bytes // self.n_kv_heads

    @property
    def queries_of_a_head(self) -> int:
        """Width of the queries that share a KV head."""
        return self.query_width // self.n_kv_heads

    @property
    def summary_vector_bytes(self) -> int:
        """Bytes of one vector of the summary of a KV head's block."""
        size = self.kv_bytes if self.summary_bytes is None else self.summary_bytes
        return self.head_size * size

    def charged_bits(self, bits: NDArray[np.integer]) -> NDArray[np.int64]:
        """Bits that reading one weight of a projection takes, group scales included.

        A packed weight is read in planes of four bits, and b bits of a dense one from a nested
        store; either way the fp16 scale and offset of a group of 32 are one more bit.

        Args:
            bits: (..., L, 4) as a Plan's, 16 for the stored weights.
        """
        if self.stored_bits is None:
            return np.where(bits == FULL_BITS, 8 * self.weight_bytes, bits + 1).astype(np.int64)
        stored = np.array(self.stored_bits)
        return np.where((bits > 4) & (stored > 4), 9, 5).astype(np.int64)

    @property
    def charged_head_bits(self) -> int:
        """Bits that reading one weight of the whole LM head takes."""
        return 8 * self.weight_bytes if self.head_bits is None else self.head_bits + 1

    @property
    def charged_preview_bits(self) -> int:
        """Bits that reading one weight of the LM head's preview takes: 8 of code where packed."""
        return 8 * self.weight_bytes if self.head_bits is None else 9

    def price_head(
        self,
        overhead: Overhead,
        runs: NDArray[np.integer],
        screened: NDArray[np.integer],
        exact: NDArray[np.integer],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(T,) FLOPs of the LM head, and bits read.

        Args:
            overhead: Of the method; its `head_rank`.
            runs: (T,) 1 where it runs at all, 0 elsewhere.
            screened: (T,) survivors of a screen by leading bits, 0 for none.
            exact: (T,) words that are exact after a preview, 0 for none; not beside a screen.
        """
        width, words, rank = self.width, self.vocabulary, overhead.head_rank
        weights = np.where(exact > 0, rank * (width + words) + exact * width, words * width * runs)
        whole = self.charged_head_bits * words * width * runs
        leading = width * (5 * words + 4 * screened)
        previewed = (
            32 * rank * width
            + self.charged_preview_bits * rank * words
            + self.charged_head_bits * exact * width
        )
        bits = np.where(exact > 0, previewed, np.where(screened > 0, leading, whole))
        return 2 * (weights + screened * width), bits

    def small_module_bytes(self, weights: NDArray[np.int64], coded: NDArray[np.int64]) -> Any:
        """Bytes that reading weights of small modules takes, of which some are coded.

        Codes have 4 bits, and their groups' scales one more.
        """
        return (weights - coded) * self.weight_bytes + 5 * coded // 8

    @property
    def screens_head(self) -> bool:
        """Whether the LM head can be screened by its leading four bits."""
        return self.head_bits == 8

    def fingerprint(self) -> dict[str, int | bool | list[int]]:
        """What a modulator must match to fit a model: everything but the number formats.

        Windows are named only where there are any, so that it is what it was before there were.
        """
        found = {name: v for name, v in asdict(self).items() if name not in _NUMBER_FORMATS}
        windows = list(found.pop("windows"))
        return found | ({"windows": windows} if windows else {})


Spread = tuple[tuple[int, ...], ...]
"""What multiple of a Plan's KV blocks each KV head of each layer reads; empty for alike."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The work that a method adds to the model.

    Attributes:
        modulator_flops: Of the predictor, per token and layer.
        modulator_bytes: Predictor weights read, per token and layer.
        small_ffn_weights: Weights that a token reads of a small FFN, in one layer.
        small_ffn_coded: Whether they are 4-bit codes beside packed weights.
        small_attention_weights: The same of what it takes in place of attention.
        head_rank: Directions by which the LM head may be previewed; 0 for no preview.
        selection_vectors: Summary vectors per block read to choose blocks (1 mean, 2 bounds).
        reads_attention: Whether a forgetter is told what attention entries received.
        observes: Of how many of the newest queries it is told what attention they pay.
        reads_entries: Whether it is told keys and values of new entries.
        interval: Tokens between the lengths at which it is.
        spread: L rows of G numbers: how unequally KV heads read blocks, see `plan.spread`.
    """

    modulator_flops: int = 0
    modulator_bytes: int = 0
    small_ffn_weights: int = 0
    small_ffn_coded: bool = False
    small_attention_weights: int = 0
    head_rank: int = 0
    selection_vectors: int = 1
    reads_attention: bool = False
    observes: int = 0
    reads_entries: bool = False
    interval: int = 0
    spread: Spread = ()
