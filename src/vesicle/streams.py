"""The standard streams of a command: closed, full or abandoned ones are told, never stumbled over.

Standard output carries results, so whatever cannot be written there ends the command with one line.
Standard error carries what is said on the way, and a lost line must not end hours of work: its
failure is remembered, and told by the exit status. A reader that has gone ends a command quietly.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, Self, TextIO

from vesicle.errors import VesicleError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_OUTPUT, _ERROR = 1, 2


class StreamError(VesicleError):
    """Standard output cannot be written: it is closed, or the disk behind it is full."""


class ReaderGone(Exception):
    """Whoever read an output stream has gone, as `head` does once it has enough."""


class _Sink(io.FileIO):
    """The raw end of an output stream. After its first failure it drops what it is given.

    Python flushes what a failed write has left in buffers once more when it exits; that must not
    become a second complaint.

    Attributes:
        lost: Whether something could not be written.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it, or drop all of it.

        Raises:
            StreamError: This is standard output, and it cannot be written.
            ReaderGone: Nobody reads it any more.
        """
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and not self.lost:
            try:
                written = super().write(view[done:])
            except BrokenPipeError:
                self.lost = True
                raise ReaderGone from None
            except OSError as error:
                self.lost = True
                if self.fileno() == _OUTPUT:
                    why = "it is closed" if error.errno == errno.EBADF else error.strerror
                    raise StreamError(f"cannot write standard output: {why}") from error
            else:
                done += written or 0
                if written is None:  # a pipe that does not block, and is full for now
                    select.select([], [self], [])
        return len(view)


class StandardStreams:
    """While open, `sys.stdout` and `sys.stderr` can be written to, and report failures as above.

    Streams that a caller has put in place of the process's own stay; they only learn to replace
    characters that they cannot encode.
    """

    def __init__(self) -> None:
        self._before: tuple[TextIO, TextIO] | None = None
        self._sinks: list[_Sink] = []

    def __enter__(self) -> Self:
        """Put the streams in place."""
        _fill_closed()
        self._before = sys.stdout, sys.stderr
        # A terminal that cannot show a character must not end an answer.
        sys.stdout = self._checked(sys.stdout, _OUTPUT, "replace")
        sys.stderr = self._checked(sys.stderr, _ERROR, "backslashreplace")
        return self

    def __exit__(self, *_: object) -> None:
        """Take them away again; what is still in buffers is written if it can be."""
        assert self._before is not None
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (StreamError, ReaderGone):
                continue  # the command has failed before, and that reason is the one to tell
        sys.stdout, sys.stderr = self._before

    def finish(self) -> bool:
        """Write out what is in buffers, before the command may call itself a success.

        Returns:
            Whether everything ever written to both streams has arrived.

        Raises:
            StreamError: Standard output cannot be written.
            ReaderGone: Nobody reads one of them any more.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        return not any(sink.lost for sink in self._sinks)

    def _checked(self, stream: TextIO | None, descriptor: int, errors: str) -> TextIO:
        """The stream on a raw end of ours, if it is the process's own; else as it is."""
        encoding, by_line = "utf-8", descriptor == _ERROR
        if stream is not None:
            if not isinstance(stream, io.TextIOWrapper):
                return stream
            if not _ends_in(stream, descriptor):
                stream.reconfigure(errors=errors)
                return stream
            stream.flush()
            encoding, by_line = stream.encoding, stream.line_buffering or stream.write_through
        sink = _Sink(descriptor)
        self._sinks.append(sink)
        return io.TextIOWrapper(
            io.BufferedWriter(sink), encoding, errors, newline="\n", line_buffering=by_line
        )


def _ends_in(stream: io.TextIOWrapper, descriptor: int) -> bool:
    """Whether a stream writes to this file descriptor, with nothing in between."""
    buffer = stream.buffer
    raw = buffer.raw if isinstance(buffer, io.BufferedWriter) else buffer
    return isinstance(raw, io.FileIO) and raw.fileno() == descriptor


def _fill_closed() -> None:
    """Take the numbers of closed streams, which the next file opened would get otherwise.

    What is written to standard error then goes nowhere; writing to standard output fails.
    """
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)  # gets the lowest number that is free: this one
            os.set_inheritable(opened, True)
