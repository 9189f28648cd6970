"""Candidates tried on a Ray cluster, or on all cores of this machine where there is none.

Contexts are dealt out to workers, one of each free CPU; each has an engine of its own, of one
thread, and reads its contexts once. What candidates lose does not depend on which worker is asked;
packed products may differ in the last bit by the number of threads, and so from those of a run in
one process that has more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.evolution.questions import Question
from vesicle.evolution.trials import FloatArray, Here, Read
from vesicle.namm import Namm, NammSettings

_PATIENCE_S = 10.0
"""That a cluster may take to have a CPU free."""


def on_cluster(find: Callable[[], Path]) -> Read:
    """What reads contexts on a cluster; `find` gives the model's folder on a worker's machine."""
    return partial(OnCluster, find)


class OnCluster:
    """Contexts of many processes."""

    def __init__(
        self,
        find: Callable[[], Path],
        questions: Sequence[Question],
        settings: NammSettings | None,
        gates: NDArray[np.float32],
        wait: Callable[[str], None] = lambda note: None,
    ) -> None:
        """Start workers and have them read.

        Args:
            find: Gives the model's folder on a worker's machine.
            questions: Whose contexts are dealt out.
            settings: See `Context`.
            gates: The same.
            wait: Takes a note of how many workers there are.

        Raises:
            VesicleError: If Ray is missing, has no free CPU, or a worker fails.
        """
        self._ray = ray = _ray()
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        n = min(len(questions), _free_cpus(ray))
        if n < 1:
            raise VesicleError("the Ray cluster has no free CPU")
        wait(f"{n} workers read {len(questions)} contexts")
        worker = ray.remote(num_cpus=1)(_Worker)
        self._workers = [worker.remote() for _ in range(n)]
        dealt = [list(questions[i::n]) for i in range(n)]
        try:
            self._ask(
                [
                    (w, "read", (find, part, settings, gates))
                    for w, part in zip(self._workers, dealt, strict=True)
                ]
            )
        except BaseException:
            self.close()
            raise

    def excess(self, which: Sequence[int], candidates: Sequence[Namm], memory: float) -> FloatArray:
        """(n, C) what candidates lose on contexts."""
        return self._dealt("excess", which, list(candidates), memory)

    def excess_without(self, which: Sequence[int], namm: Namm) -> FloatArray:
        """(n, L, G) what is lost where one KV head forgets."""
        return self._dealt("excess_without", which, namm)

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            self._ray.kill(worker)

    def _dealt(self, name: str, which: Sequence[int], *args: Any) -> FloatArray:
        n = len(self._workers)
        asked = [[i for i in which if i % n == w] for w in range(n)]
        busy = [w for w in range(n) if asked[w]]
        found = self._ask(
            [(self._workers[w], name, ([i // n for i in asked[w]], *args)) for w in busy]
        )
        rows = {
            i: row
            for w, part in zip(busy, found, strict=True)
            for i, row in zip(asked[w], part, strict=True)
        }
        return np.array([rows[i] for i in which])

    def _ask(self, calls: list[tuple[Any, str, tuple[Any, ...]]]) -> list[Any]:
        try:
            return list(
                self._ray.get([getattr(worker, name).remote(*args) for worker, name, args in calls])
            )
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, VesicleError):
                raise cause from None
            raise VesicleError(f"a Ray worker failed: {_line(cause)}") from error
        except self._ray.exceptions.RayError as error:
            raise VesicleError(
                f"a Ray worker was lost ({_line(error)}); the same command goes on from the last "
                "generation"
            ) from error


class _Worker:
    """One process of the cluster."""

    def read(
        self,
        find: Callable[[], Path],
        questions: list[Question],
        settings: NammSettings | None,
        gates: NDArray[np.float32],
    ) -> None:
        # Not when it is made: Ray tells of an error there as of a worker that was lost.
        from vesicle.engine import Engine
        from vesicle.evolution.contexts import capacity_for

        folder = find()
        engine = Engine.from_pretrained(
            folder, threads=1, kv_capacity=capacity_for(folder, questions)
        )
        self._here = Here(engine, questions, settings, gates)

    def excess(self, which: list[int], candidates: list[Namm], memory: float) -> FloatArray:
        return self._here.excess(which, candidates, memory)

    def excess_without(self, which: list[int], namm: Namm) -> FloatArray:
        return self._here.excess_without(which, namm)


def _free_cpus(ray: Any) -> int:
    """CPUs that nobody has asked for; those of a run that just ended are told of a moment later."""
    until = time.monotonic() + _PATIENCE_S
    while (found := int(ray.available_resources().get("CPU", 0))) < 1 and time.monotonic() < until:
        time.sleep(0.2)
    return found


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise VesicleError("--ray needs the package ray: pip install 'vesicle[ray]'") from error
    return ray


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
