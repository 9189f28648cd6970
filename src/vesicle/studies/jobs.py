"""Jobs of a study: in processes side by side, each done once.

A job is a function of this package and its arguments, all of which JSON can hold; it gives a record
that JSON can hold. What was done lies in a file with the job's facts, so that a study that was
killed goes on with the next, and one whose settings changed does that job anew.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vesicle.errors import DataError, VesicleError
from vesicle.files import read_json, write_json
from vesicle.folders import locked


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work.

    Attributes:
        name: Also of its file, such as `lm/att/0`.
        call: The function, `module:name`; called with the study's folder, `facts` and `where`.
        facts: All that its result depends on.
        where: Places on this machine, which no record keeps.
    """

    name: str
    call: str
    facts: dict[str, Any] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)

    def path(self, out: Path) -> Path:
        """Where its record lies in a study's folder."""
        return out / "records" / f"{self.name}.json"

    def done(self, out: Path) -> dict[str, Any] | None:
        """Its record, if it was done with these facts.

        Raises:
            DataError: There is one that is damaged.
        """
        path = self.path(out)
        if not path.exists():
            return None
        try:
            record = read_json(path)
            result: dict[str, Any] = record["result"]
        except (DataError, KeyError, TypeError) as error:
            raise DataError(
                f"the record {path} is damaged; remove it, and its job is done again ({error})"
            ) from error
        # As JSON has them: tuples are lists there.
        same = record.get("facts") == json.loads(json.dumps(self.facts))
        return result if same and record.get("call") == self.call else None


Stage = tuple[str, int, list[Job]]
"""What it is called, how many processes it may take, and its jobs; one follows another."""


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    report: Callable[[dict[str, dict[str, Any]]], dict[str, Any]],
    show: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Do what is not done yet of a whole study, and report it.

    Args:
        stages: In order.
        out: The study's folder.
        report: From the records of all jobs, by their names; writes the report and gives it.
        show: Told the name of a job that is done, how many are, and of how many.

    Returns:
        The report.

    Raises:
        VesicleError: A job failed, or another process writes to the folder.
    """
    total, done = sum(len(jobs) for _, _, jobs in stages), 0
    records = dict[str, dict[str, Any]]()

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        if show is not None:
            show(name, done, total)

    with locked(out):
        for _, processes, jobs in stages:
            records |= run_jobs(jobs, out, workers=min(processes, len(jobs)), show=tell)
        return report(records)


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int,
    show: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Do what is not done yet, and give all records.

    Args:
        jobs: In the order in which they are begun.
        out: The study's folder.
        workers: Processes; with several, each computes on one thread.
        show: Told the name of each job that is done.

    Returns:
        Records by the names of jobs.

    Raises:
        VesicleError: A job failed; what was done before stays.
    """
    found = dict[str, dict[str, Any]]()
    waiting = []
    for job in jobs:
        record = job.done(out)
        if record is None:
            waiting.append(job)
        else:
            found[job.name] = record
            if show is not None:
                show(job.name)
    if not waiting:
        return found
    if workers == 1:
        for job in waiting:
            found[job.name] = _do(job, out)
            if show is not None:
                show(job.name)
        return found
    # Forked processes would inherit torch's threads in whatever state they are.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_alone)
    try:
        running: dict[Future[dict[str, Any]], Job] = {
            pool.submit(_do, job, out): job for job in waiting
        }
        while running:
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                found[job.name] = future.result()
                if show is not None:
                    show(job.name)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    pool.shutdown()
    return found


def _alone() -> None:
    """Compute on one thread, and end with whoever began the process, however that one ends."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(job: Job, out: Path) -> dict[str, Any]:
    module, _, name = job.call.partition(":")
    try:
        result: dict[str, Any] = getattr(import_module(module), name)(out, **job.facts, **job.where)
    except VesicleError as error:
        raise VesicleError(f"{job.name}: {error}") from error
    write_json(job.path(out), {"call": job.call, "facts": job.facts, "result": result}, indent=None)
    return result
