"""Policy gradients for levels: a group of perturbed releases, judged against each other.

Of a batch's texts one in `GROUP` is taken, and stands in it `GROUP` times, for equal tokens. With z
the log odds of a level, as the predictor has them, z + s e is released instead, e ~ N(0, 1) for
each token, layer and transmitter; the reward of a copy is the negative loss of its text and of its
budget, and

    loss = -mean over copies of A log p(z + s e),   A = (reward - mean) / deviation in its group

(group-relative: Shao et al. 2024; for several axes of a model, Akhauri and Abdelfattah 2026). No
gradient passes through what levels decide.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from vesicle.predictors import Predictor, State

GROUP = 4
_DEVIATION = 0.5


class Perturbed:
    """A predictor whose levels are perturbed inside a `with` statement."""

    def __init__(self, predictor: Predictor, seed: int, step: int) -> None:
        """Perturbations are a function of seed and step."""
        self._predictor = predictor
        self._generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        self._log_p: Tensor | None = None
        self._n = 0

    def grouped(self, x: Tensor) -> Tensor:
        """As many of the texts (B, T) as fit into a batch of that size, `GROUP` times each."""
        return x[: max(1, len(x) // GROUP)].repeat_interleave(GROUP, 0)

    def __enter__(self) -> Self:
        """Perturb."""
        release = self._predictor.release

        def perturbed(
            layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
        ) -> Tensor:
            level = release(layer, hidden, positions, dial, state).clamp(1e-4, 1 - 1e-4)
            z = level.logit()
            drawn = torch.randn(z.shape, generator=self._generator)
            chosen = (z + _DEVIATION * drawn).detach()
            log_p = -((chosen - z) / _DEVIATION).square().flatten(1).sum(1) / 2
            self._log_p = log_p if self._log_p is None else self._log_p + log_p
            self._n += z[0].numel()
            return torch.sigmoid(chosen)

        self._predictor.release = perturbed  # type: ignore[method-assign]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release as before."""
        del self._predictor.release

    def loss(self, reward: Tensor) -> Tensor:
        """Of the rewards (B,) of the copies of the last pass."""
        assert self._log_p is not None
        groups = reward.view(-1, GROUP)
        apart = groups - groups.mean(1, keepdim=True)
        advantage = (apart / (groups.std(1, keepdim=True) + 1e-6)).flatten()
        # By the number of draws, so that its size does not depend on length and layers.
        return -(advantage * self._log_p).mean() / self._n**0.5
