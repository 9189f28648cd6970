"""Kinds of small module beside each other: the loss of a pretrained model where they take over.

Layers are ordered by what the small module of each costs alone, for all tokens, and put in one
after another in that order. So a kind has a curve of loss against executed cost, for constants:
nothing is chosen per token. Cost is that of the ledger for these windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.cost import price
from vesicle.duo.pretrained import StandsIn
from vesicle.families import find_family
from vesicle.plan import FFN_BIG, FFN_SMALL, Plan
from vesicle.shapes import ModelShape, Overhead
from vesicle.small_modules import SmallModule


@dataclass(frozen=True, kw_only=True)
class Point:
    """A kind of small module in some layers, for all tokens.

    Attributes:
        layers: Those whose FFNs are small.
        flops: Executed share of the dense model's FLOPs, over the windows.
        rises: (N,) nats a token above the dense model, of each window.
    """

    layers: tuple[int, ...]
    flops: float
    rises: tuple[float, ...]

    @property
    def rise(self) -> float:
        """Mean over windows."""
        return float(np.mean(self.rises))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One kind.

    Attributes:
        alone: (L,) nats a token above the dense model where one layer is small.
        points: With more and more layers small; the first has none.
    """

    alone: tuple[float, ...]
    points: tuple[Point, ...]

    def at(self, flops: float) -> float | None:
        """Nats above the dense model at a share, between two points; None beyond the last."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if after.flops <= flops <= before.flops:
                part = (before.flops - flops) / max(before.flops - after.flops, 1e-12)
                return before.rise + part * (after.rise - before.rise)
        return None


@contextmanager
def replaced(model: nn.Module, small: SmallModule, layers: Iterable[int]) -> Iterator[None]:
    """Have small modules do the FFNs of some layers inside the block."""
    family = find_family(model.config)
    blocks = list(family.layers(model))
    before = []
    try:
        for number in layers:
            own = family.modules(blocks[number]).ffn
            (name,) = (n for n, child in blocks[number].named_children() if child is own)
            before.append((blocks[number], name, own))
            setattr(blocks[number], name, StandsIn(small, number))
        yield
    finally:
        for block, name, own in before:
            setattr(block, name, own)


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> np.ndarray:
    """(N,) nats a token of each of windows (N, T)."""
    found = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        found.append(float(nn.functional.cross_entropy(logits.float(), window[1:])))
    return np.array(found)


def compare(
    model: nn.Module,
    windows: Tensor,
    shape: ModelShape,
    kinds: Mapping[str, SmallModule],
    counts: Sequence[int],
    *,
    show: Callable[[int, str], None] | None = None,
) -> dict[str, Compared]:
    """Losses of kinds of small module.

    Args:
        model: A Hugging Face causal LM.
        windows: (N, T) token ids that none of the modules has been fitted to.
        shape: Of the model.
        kinds: By name.
        counts: Numbers of layers that are small; 0 is added.
        show: Told how many measurements are done, and of which kind the last one is.
    """
    dense = losses(model, windows)
    found, done = {}, 0

    def rises(small: SmallModule, layers: Sequence[int], name: str) -> np.ndarray:
        nonlocal done
        with replaced(model, small, layers):
            rise = losses(model, windows) - dense
        done += 1
        if show is not None:
            show(done, name)
        return rise

    for name, small in kinds.items():
        alone = [float(rises(small, [layer], name).mean()) for layer in range(shape.n_layers)]
        order = np.argsort(alone, kind="stable")
        points = [Point(layers=(), flops=1.0, rises=(0.0,) * len(windows))]
        for count in sorted({c for c in counts if 0 < c <= shape.n_layers}):
            layers = tuple(sorted(int(n) for n in order[:count]))
            points.append(
                Point(
                    layers=layers,
                    flops=executed_share(shape, small, layers, windows.shape[1]),
                    rises=tuple(float(r) for r in rises(small, layers, name)),
                )
            )
        found[name] = Compared(alone=tuple(alone), points=tuple(points))
    return found


def executed_share(
    shape: ModelShape, small: SmallModule, layers: Sequence[int], n_tokens: int
) -> float:
    """Share of the dense FLOPs of a window with small FFNs in some layers."""
    rest = Plan.rest(shape, n_tokens)
    ffn = np.full((n_tokens, shape.n_layers), FFN_BIG)
    ffn[:, list(layers)] = FFN_SMALL
    cost = price(rest.with_fields(ffn=ffn), shape, Overhead(small_ffn_weights=small.weights))
    return cost.flops_total / price(rest, shape).flops_total
