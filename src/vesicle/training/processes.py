"""Several processes that train together, as `torchrun` starts them.

Each takes its share of the micro-steps of a step; gradients and sums are added up over all of them,
so that parameters stay the same everywhere and the run is that of a single process, up to the order
of additions. One process needs nothing of this and imports nothing for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vesicle.errors import VesicleError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: Which one this is; 0 writes.
        count: How many there are.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Meet the others, if there are any.

        Args:
            device: `cpu` or `cuda`.
        """
        self.rank, self.count = 0, 1
        self._accelerator: Any = None
        if launched() == 1:
            return
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        # The others wait while the first one measures the model.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
        self._accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
        self.rank = int(self._accelerator.process_index)
        self.count = int(self._accelerator.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @contextmanager
    def first_first(self) -> Iterator[None]:
        """The first process goes through the block before the others do."""
        own = nullcontext() if self._accelerator is None else self._accelerator.main_process_first()
        with own:
            yield

    def shared(self, n: int) -> range:
        """Which of n pieces of work are this process's."""
        return range(self.rank, n, self.count)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum of all processes' gradients into each parameter."""
        if self._accelerator is None:
            return
        import torch

        for parameter in parameters:
            if parameter.requires_grad:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(own, reduction="sum")

    def add(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, of one shape."""
        if self._accelerator is None:
            return values
        total: Tensor = self._accelerator.reduce(values, reduction="sum")
        return total


def launched() -> int:
    """How many processes whoever launched this one says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, before they have met."""
    return int(os.environ.get("RANK", "0"))


def check_shares(accumulation: int) -> None:
    """Refuse micro-steps that the processes cannot share evenly.

    Raises:
        VesicleError: Naming both numbers.
    """
    if accumulation % launched():
        raise VesicleError(
            f"accumulation is {accumulation}; allowed with {launched()} processes: multiples of "
            f"{launched()}"
        )
