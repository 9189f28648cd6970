"""Notices: one line each, on standard error unless somebody takes them."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]
"""Takes a one-line notice."""


def to_standard_error(line: str) -> None:
    """Where notices go unless they are asked for."""
    print(line, file=sys.stderr)
