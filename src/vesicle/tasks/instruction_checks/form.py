"""Checks of an answer's form: quotes, title, bullets, paragraphs, blanks, postscript."""

from __future__ import annotations

import re


def quoted(text: str) -> bool:
    """The whole answer stands between double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def titled(text: str) -> bool:
    """There is a title such as <<title>>, on one line and not empty."""
    return bool(re.search(r"<<[ \t]*[^\s<>][^\n]*?>>", text))


def bullets(text: str, n: int) -> bool:
    """Exactly n lines begin with `*` or `-`, a blank and something after it."""
    return len(re.findall(r"^[ \t]*[*-][ \t]+\S", text, re.MULTILINE)) == n


def paragraphs(text: str, n: int) -> bool:
    """Exactly n parts separated by `***`, none empty; the marks may also stand at either end."""
    parts = [part.strip() for part in text.strip().split("***")]
    if len(parts) > 1 and not parts[0]:
        parts = parts[1:]
    if len(parts) > 1 and not parts[-1]:
        parts = parts[:-1]
    return all(parts) and len(parts) == n


def blanks(text: str, n: int) -> bool:
    """At least n places to fill in, such as [name]."""
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= n


def postscript(text: str) -> bool:
    """A line begins with P.S. and goes on, letter case aside."""
    return bool(re.search(r"^\W*p\.\s?s\.\W*\w", text, re.MULTILINE | re.IGNORECASE))
