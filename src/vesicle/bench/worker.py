"""The process of one contender: `python -m vesicle.bench.worker`.

It reads one JSON object a line from standard input and answers each with one line. While it waits
it is blocked in that read, so that it takes no time from whoever's turn it is. It ends when its
input does, so that no worker outlives a parent that was killed.

==============  ============================================================  ==================
request `do`    with                                                          answers
==============  ============================================================  ==================
`load`          `contender`: the fields of a `Contender`                      facts, memory
`measure`       `rows`, `prompt_tokens`: see `measure.measure`                what it returns
`bandwidth`     `threads`, `repeats`: see `bandwidth.measure_bandwidth`       what it returns
==============  ============================================================  ==================

A problem is answered with `error`, one line that says where it is if it is a bug.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from vesicle.bench.contenders import Contender
from vesicle.bench.machine import resident_bytes
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.memory import peak_bytes


class Server:
    """Answers requests; holds the loaded contender between them."""

    def __init__(self) -> None:
        """Start without a contender; a `load` request brings it."""
        self._runner: Any = None
        self._actions: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self._load,
            "measure": self._measure,
            "bandwidth": self._bandwidth,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for; problems become answers too."""
        arguments = dict(request)
        try:
            return self._actions[arguments.pop("do")](**arguments)
        except VesicleError as error:
            return {"error": str(error)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            return {"error": f"{type(error).__name__}: {error} ({place})"}

    def serve(self, requests: Iterable[str], answers: TextIO) -> None:
        """Answer until the input ends."""
        for line in requests:
            answers.write(json.dumps(self.answer(json.loads(line))) + "\n")
            answers.flush()

    def _load(self, contender: dict[str, Any]) -> dict[str, Any]:
        from vesicle.bench.runners import load

        self._runner = load(Contender(**contender))
        before = resident_bytes()  # libraries are in, weights are not
        facts = self._runner.load()
        return {
            "facts": facts,
            "start_bytes": before,
            "loaded_bytes": resident_bytes(),
            "load_peak_bytes": peak_bytes() or None,
        }

    def _measure(self, rows: list[list[int]], prompt_tokens: int) -> dict[str, Any]:
        from vesicle.bench.measure import measure

        return measure(self._runner, rows, prompt_tokens)

    def _bandwidth(self, threads: int, repeats: int) -> dict[str, Any]:
        from vesicle.bench.bandwidth import measure_bandwidth

        return measure_bandwidth(threads, repeats)


def main() -> None:
    """Answer requests from standard input on standard output; libraries print on standard error."""
    # A terminal sends the interruption to the parent too, which ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries may print: answers go out on a copy of standard output that nobody else has.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Server().serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
