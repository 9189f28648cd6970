"""The LM head with a preview: all words roughly, and exactly those that are best by that.

What `vesicle.preview` says, in the engine's stores: beside packed weights a preview has 8-bit codes
like the head's own, else numbers of the head's type. The native core computes the same; it takes
the structure that is made here.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor, nn

from vesicle.engine import core
from vesicle.engine.packed import HEAD_TILE, PackedHead
from vesicle.plan import IntArray
from vesicle.preview import HeadPreview

PREVIEW_BITS = 8
"""Of a packed preview, whatever the head has."""
_SLICE = 256 * HEAD_TILE


class PreviewedHead:
    """A preview, multiplied with the head's rows beforehand.

    Attributes:
        down: (k, D), fp32 beside packed weights.
        words: (V, k), or packed rows.
        structure: What the core is handed; it lives as long as this.
    """

    def __init__(
        self, preview: HeadPreview, head: Tensor | PackedHead, bias: Tensor | None
    ) -> None:
        """Multiply the head's rows, a slice at a time."""
        self._head = head
        self.words: PackedHead | Tensor
        if isinstance(head, PackedHead):
            self._bias, dtype = head.bias, torch.float32
            self.words = _packed(preview, head)
        else:
            self._bias, self.words = bias, preview.words(head)
            dtype = torch.float32 if head.dtype == torch.bfloat16 else head.dtype
        device = None if isinstance(self.words, PackedHead) else self.words.device
        self.down = preview.down.detach().to(device, dtype).contiguous()
        self.structure = core.Preview(down=self.down.data_ptr(), words=core.rows_of(self.words))

    @property
    def bytes_held(self) -> int:
        """Of the words and the directions."""
        held = (
            self.words.bytes_held
            if isinstance(self.words, PackedHead)
            else self.words.numel() * self.words.element_size()
        )
        return held + self.down.numel() * self.down.element_size()

    def scores(self, x: Tensor) -> Tensor:
        """(T, V) what a preview makes of the logits of x (T, D)."""
        low = nn.functional.linear(x.to(self.down.dtype), self.down)
        if isinstance(self.words, Tensor):
            scores = nn.functional.linear(low.to(self.words.dtype), self.words)
        elif core.available():
            scores = torch.empty(len(x), self.words.n_out)
            core.head_multiply(low.contiguous(), self.words, self.words.bits, scores)
        else:
            scores = self.words.multiply(low)
        return scores if self._bias is None else scores + self._bias

    def best(
        self, x: Tensor, count: int, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (D,): ids (m,) of the words that are best by preview, their logits, all scores (V,).

        Args:
            x: As it enters the head.
            count: M.
            noise: (V,) added to scores and logits; or None.
        """
        scores = self.scores(x[None])[0]
        if noise is not None:
            scores = scores + noise.to(scores.device)
        ids = scores.topk(min(count, len(scores))).indices.sort().values
        if isinstance(self._head, PackedHead):
            exact = self._head.rows(ids) @ self._head.rounded(x[None])[0]
        else:
            exact = self._head[ids] @ x
        exact = exact if self._bias is None else exact + self._bias[ids]
        return ids, exact if noise is None else exact + noise.to(exact.device)[ids], scores

    def logits(self, x: Tensor, counts: IntArray) -> Tensor:
        """(T, V) logits of x (T, D), `counts` (T,) of them exact, each 1 at least."""
        rows = []
        for state, count in zip(x, counts.tolist(), strict=True):
            ids, exact, scores = self.best(state, count)
            rows.append(scores.scatter(0, ids, exact.to(scores.dtype)))
        return torch.stack(rows)


class Previews:
    """The previews of one head, each made when it is first asked for."""

    def __init__(self, head: Tensor | PackedHead, bias: Tensor | None) -> None:
        """None yet."""
        self._head, self._bias = head, bias
        self._made = weakref.WeakKeyDictionary[HeadPreview, tuple[int, PreviewedHead]]()

    def of(self, preview: HeadPreview) -> PreviewedHead:
        """A preview's, made anew if it was written to."""
        version = preview.down._version + preview.up._version
        made = self._made.get(preview)
        if made is None or made[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                made = version, PreviewedHead(preview, self._head, self._bias)
            self._made[preview] = made
        return made[1]

    @property
    def bytes_held(self) -> int:
        """Of all that were made and are in use."""
        return sum(made.bytes_held for _, made in self._made.values())


def _packed(preview: HeadPreview, head: PackedHead) -> PackedHead:
    """The head's rows times a preview, packed a slice at a time: no more is held at once."""
    slices = [
        PackedHead.pack(
            preview.words(head.rows(torch.arange(start, min(start + _SLICE, head.n_out)))),
            PREVIEW_BITS,
        )
        for start in range(0, head.n_out, _SLICE)
    ]
    trailing = [part.trailing for part in slices if part.trailing is not None]
    return PackedHead(
        high=torch.cat([part.high for part in slices]),
        trailing=torch.cat(trailing),
        bits=PREVIEW_BITS,
        n_in=preview.rank,
        n_out=head.n_out,
        bias=None,
        error=max(part.error for part in slices),
    )


def address(made: PreviewedHead) -> int:
    """Of its structure."""
    return ctypes.addressof(made.structure)
