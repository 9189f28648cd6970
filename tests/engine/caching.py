"""What tests do to a sequence's cache by hand."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vesicle.engine import Engine
from vesicle.engine.cache import SequenceCache
from vesicle.plan import BLOCK


def drop_blocks(cache: SequenceCache, layer: int, blocks: Sequence[int] | np.ndarray) -> None:
    """Forget whole blocks of a layer, in all KV heads."""
    held = cache.held(layer)
    complete = len(held[0]) // BLOCK
    stays = np.ones(complete * BLOCK, bool)
    stays.reshape(complete, BLOCK)[np.asarray(blocks, int)] = False
    cache.compact(layer, [head[: complete * BLOCK][stays] for head in held])


def heads_of(engine: Engine) -> int:
    """KV heads of all layers, each of which has blocks of its own."""
    return engine.shape.n_layers * engine.shape.n_kv_heads


def gather(cache: SequenceCache, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values (G, n, K) of all positions that a layer holds, as many in each KV head."""
    n = len(cache.held(layer)[0])
    heads = slice(0, cache.n_heads)
    keys, values = cache.read(layer, heads, np.arange(-(-n // BLOCK)), dtype)
    return keys[:, :n], values[:, :n]
