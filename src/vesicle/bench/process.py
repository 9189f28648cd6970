"""The parent's end of a worker: start it, ask it, end it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from typing import Any, Self

from vesicle.errors import VesicleError

COMMAND = (sys.executable, "-m", "vesicle.bench.worker")


class WorkerError(VesicleError):
    """A worker ended, or could not do what it was asked."""


class WorkerTimeout(WorkerError):
    """A worker took longer than it may."""


class Worker:
    """A child process that answers one request at a time, in JSON lines.

    It must be closed, or used as a context manager, so that no process is left behind.
    """

    def __init__(
        self,
        name: str,
        environment: dict[str, str] | None = None,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        """Start it.

        Args:
            name: For messages.
            environment: Variables to set, beside this process's own.
            command: Program and arguments.
        """
        self.name = name
        self._log = tempfile.TemporaryFile()
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        # The child imports what this process imports, wherever that was found.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, **(environment or {}), "PYTHONPATH": paths},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    def ask(self, timeout_s: float | None = None, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerTimeout: No answer came in time; the worker has been ended.
            WorkerError: The worker has ended, or answers with a problem.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise WorkerTimeout(f"{self.name} took longer than {timeout_s:g} s") from None
        except OSError:
            line = ""
        if not line:
            self._process.wait()
            raise WorkerError(f"{self.name} ended unexpectedly ({self._reason()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it at once, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue  # a pipe with unsent bytes whose reader is gone
        self._log.close()

    def __enter__(self) -> Self:
        """The worker itself; its process has run since it was made."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process at once, as `close` does."""
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _reason(self) -> str:
        """The last line it wrote on standard error, or how it ended."""
        code = self._process.returncode
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        ended = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        if code == -9:
            ended += ", perhaps for want of memory"
        return f"{ended}: {lines[-1][:200]}" if lines else ended


def start(name: str, environment: dict[str, str]) -> Worker:
    """Start a contender's worker."""
    return Worker(name, environment)
