"""A command that is asked to end cleans up after itself, as one that fails does.

By default SIGTERM (from `kill`, `timeout`, a service manager) and SIGHUP (a terminal that closes)
end a process at once, and what it was writing stays behind for good. Here they become an exception,
so that every `finally` runs.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_BASE_STATUS = 128
P = ParamSpec("P")


class EndedBySignal(SystemExit):
    """The process was asked to end; its code is the exit status, 128 and the signal's number."""


def ended_by_signals(main: Callable[P, int]) -> Callable[P, int]:
    """Have `SIGNALS` end a main function through its `finally` clauses.

    Args:
        main: A function that gives an exit status.

    Returns:
        The same function, which gives 128 and the signal's number when a signal ended it. Outside
        the main thread, where Python handles no signals, nothing is changed.
    """

    @functools.wraps(main)
    def wrapped(*arguments: P.args, **settings: P.kwargs) -> int:
        if threading.current_thread() is not threading.main_thread():
            return main(*arguments, **settings)
        # One that is ignored (by nohup) stays ignored.
        caught = [s for s in SIGNALS if signal.getsignal(s) is signal.SIG_DFL]
        for each in caught:
            signal.signal(each, _end)
        try:
            return main(*arguments, **settings)
        except EndedBySignal as end:
            print("\nvesicle: terminated", file=sys.stderr)
            return int(str(end.code))
        finally:
            for each in caught:
                signal.signal(each, signal.SIG_DFL)

    return wrapped


def _end(number: int, frame: FrameType | None) -> None:
    # A second one must not cut the clean-up short.
    for each in SIGNALS:
        if signal.getsignal(each) is _end:
            signal.signal(each, signal.SIG_IGN)
    raise EndedBySignal(_BASE_STATUS + number)
