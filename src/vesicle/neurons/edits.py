"""What may be done to an activation, a level or a decision: set, shifted, scaled, transplanted.

An `Edit` is data: a name, which of its numbers, at which tokens, and what becomes of them. The same
edit of a level acts before the level decides anything, and one of a decision before it is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.neurons.names import LEVELS, PATTERN, split
from vesicle.plan.rows import SITES
from vesicle.transmitters import NAMES

Index = int | str | Sequence[int] | Sequence[str] | None
"""Which numbers of an activation: one, several, all (None); transmitters and sites go by name."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change, at one name.

    Attributes:
        name: Of what is changed, without wildcards.
        how: `set` to the value, `add` it, `scale` by it.
        value: A number; (W,) one for each of the numbers; (I,) one for each that `index` names; or
            (B, T, W) of another run, of which each token takes its own.
        index: Which numbers.
        tokens: Columns of the batch at which it acts, from 0; None for all.
    """

    name: str
    how: Literal["set", "add", "scale"]
    value: float | Tensor
    index: Index = None
    tokens: Sequence[int] | None = None

    def checked(self, width: int) -> Edit:
        """The edit with its numbers as numbers, if they are there.

        Args:
            width: W, how many numbers the activation has.

        Raises:
            VesicleError: Naming the number, the token or the shape, and what is allowed.
        """
        own = split(self.name)[1]
        if own == PATTERN:
            raise VesicleError(f"{self.name} can be read and not edited")
        if self.tokens is not None and (bad := [t for t in self.tokens if t < 0]):
            raise VesicleError(f"token {bad[0]} of {self.name} is out of range; allowed: 0 and up")
        found = None if self.index is None else _numbers(self.index, self.name, own, width)
        if isinstance(self.value, Tensor):
            wanted = {(width,), (width if found is None else len(found),)}
            if self.value.dim() not in (1, 3) or (
                self.value.dim() == 1 and tuple(self.value.shape) not in wanted
            ):
                raise VesicleError(
                    f"the value for {self.name} is of shape {tuple(self.value.shape)}; allowed: a "
                    f"number, ({width},), one a chosen number, or (texts, tokens, {width})"
                )
            if self.value.dim() == 3 and self.value.shape[-1] != width:
                raise VesicleError(
                    f"the value for {self.name} has {self.value.shape[-1]} numbers a token; "
                    f"allowed: {width}"
                )
        return Edit(name=self.name, how=self.how, value=self.value, index=found, tokens=self.tokens)

    def apply(self, x: Tensor, start: int) -> Tensor:
        """The activation (B, T, W), changed; a checked edit's.

        Args:
            x: As computed.
            start: The column of its first token.

        Raises:
            VesicleError: A value of another run holds no such token.
        """
        t, width = x.shape[1:]
        where = torch.ones(1, t, 1, dtype=torch.bool, device=x.device)
        if self.tokens is not None:
            columns = torch.arange(start, start + t, device=x.device)
            where = torch.isin(columns, torch.tensor(list(self.tokens), device=x.device))[
                None, :, None
            ]
            if not bool(where.any()):
                return x
        chosen = torch.ones(width, dtype=torch.bool, device=x.device)
        if self.index is not None:
            chosen = torch.zeros_like(chosen)
            chosen[list(self.index)] = True  # type: ignore[arg-type]  # numbers, once checked
        value = self._value(x, start, chosen)
        changed = {"set": value, "add": x + value, "scale": x * value}[self.how]
        return torch.where(where & chosen, changed.to(x.dtype), x)

    def _value(self, x: Tensor, start: int, chosen: Tensor) -> Tensor:
        """What the value says, to be broadcast to x."""
        if not isinstance(self.value, Tensor):
            return x.new_full((), float(self.value))
        value = self.value.to(x.device, x.dtype)
        if value.dim() == 1:
            if len(value) == x.shape[-1]:
                return value
            spread = value.new_zeros(x.shape[-1])
            spread[list(self.index)] = value  # type: ignore[arg-type]  # numbers, once checked
            return spread
        there, stop = value.shape[1], start + x.shape[1]
        if self.tokens is None and there < stop:
            raise VesicleError(
                f"the value for {self.name} has {there} tokens, and the text {stop} or more; name "
                "the tokens that are to be transplanted"
            )
        padded = value.new_zeros(len(value), max(0, stop - there), value.shape[-1])
        return torch.cat([value, padded], 1)[:, start:stop]


def clamp(
    name: str, index: Index, value: float | Tensor, tokens: Sequence[int] | None = None
) -> Edit:
    """Hold numbers at a value."""
    return Edit(name=name, how="set", value=value, index=index, tokens=tokens)


def lesion(name: str, index: Index = None, tokens: Sequence[int] | None = None) -> Edit:
    """Silence numbers: 0 for activations, 1 (rest) for levels."""
    rest = 1.0 if split(name)[1] == LEVELS else 0.0
    return Edit(name=name, how="set", value=rest, index=index, tokens=tokens)


def transplant(
    name: str, value: Tensor, index: Index = None, tokens: Sequence[int] | None = None
) -> Edit:
    """Take numbers (B, T, W) from another run, each token its own."""
    return Edit(name=name, how="set", value=value, index=index, tokens=tokens)


def _numbers(index: Index, name: str, own: str, width: int) -> tuple[int, ...]:
    assert index is not None
    words = NAMES if own == LEVELS else SITES
    found = []
    for one in [index] if isinstance(index, int | str) else index:
        if isinstance(one, str):
            if width != len(words) or one not in words:
                allowed = ", ".join(words) if width == len(words) else f"0 to {width - 1}"
                raise VesicleError(f"{name} has no {one!r}; allowed: {allowed}")
            found.append(words.index(one))
        elif 0 <= one < width:
            found.append(int(one))
        else:
            raise VesicleError(f"{name} has no number {one}; allowed: 0 to {width - 1}")
    return tuple(found)
