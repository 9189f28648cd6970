"""Presses with kvpress' interface, and a small stand-in for kvpress, for where it is missing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from vesicle.families import find_family

Select = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Layer, keys and values (1, G, T, K) to those that are left."""


@dataclass
class HookPress:
    """Attention hooks that shrink the cache, as kvpress' BasePress has them."""

    select: Select
    needs_attention: bool = False

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        family = find_family(model.config)
        modules = [family.modules(layer).attention for layer in family.layers(model)]
        hooks = []
        for layer, module in enumerate(modules):
            module.rotary_emb = nn.Identity()  # kvpress leaves this on the module too

            def hook(module: Any, _: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
                if self.needs_attention:
                    assert output[1] is not None, "no attention probabilities"
                entry = next(v for v in kwargs.values() if isinstance(v, Cache))
                entry = entry.layers[layer]
                entry.keys, entry.values = self.select(layer, entry.keys, entry.values)

            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for one in hooks:
                one.remove()


@dataclass
class MaskPress(HookPress):
    """Leaves the cache whole and marks entries (batch, head, place), as AdaKV does."""

    marks: tuple[Tensor, Tensor, Tensor] | None = None

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        family = find_family(model.config)
        with super().__call__(model):
            yield
        for layer in family.layers(model):
            family.modules(layer).attention.masked_key_indices = self.marks


class ObservedAttentionPress(HookPress):
    """A name by which the bridge knows that attention probabilities are needed."""


class DecodingPress(HookPress):
    """A name by which the bridge knows what drops entries later."""


@dataclass
class Wrapper:
    """Hands everything to another press, which lies in a field of its own."""

    press: HookPress

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        return self.press(model)


def at(positions: list[list[list[int]]]) -> Select:
    """Keeps `positions[layer][head]`, in that order."""

    def select(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.tensor(positions[layer])[None, :, :, None]
        return (
            keys.gather(2, index.expand(*index.shape[:3], keys.shape[-1])),
            values.gather(2, index.expand(*index.shape[:3], values.shape[-1])),
        )

    return select


def small_kvpress() -> ModuleType:
    """A module with the classes that building presses by name looks at."""
    module = ModuleType("kvpress")

    @dataclass
    class BasePress:
        pass

    @dataclass
    class ScorerPress(BasePress):
        compression_ratio: float = 0.0

    @dataclass
    class SnapKVPress(ScorerPress):
        window_size: int = 64

        def __post_init__(self) -> None:
            assert self.window_size > 0, "window_size must be positive"

    @dataclass
    class KnormPress(ScorerPress):
        pass

    @dataclass
    class AdaKVPress(BasePress):
        press: ScorerPress
        alpha_safeguard: float = 0.2

        @property
        def compression_ratio(self) -> float:
            return self.press.compression_ratio

        @compression_ratio.setter
        def compression_ratio(self, value: float) -> None:
            self.press.compression_ratio = value

    @dataclass
    class DMSPress(AdaKVPress):
        @property
        def compression_ratio(self) -> float:
            return 0.0

        @compression_ratio.setter
        def compression_ratio(self, value: float) -> None:
            raise AttributeError("read-only")

    @dataclass
    class DecodingPress(BasePress):
        target_size: int = 8

    for kind in (BasePress, ScorerPress, SnapKVPress, KnormPress, AdaKVPress, DMSPress):
        setattr(module, kind.__name__, kind)
    module.DecodingPress = DecodingPress  # type: ignore[attr-defined]
    module.NotAPress = ModuleType  # type: ignore[attr-defined]
    return module
