"""Small modules: what a token takes in place of a whole FFN or attention layer.

A kind of small module is what it computes, how many weights that reads, by which it is priced, and
the tensors by which the native core computes the same. The base model is never changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.activations import ACTIVATIONS, hidden_units
from vesicle.errors import VesicleError


class SmallModule(nn.Module, ABC):
    """Small modules of all L layers of a model of width D."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """Weights that a token reads, and multiplies by, in one layer; biases are not counted."""

    @property
    def coded(self) -> bool:
        """Whether packed engines read its weights as 4-bit codes."""
        return False

    @abstractmethod
    def apply_layer(self, layer: int, x: Tensor) -> Tensor:
        """The module of `layer` on x (..., D), the normed input of the one that it replaces."""

    @property
    @abstractmethod
    def size(self) -> dict[str, Any]:
        """What `of_size` needs to make another like it, as JSON has it, with its `kind`."""

    def shapes(self, n_layers: int, width: int) -> dict[str, tuple[int, ...]]:
        """What shape each of its parameters has that depends on the model; none by default."""
        return {}

    def check(self, n_layers: int, width: int) -> None:
        """Refuse to stand in for modules of a model of other sizes.

        Raises:
            VesicleError: With the parameter and what is allowed.
        """
        for name, shape in self.shapes(n_layers, width).items():
            found = getattr(self, name)
            if tuple(found.shape) != shape:
                raise VesicleError(
                    f"{name} of a {type(self).__name__} has shape {tuple(found.shape)}; "
                    f"allowed: {shape}, for {n_layers} layers of width {width}"
                )
            if not found.is_floating_point() or found.device.type == "meta":
                raise VesicleError(
                    f"{name} of a {type(self).__name__} is {found.dtype} on {found.device}; "
                    "allowed: floating-point numbers, on a device that holds them"
                )


class LowRankMaps(SmallModule):
    """Stand-ins that are linear: y = up (down x) + bias.

    Fitted to the modules that they replace by `calibration.standins`.

    Attributes:
        down: (L, r, D).
        up: (L, D, r).
        bias: (L, D).
    """

    def __init__(self, n_layers: int, width: int, rank: int) -> None:
        """All zero: maps that have not been fitted contribute nothing."""
        super().__init__()
        self.down = nn.Parameter(torch.zeros(n_layers, rank, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(n_layers, width, rank), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(n_layers, width), requires_grad=False)

    @property
    def rank(self) -> int:
        """R, the inner width of the maps, the same in every layer."""
        return int(self.down.shape[1])

    @property
    def weights(self) -> int:
        """2 D r."""
        return 2 * self.down.shape[2] * self.rank

    @property
    def size(self) -> dict[str, Any]:
        """Its kind and rank."""
        return {"kind": "low-rank", "rank": self.rank}

    def shapes(self, n_layers: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of both maps and the bias."""
        rank = self.rank
        return {
            "down": (n_layers, rank, width),
            "up": (n_layers, width, rank),
            "bias": (n_layers, width),
        }

    def apply_layer(self, layer: int, x: Tensor) -> Tensor:
        """The maps of `layer` on x (..., D)."""
        inner = nn.functional.linear(x, self.down[layer].to(x.dtype))
        return nn.functional.linear(inner, self.up[layer].to(x.dtype), self.bias[layer].to(x.dtype))


class SmallFfn(SmallModule):
    """FFNs like the model's own, of fewer hidden units (Duo-LLM, Alizadeh et al. 2024).

    Attributes:
        ffn_in: (L, D, 2 F') the gate's columns, then the others; (L, D, F') without a gate.
        ffn_out: (L, F', D).
        activation: Of the hidden units, by its name in `activations.ACTIVATIONS`.
        gated: Whether a gate multiplies them.
        bits: 4 where the weights lie on grids of 4-bit codes (`engine.small_codes`), so that packed
            engines read them as such; None for any weights, which are read in fp32.
    """

    def __init__(
        self,
        n_layers: int,
        width: int,
        units: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bits: int | None = None,
    ) -> None:
        """All zero: FFNs that have not been trained contribute nothing.

        Raises:
            ValueError: If there are no units, or the activation or the bits are unknown.
        """
        super().__init__()
        if not isinstance(units, int) or isinstance(units, bool) or units < 1:
            raise ValueError(f"a small FFN has {units!r} hidden units; allowed: 1 and above")
        if not isinstance(gated, bool):
            raise ValueError(f"gated is {gated!r}; allowed: true, false")
        if activation not in ACTIVATIONS:
            raise ValueError(_unknown(activation))
        if bits not in (None, 4):
            raise ValueError(f"bits of a small FFN are {bits!r}; allowed: 4, none")
        self.bits = bits
        self.activation, self.gated = activation, gated
        columns = 2 * units if gated else units
        self.ffn_in = nn.Parameter(torch.zeros(n_layers, width, columns), requires_grad=False)
        self.ffn_out = nn.Parameter(torch.zeros(n_layers, units, width), requires_grad=False)

    @property
    def coded(self) -> bool:
        """Whether `bits` is 4."""
        return self.bits is not None

    @property
    def units(self) -> int:
        """F', the hidden units of each layer."""
        return int(self.ffn_out.shape[1])

    @property
    def weights(self) -> int:
        """3 D F' with a gate, 2 D F' without."""
        return (3 if self.gated else 2) * self.ffn_out.shape[2] * self.units

    @property
    def size(self) -> dict[str, Any]:
        """Its kind, hidden units and form."""
        form = {"activation": self.activation, "gated": self.gated}
        coded = {} if self.bits is None else {"bits": self.bits}
        return {"kind": "ffn", "units": self.units, **form, **coded}

    def shapes(self, n_layers: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of both projections."""
        columns = 2 * self.units if self.gated else self.units
        return {
            "ffn_in": (n_layers, width, columns),
            "ffn_out": (n_layers, self.units, width),
        }

    def check(self, n_layers: int, width: int) -> None:
        """As `SmallModule.check`; and an activation that was set to something unknown."""
        super().check(n_layers, width)
        if self.activation not in ACTIVATIONS:
            raise VesicleError(_unknown(self.activation))

    def apply_layer(self, layer: int, x: Tensor) -> Tensor:
        """The FFN of `layer` on x (..., D)."""
        inner = x @ self.ffn_in[layer].to(x.dtype)
        return hidden_units(inner, self.activation, self.gated) @ self.ffn_out[layer].to(x.dtype)


def _unknown(activation: str) -> str:
    return f"activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}"


KINDS: dict[str, type[SmallModule]] = {"low-rank": LowRankMaps, "ffn": SmallFfn}


def of_size(size: Mapping[str, Any], n_layers: int, width: int) -> SmallModule:
    """A small module as `SmallModule.size` describes it, all zero.

    Raises:
        TypeError: If its kind has no such setting.
        ValueError: If its kind is unknown.
    """
    settings = dict(size)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind of small module is {kind!r}; allowed: {', '.join(KINDS)}")
    return KINDS[kind](n_layers, width, **settings)
