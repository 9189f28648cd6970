"""Chooses the next token from logits: greedy, temperature, nucleus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.errors import VesicleError

_SHORTEST = np.float32(1e-37)
"""Of the waiting times whose logarithms are taken: a normal number above 0."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy, which is also the limit for ever smaller ones; up to 100.
        top_p: Draw from the smallest set of tokens with at least this much probability (Holtzman et
            al. 2020).
        seed: Of the generator.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.temperature <= 100:
            raise VesicleError(f"temperature is {self.temperature}; allowed: 0 to 100")
        if not 0 < self.top_p <= 1:
            raise VesicleError(f"top-p is {self.top_p}; allowed: above 0, up to 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def generator(self) -> np.random.Generator:
        """A new random generator, seeded with `seed`: one for each text."""
        return np.random.Generator(np.random.SFC64(self.seed))

    def draw(self, logits: Tensor, generator: np.random.Generator) -> int:
        """The next token from logits (V,).

        Raises:
            VesicleError: A logit is not a number, or all are minus infinity.
        """
        wide = _doubles(logits)
        likeliest = int(wide.argmax())
        most = wide[likeliest]  # argmax takes NaN for the largest
        if np.isnan(most) or most == -np.inf:
            raise VesicleError(
                f"the model's logits are no numbers to choose a token by: the largest is {most:g}"
            )
        if self.greedy:
            return likeliest
        sums = self.chances(logits).numpy().cumsum()
        # Below the sum of all, so that what is found has a chance of its own.
        place = min(generator.random() * sums[-1], np.nextafter(sums[-1], 0))
        return int(sums.searchsorted(place, side="right"))

    def noise(self, n_words: int, generator: np.random.Generator) -> Tensor | None:
        """(V,) fp32 by which logits are moved so that the largest is a draw; None if greedy.

        Gumbel noise times the temperature: the largest of logits / temperature + noise is a draw
        from their softmax (Gumbel 1954; Maddison, Tarlow and Minka 2014). So no more words have to
        be known exactly than may come out largest.

        Args:
            n_words: V.
            generator: As `generator` gives it.
        """
        if self.greedy:
            return None
        noise = generator.standard_exponential(n_words, dtype=np.float32)
        np.log(np.maximum(noise, _SHORTEST, out=noise), out=noise)
        noise *= -self.temperature
        return torch.from_numpy(noise)

    def chances(self, logits: Tensor) -> Tensor:
        """(V,) fp64, what `draw` chooses by: at least the likeliest token has a chance.

        Args:
            logits: (V,) without NaN, and not all minus infinity.
        """
        wide = _doubles(logits)
        # With the largest at 0 no temperature is too small to divide by: what is less likely goes
        # to minus infinity, which is the limit. The largest is not subtracted from itself, because
        # it may be infinite.
        most = wide.max()
        with np.errstate(over="ignore", invalid="ignore"):
            below = np.where(wide == most, 0.0, wide - most) / self.temperature
        chances = np.exp(below)
        chances /= chances.sum()
        if self.top_p < 1:
            # Words below this have less than 1 - top_p together: none of them is in the nucleus.
            (likely,) = np.nonzero(chances >= (1 - self.top_p) / len(chances))
            likely = likely[np.argsort(-wide[likely], kind="stable")]
            ordered = chances[likely]
            kept = ordered.cumsum() - ordered < self.top_p
            kept[0] = True
            chances = np.zeros_like(chances)
            chances[likely[kept]] = ordered[kept]
        return torch.from_numpy(chances)


def _doubles(logits: Tensor) -> NDArray[np.float64]:
    """Logits (V,) in fp64, on this thread alone.

    Threads of torch's would wait for those of the native core, which have just run a pass and look
    out for the next one: a token took twice as long.
    """
    if logits.dtype == torch.bfloat16:  # which numpy has not
        logits = logits.float()
    return logits.numpy(force=True).astype(np.float64)


def not_finite(position: int) -> VesicleError:
    """What is wrong where logits are NaN or infinite.

    Args:
        position: Of the token that they were computed for.
    """
    return VesicleError(
        f"logits are not finite at position {position}: the weights or the cache are damaged"
    )


def likeliest_of(logits: Tensor, position: int) -> int | VesicleError:
    """The place of the largest of logits (V,), or an error if one of them is not finite."""
    return int(logits.argmax()) if bool(logits.isfinite().all()) else not_finite(position)
