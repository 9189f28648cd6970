"""Activations of hidden units, by the names that configs of Hugging Face models give them; caps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_new": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}


def hidden_units(inner: Tensor, activation: str, gated: bool) -> Tensor:
    """Hidden units (..., F) of an FFN, of what its input projection gives.

    Args:
        inner: (..., 2 F), the gate's half first, or (..., F) without a gate.
        activation: A key of `ACTIVATIONS`.
        gated: Whether there is a gate.
    """
    activate = ACTIVATIONS[activation]
    if not gated:
        return activate(inner)
    gate, up = inner.chunk(2, dim=-1)
    return activate(gate) * up


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits under a soft cap c, in place: c tanh(x / c) (Gemma 2, 2024)."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
