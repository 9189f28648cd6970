"""Adaptive Tensor Tiling: attention over tiles of 1, 4, 16 and 64 past positions."""

from vesicle.tiling.attention import Tiled, tiled_attention
from vesicle.tiling.partition import LARGEST, SIZES, split_to_budget, tile_sizes

__all__ = ["LARGEST", "SIZES", "Tiled", "split_to_budget", "tile_sizes", "tiled_attention"]
