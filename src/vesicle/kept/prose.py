"""The kinds of the characters of a running text, and where its words begin.

A word is a run of letters and of what belongs to them: digits, combining marks, and apostrophes and
joiners before a letter. It is a function word if it is one of English, however it is written; else
capitalised if its first letter is, also at the start of a sentence. A run that begins with a digit
is a number, with the points, commas and colons inside it and the letters that follow (`1,500`,
`3rd`). All that is neither is punctuation: signs, symbols, emoji.
"""

from __future__ import annotations

import re
import unicodedata

from vesicle.kept.marks import NUMBER, Marks, unmarked

FUNCTION_WORD, WORD, CAPITALISED = "function word", "other word", "capitalised word"

_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any no every each either neither both all such another
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
    myself yourself himself herself itself ourselves yourselves themselves oneself
    who whom whose which what whatever whichever whoever when where why how
    am is are was were be been being do does did doing done have has had having
    can could may might must shall should will would ought cannot
    and or but nor so yet if then else than because since while although though unless until whether
    as at by for from in into of off on onto out over to up with without within about above across
    after against along among around before behind below beneath beside besides between beyond
    during except inside near outside per through throughout toward towards under upon via
    not only just also too very more most much many few less least own same other there here
    """.split()
)


def mark(text: str) -> Marks:
    """The kind of each character of a text, and the first character of the word that it is in."""
    marks = unmarked(text)
    for found in _pattern(text).finditer(text):
        kind = _kind(found[0])
        marks.set(found.start(), found.end(), kind, word=kind != NUMBER)
    return marks


def _pattern(text: str) -> re.Pattern[str]:
    """Words and numbers, with the combining marks that this text has."""
    combining = sorted(c for c in set(text) if unicodedata.category(c).startswith("M"))
    letter = r"[^\W_]"
    more = f"[{''.join(map(re.escape, combining))}]|" if combining else ""
    inside = rf"(?:{more}{letter}|['’\u200c\u200d](?={letter}))*"
    return re.compile(rf"\d(?:{letter}|[.,:](?=\d))*|{letter}{inside}")


def _kind(word: str) -> str:
    plain = word.lower().replace("’", "'")
    if word[0].isdigit() or not any(c.isalpha() for c in word):
        return NUMBER
    if plain.partition("'")[0] in _FUNCTION_WORDS or plain.endswith("n't"):
        return FUNCTION_WORD
    return CAPITALISED if word[0].isupper() else WORD
