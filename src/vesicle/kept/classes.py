"""What class a token is of, by where its characters stand in the text.

Of prose: function word, other word, capitalised word, number, punctuation, whitespace, and
continuation of a word, for tokens that do not begin theirs. Of code: comment, string, number,
punctuation, whitespace, keyword or name. A token of several kinds (a bracket and a name) is of the
first that is neither whitespace nor punctuation. One that the tokenizer adds by itself is special.
"""

from __future__ import annotations

from collections.abc import Sequence

from vesicle.kept import prose, source
from vesicle.kept.marks import NUMBER, PUNCTUATION, WHITESPACE, Marks

CONTINUATION, SPECIAL = "continuation of a word", "special"

CLASSES = (
    prose.FUNCTION_WORD,
    prose.WORD,
    prose.CAPITALISED,
    CONTINUATION,
    source.NAME,
    source.STRING,
    source.COMMENT,
    NUMBER,
    PUNCTUATION,
    WHITESPACE,
    SPECIAL,
)
"""All of them, in the order in which they are shown."""


def classes(text: str, spans: Sequence[tuple[int, int]], code: str | None = None) -> list[str]:
    """The class of each of T tokens.

    Args:
        text: What was tokenised.
        spans: (T,) the first character of each and the one after its last, rising.
        code: The suffix of the code's file, "" for one that is not known; None for prose.
    """
    marks = prose.mark(text) if code is None else source.mark(text, code)
    found, begun = list[str](), 0
    for first, stop in spans:
        found.append(_class(first, stop, begun, marks))
        begun = max(begun, stop)
    return found


def _class(first: int, stop: int, begun: int, marks: Marks) -> str:
    """The class of one token; characters up to `begun` were begun by tokens before it."""
    if first == stop:
        return SPECIAL
    visible = [i for i in range(first, stop) if marks.kinds[i] != WHITESPACE]
    if not visible:
        return WHITESPACE
    at = next((i for i in visible if marks.kinds[i] != PUNCTUATION), visible[0])
    if marks.words[at] >= 0 and (marks.words[at] < at or at < begun):
        return CONTINUATION
    return marks.kinds[at]
