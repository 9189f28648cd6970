"""What tests do to a sequence's cache by hand."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vesicle.engine.cache import SequenceCache
from vesicle.plan import BLOCK


def drop_blocks(cache: SequenceCache, layer: int, blocks: Sequence[int] | np.ndarray) -> None:
    """Forget whole blocks of a layer, in all KV heads."""
    complete = cache.held(layer).shape[1] // BLOCK
    stays = np.ones(complete * BLOCK, bool)
    stays.reshape(complete, BLOCK)[np.asarray(blocks, int)] = False
    cache.compact(layer, cache.held(layer)[:, : complete * BLOCK][:, stays])


def gather(cache: SequenceCache, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values (G, n, K) of all positions that a layer holds."""
    n = cache.held(layer).shape[1]
    keys, values = cache.read(layer, np.arange(-(-n // BLOCK)), dtype)
    return keys[:, :n], values[:, :n]
