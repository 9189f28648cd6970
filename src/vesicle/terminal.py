"""Text of unknown origin on a terminal: shown, and never acted upon.

Answers, file names and data may hold escape sequences, which move the cursor, retitle the window or
type for the user, and overrides of the writing direction, which make text read as what it is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but tab and newline, DEL, C1; overrides and isolates of direction; halves of surrogate pairs.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Text whose control characters are spelt out, as in `\x1b[2J`; tabs and newlines stay."""
    return _ACTIVE.sub(lambda found: _spelt(found[0]), text)


def one_line(text: str) -> str:
    r"""The same, with tabs and newlines spelt out as well."""
    return visible(text.replace("\n", r"\n").replace("\t", r"\t"))


class AnswerWriter:
    """Writes text that arrives in parts: `visible` on a terminal, as it is everywhere else.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._held = ""

    def write(self, part: str) -> None:
        """Write a part at once.

        A carriage return waits for what comes next: before a newline it is a part of a line's end.
        """
        if self._terminal:
            part = self._held + part
            self._held = "\r" if part.endswith("\r") else ""
            part = visible(part.removesuffix(self._held).replace("\r\n", "\n"))
        if part:
            self._stream.write(part)
            self._stream.flush()


class SafeConsole(Console):
    """A console that shows what it is given as `visible` text, styles aside.

    Tables are laid out before: a cell that holds control characters may lose its end.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments of a renderable; everything that is printed passes through here."""
        for segment in super().render(renderable, options):
            if self.is_terminal and not segment.control:
                yield Segment(visible(segment.text), segment.style)
            else:
                yield segment


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
