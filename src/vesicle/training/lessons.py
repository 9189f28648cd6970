"""What a modulator is trained on: windows of text, or tasks' prompts with their answers.

A lesson is a window of tokens of which some are *taught*: those that a model would generate, with
all before them as a prompt. Of running text all are. Tasks are mixed by a temperature (as in Raffel
et al. 2020): one of n lessons is drawn in proportion to n^(1 / temperature), so that at 1 all
lessons are as frequent, and the higher it is, the more alike tasks are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import DataError

_STRIDE = 2**0.5 - 1
"""Between the draws of tasks; not that of budgets, which would tie the two together."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Windows, and what of them is taught.

    Attributes:
        tokens: (N, T) ids; what fills a window up is at its end.
        taught: (N, T) booleans.
        task: (N,) which task each is of, by its place in `names`.
        names: Of the tasks.
    """

    tokens: Tensor
    taught: Tensor
    task: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that shapes agree and that every lesson teaches something.

        Raises:
            DataError: They do not.
        """
        n = len(self.tokens)
        if self.taught.shape != self.tokens.shape or self.task.shape != (n,):
            raise DataError(
                f"lessons have tokens {tuple(self.tokens.shape)}, taught "
                f"{tuple(self.taught.shape)} and task {tuple(self.task.shape)}"
            )
        empty = ~self.taught[:, 1:].any(1)
        if bool(empty.any()):
            raise DataError(f"lesson {int(empty.int().argmax())} teaches no token after its first")

    @classmethod
    def of_text(cls, windows: Tensor) -> Lessons:
        """Windows (N, T) of running text, in which every token is taught."""
        return cls(
            tokens=windows,
            taught=torch.ones_like(windows, dtype=torch.bool),
            task=torch.zeros(len(windows), dtype=torch.long),
            names=("text",),
        )

    @classmethod
    def of_answers(
        cls, tasks: Mapping[str, Sequence[tuple[list[int], list[int]]]], length: int, filler: int
    ) -> Lessons:
        """Prompts and answers of tasks, one a window.

        Args:
            tasks: By name, prompts and answers as token ids.
            length: T; pairs that are longer are left out.
            filler: Token id that fills windows up.

        Raises:
            DataError: A task has no pair that fits.
        """
        rows, marks, task = [], [], []
        for number, (name, pairs) in enumerate(tasks.items()):
            fitting = [(p, a) for p, a in pairs if p and a and len(p) + len(a) <= length]
            if not fitting:
                raise DataError(f"{name} has no prompt and answer within {length} tokens")
            for prompt, answer in fitting:
                left = length - len(prompt) - len(answer)
                rows.append([*prompt, *answer, *[filler] * left])
                marks.append([False] * len(prompt) + [True] * len(answer) + [False] * left)
                task.append(number)
        return cls(
            tokens=torch.tensor(rows, dtype=torch.long),
            taught=torch.tensor(marks, dtype=torch.bool),
            task=torch.tensor(task, dtype=torch.long),
            names=tuple(tasks),
        )

    def __len__(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """T."""
        return int(self.tokens.shape[1])

    @property
    def is_text(self) -> bool:
        """Whether every token is taught."""
        return bool(self.taught.all())

    def part(self, chosen: Tensor | slice) -> Lessons:
        """Some of them."""
        return Lessons(
            tokens=self.tokens[chosen],
            taught=self.taught[chosen],
            task=self.task[chosen],
            names=self.names,
        )

    def held_out(self, n: int) -> tuple[Lessons, Lessons]:
        """All but the last n of each task in turn, and these.

        Raises:
            DataError: There are not more than n.
        """
        count = -(-n // len(self.names))
        last = [self._last(k, count) for k in range(len(self.names))]
        # One of each task after the other, so that however many they are, they are of all tasks.
        ordered = torch.stack(last, dim=1).flatten()[:n]
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[ordered] = False
        return self.part(kept), self.part(ordered)

    def _last(self, task: int, count: int) -> Tensor:
        """Places of the last lessons of a task."""
        places = (self.task == task).nonzero()[:, 0]
        if len(places) <= count:
            raise DataError(
                f"{self.names[task]} has {len(places)} windows of {self.length} tokens; {count} "
                "are held out, and training needs more"
            )
        return places[len(places) - count :]

    def packed(self) -> Tensor:
        """(M, T) windows of their tokens without what fills up, tasks mixed evenly.

        Raises:
            DataError: There are too few tokens for one window.
        """
        if self.is_text:
            return self.tokens
        place = torch.zeros(len(self))
        for k in range(len(self.names)):
            own = self.task == k
            place[own] = (torch.arange(int(own.sum())) + 0.5) / own.sum()
        joined = torch.cat([self.tokens[i][: self._end(i)] for i in place.argsort().tolist()])
        if len(joined) < self.length:
            raise DataError(f"lessons have {len(joined)} tokens; a window needs {self.length}")
        return joined[: len(joined) // self.length * self.length].view(-1, self.length)

    def _end(self, i: int) -> int:
        """Tokens of a lesson up to the last one that is taught."""
        return int(self.taught[i].nonzero()[-1, 0]) + 1

    @property
    def fingerprint(self) -> str:
        """A digest of tokens, and of what is taught unless that is all."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.tokens, *(() if self.is_text else (self.taught, self.task))):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Order:
    """In which order lessons are taken: a function of the seed and of how many were before."""

    def __init__(self, lessons: Lessons, temperature: float, seed: int) -> None:
        """Mix tasks at a temperature."""
        self._seed = seed
        self._of_task = [
            (lessons.task == k).nonzero()[:, 0].numpy() for k in range(len(lessons.names))
        ]
        sizes = np.array([len(own) for own in self._of_task], dtype=float)
        weights = (sizes / sizes.max()) ** (1 / temperature)
        self._edges = np.cumsum(weights / weights.sum())[:-1]
        self._tasks = np.zeros(0, dtype=int)  # of the lessons from 0 on
        self._before = np.zeros(0, dtype=int)  # how many of its task were before each
        self._drawn: dict[tuple[int, int], np.ndarray] = {}

    def at(self, k: int) -> int:
        """The k-th lesson, from 0 on: each task goes through all of its own, then again."""
        task, before = self._place(k)
        own = self._of_task[task]
        epoch, place = divmod(before, len(own))
        key = (task, epoch)
        if key not in self._drawn:
            self._drawn = {other: order for other, order in self._drawn.items() if other[0] != task}
            # A single task is shuffled as text has always been.
            seed = (self._seed, epoch) if len(self._of_task) == 1 else (self._seed, epoch, task)
            self._drawn[key] = np.random.default_rng(seed).permutation(len(own))
        return int(own[self._drawn[key][place]])

    def _place(self, k: int) -> tuple[int, int]:
        """Which task the k-th lesson is of, and how many of that task were before it."""
        if not len(self._edges):
            return 0, k
        if k >= len(self._tasks):
            places = (np.arange(2 * k + 64) * _STRIDE + 0.5) % 1
            self._tasks = np.searchsorted(self._edges, places, side="right")
            self._before = np.zeros_like(self._tasks)
            for task in range(len(self._of_task)):
                own = self._tasks == task
                self._before[own] = np.arange(own.sum())
        return int(self._tasks[k]), int(self._before[k])
