"""The kinds of the characters of source code: comments, strings, numbers, names.

One regular expression for each family of languages. It finds what a reader takes for a comment or a
string, also in code that does not compile, and is no parser: heredocs of a shell, literals of
regular expressions and raw strings of C++ are read as code.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from vesicle.kept.marks import NUMBER, Marks, unmarked

COMMENT, STRING, NAME = "comment", "string", "keyword or name"

_HASH = r"\#[^\n]*"
_SLASHES = r"//[^\n]*|/\*.*?(?:\*/|\Z)"
_DOUBLE = r'"(?:\\.|[^"\\\n])*"?'
_SINGLE = r"'(?:\\.|[^'\\\n])*'?"
_CHARACTER = r"'(?:\\[^'\n]+|[^'\\\n])'"  # lifetimes of Rust have one quote
_BACKTICKS = r"`(?:\\.|[^`\\])*`?"
_PYTHON = (
    r'[rRbBuUfF]{0,2}(?:"""(?:\\.|(?!""").)*(?:"""|\Z)'
    rf"|'''(?:\\.|(?!''').)*(?:'''|\Z)|{_DOUBLE}|{_SINGLE})"
)
_REST = r"(?P<number>\d(?:\w|'(?=\d))*(?:\.\d\w*)?(?:(?<=[eE])[+-]\d+)?)|(?P<name>[^\W\d]\w*)"


def _language(comment: str, string: str) -> re.Pattern[str]:
    return re.compile(f"(?P<comment>{comment})|(?P<string>{string})|{_REST}", re.DOTALL)


_HASHED = _language(_HASH, _PYTHON)
_SLASHED = _language(_SLASHES, f"{_DOUBLE}|{_SINGLE}")
_SCRIPT = _language(_SLASHES, f"{_DOUBLE}|{_SINGLE}|{_BACKTICKS}")
_RUST = _language(_SLASHES, rf'"(?:\\.|[^"\\])*"?|{_CHARACTER}')
# In a shell, # begins a comment where a word may begin.
_SHELL = _language(rf"(?<!\S){_HASH}", r'"(?:\\.|[^"\\])*"?' + r"|'[^']*'?")

LANGUAGES = {
    ".py": _HASHED,
    ".c": _SLASHED,
    ".cpp": _SLASHED,
    ".h": _SLASHED,
    ".js": _SCRIPT,
    ".ts": _SCRIPT,
    ".java": _SLASHED,
    ".rs": _RUST,
    ".go": _SCRIPT,
    ".sh": _SHELL,
}
"""Patterns by suffixes of files."""

_SLASHED_LINE = re.compile(r"^\s*(?://|/\*)", re.MULTILINE)
_KINDS = {"comment": COMMENT, "string": STRING, "number": NUMBER, "name": NAME}


def is_source(path: PurePath) -> bool:
    """Whether a file's suffix is one of code."""
    return path.suffix.lower() in LANGUAGES


def mark(text: str, suffix: str = "") -> Marks:
    """The kind of each character of source code.

    Args:
        text: The code.
        suffix: Of its file, such as `.py`. Of one that is not known, `//` or `/*` at the start of a
            line tells C and its like from Python and its like.
    """
    guessed = _SCRIPT if _SLASHED_LINE.search(text) else _HASHED
    marks = unmarked(text)
    for found in LANGUAGES.get(suffix.lower(), guessed).finditer(text):
        assert found.lastgroup is not None
        marks.set(found.start(), found.end(), _KINDS[found.lastgroup])
    return marks
