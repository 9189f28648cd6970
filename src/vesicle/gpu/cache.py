"""Pages of keys and values on the GPU, shared by all sequences.

A page holds one block of 16 positions in every layer, and its summaries. Page 0 belongs to nobody:
rows without a sequence write there.
"""

from __future__ import annotations

import torch

from vesicle.errors import VesicleError
from vesicle.plan import BLOCK
from vesicle.shapes import ModelShape


class PagePool:
    """Keys and values (L, pages, G, 16, K) and summaries (L, pages, G, 2, K)."""

    def __init__(
        self, shape: ModelShape, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve room for `max_tokens` positions, and page 0."""
        self.n_pages = -(-max_tokens // BLOCK) + 1
        size = (shape.n_layers, self.n_pages, shape.n_kv_heads)
        self.keys = torch.zeros(*size, BLOCK, shape.head_size, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.summaries = torch.zeros(*size, 2, shape.head_size, dtype=dtype, device=device)
        self._free = list(range(self.n_pages - 1, 0, -1))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def grow(self, pages: list[int], n_positions: int) -> None:
        """Give a sequence's list of pages room for `n_positions` positions.

        Raises:
            VesicleError: If too few pages are free; nothing is taken then.
        """
        wanted = -(-n_positions // BLOCK) - len(pages)
        if wanted > len(self._free):
            raise VesicleError(
                f"the cache has {len(self._free) * BLOCK} positions left of "
                f"{(self.n_pages - 1) * BLOCK}; {wanted * BLOCK} more are needed "
                "(raise max_tokens, or close other sequences)"
            )
        pages.extend(self._free.pop() for _ in range(wanted))

    def release(self, pages: list[int]) -> None:
        """Take a sequence's pages back."""
        self._free.extend(pages)
        pages.clear()
