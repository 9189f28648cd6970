"""Time and memory of tiles against length and model size, executed in PyTorch on this machine.

Attention alone has the shape of the default model's: 9 query heads, 3 KV heads of 64. Tiles are
those of `TileCache`, which holds no positions behind its window.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vesicle.bench.machine import hardware
from vesicle.scratch import DecoderSize, new_decoder
from vesicle.scratch.patterns import Dense, Tiles, TilesState, patterned
from vesicle.tiling.cache import TileCache

_HEADS, _GROUPS, _SIZE = 9, 3, 64
_SCALE = _SIZE**-0.5
_WINDOW = 512
_STEPS = 20
TILED = {"tiles of 4": 0.6, "tiles of 16": 0.4, "tiles of 64": 0.1}
"""Levels at which all positions lie in tiles of one size."""


def time_attention(out: Path, *, lengths: list[int]) -> dict[str, Any]:
    """Seconds that attention takes over texts of these lengths, and a step after them; a job."""
    rows = []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        shapes = ((_HEADS, length), (_GROUPS, length), (_GROUPS, length))
        query, key, value = (torch.randn(*s, _SIZE, generator=generator) for s in shapes)
        rows.append({"length": length, "what": "dense", **_dense(query, key, value)})
        rows.append({"length": length, "what": f"newest {_WINDOW}", **_window(query, key, value)})
        for name, level in TILED.items():
            rows.append({"length": length, "what": name, **_tiles(query, key, value, level)})
    return {"rows": rows, "machine": _told(), "threads": torch.get_num_threads()}


def time_decoders(out: Path, *, sizes: list[list[int]], length: int) -> dict[str, Any]:
    """Tokens a second of whole decoders with random weights, dense and in tiles of 16; a job."""
    rows = []
    for width, n_layers in sizes:
        for what in ("dense", "tiles of 16"):
            rows.append(
                {
                    "width": width,
                    "n_layers": n_layers,
                    "what": what,
                    **_decoder(width, n_layers, length, what),
                }
            )
    return {"rows": rows, "length": length, "machine": _told(), "threads": torch.get_num_threads()}


def _told() -> str:
    return str(hardware()["cpu"])


def _once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _dense(query: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    parts = query[None], key[None], value[None]

    def read() -> None:
        scaled_dot_product_attention(*parts, is_causal=True, scale=_SCALE, enable_gqa=True)

    def step() -> None:
        last = query[None, :, -1:]
        scaled_dot_product_attention(last, *parts[1:], scale=_SCALE, enable_gqa=True)

    return {
        "prefill_s": _once(read),
        "step_ms": 1000 * statistics.median(_once(step) for _ in range(_STEPS)),
        "cache_bytes": float(key.nbytes + value.nbytes),
    }


def _window(query: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    block = 64

    def read() -> None:
        for start in range(0, query.shape[1], block):
            stop = min(query.shape[1], start + block)
            first = max(0, stop - block - _WINDOW + 1)
            places = torch.arange(first, stop)
            asks = torch.arange(start, stop)[:, None]
            mask = (places <= asks) & (places > asks - _WINDOW)
            scaled_dot_product_attention(
                query[None, :, start:stop],
                key[None, :, first:stop],
                value[None, :, first:stop],
                attn_mask=mask,
                scale=_SCALE,
                enable_gqa=True,
            )

    def step() -> None:
        scaled_dot_product_attention(
            query[None, :, -1:],
            key[None, :, -_WINDOW:],
            value[None, :, -_WINDOW:],
            scale=_SCALE,
            enable_gqa=True,
        )

    held = min(_WINDOW, key.shape[1]) / key.shape[1]
    return {
        "prefill_s": _once(read),
        "step_ms": 1000 * statistics.median(_once(step) for _ in range(_STEPS)),
        "cache_bytes": (key.nbytes + value.nbytes) * held,
    }


def _tiles(query: Tensor, key: Tensor, value: Tensor, level: float) -> dict[str, float]:
    cache = TileCache(_GROUPS, _SIZE)
    levels = torch.full((key.shape[1],), level)
    prefill_s = _once(lambda: cache.extend(query, key, value, levels, _SCALE))
    held = cache.nbytes
    last = slice(key.shape[1] - 1, None)

    def step() -> None:
        cache.extend(query[:, last], key[:, last], value[:, last], levels[last], _SCALE)

    step_ms = 1000 * statistics.median(_once(step) for _ in range(_STEPS))
    return {"prefill_s": prefill_s, "step_ms": step_ms, "cache_bytes": float(held)}


@torch.no_grad()
def _decoder(width: int, n_layers: int, length: int, what: str) -> dict[str, float]:
    n_heads = max(2, width // 64 // 2 * 2)
    size = DecoderSize(
        vocabulary=1024,
        width=width // n_heads * n_heads,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads // 2,
        ffn=3 * width,
        context=length + _STEPS,
    )
    model = new_decoder(size, 0).eval()
    state = TilesState(budget=0.5)
    patterns = patterned(
        model,
        lambda layer: (
            Dense()
            if what == "dense"
            else Tiles(layer, state, size.width, size.n_kv_heads, importance="fixed", pools=False)
        ),
    )
    ids = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    for pattern in patterns:
        pattern.begin()
    places = torch.arange(length)[None]
    prefill_s = _once(lambda: model(ids, position_ids=places, logits_to_keep=1))
    held = sum(pattern.cache_bytes for pattern in patterns)
    steps = [
        _once(lambda i=i: model(ids[:, :1], position_ids=torch.tensor([[length + i]])))  # type: ignore[misc]
        for i in range(_STEPS)
    ]
    return {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "prefill_tokens_per_s": length / prefill_s,
        "decode_tokens_per_s": 1 / statistics.median(steps),
        "cache_bytes": float(held),
    }
