"""Runner: what is timed, the same for every contender.

All read B prompts of equal length, then take decode steps: each feeds one token to every sequence
and picks the likeliest next one. What is fed is given from outside, the text as it goes on, so that
all contenders do the same work whatever they would have said.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

CHUNK = 512
"""Tokens of a prefill pass, where a runner cuts prompts up."""


class Runner(ABC):
    """One contender, in its own process."""

    @abstractmethod
    def load(self) -> dict[str, Any]:
        """Read the weights; returns facts about them for the report."""

    @abstractmethod
    def begin(self, batch: int, length: int) -> None:
        """Make room, untimed, for `batch` new sequences of up to `length` tokens."""

    @abstractmethod
    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Read the prompts (B rows of equal length); the likeliest next token of each."""

    @abstractmethod
    def step(self, tokens: list[int]) -> list[int]:
        """Feed one token to each of the B sequences; the likeliest next token of each."""

    @abstractmethod
    def work(self, steps: int) -> dict[str, Any]:
        """What the last `steps` steps cost, asked once they are over.

        Returns:
            `step_bytes`: bytes read by a step on average, all sequences together, weights counted
            once; for this engine also `executed_share` of the dense FLOPs.
        """
