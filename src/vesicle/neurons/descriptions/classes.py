"""Classes of tokens that have a name and a test: numbers, punctuation, endings, closed word lists.

They are candidates for descriptions like any other string, and the only ones that can be tested
without a model. All are of English but the first ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MappingProxyType

from vesicle.neurons.descriptions.spots import Spot

Test = Callable[[Spot], bool]


def _token(pattern: str) -> Test:
    compiled = re.compile(pattern)
    return lambda spot: compiled.fullmatch(spot.token.strip(" ")) is not None


def _word(pattern: str) -> Test:
    compiled = re.compile(pattern)
    return lambda spot: compiled.fullmatch(spot.word) is not None


def _listed(words: str) -> Test:
    known = frozenset(words.split())
    return lambda spot: spot.word.lower() in known


CLASSES: MappingProxyType[str, Test] = MappingProxyType(
    {
        "a number": _token(r"[\d.,]*\d[\d.,]*"),
        "a year": _word(r"1\d{3}|20\d\d"),
        "punctuation": _token(r"[^\w\s]+"),
        "a comma": _token(r","),
        "a full stop": _token(r"\."),
        "a colon or semicolon": _token(r"[:;]"),
        "a quotation mark": _token(r"[\"“”‘’'«»]+"),
        "a bracket": _token(r"[()\[\]{}]+"),
        "a dash": _token(r"[-–—]+"),
        "a line break": lambda spot: "\n" in spot.token,
        "a name": lambda spot: spot.word[:1].isupper() and not spot.begins_sentence,
        "the first word of a sentence": lambda spot: spot.begins_sentence,
        "an abbreviation": _word(r"[A-Z]{2,6}"),
        "the rest of a word": lambda spot: spot.continues_word,
        "a word ending in -ing": _word(r"[a-z]{2,}ing"),
        "a word ending in -ed": _word(r"[a-z]{2,}ed"),
        "a word ending in -ly": _word(r"[a-z]{2,}ly"),
        "a word ending in -tion": _word(r"[A-Za-z]+tions?"),
        "a word ending in -er": _word(r"[a-z]{2,}ers?"),
        "a plural": _word(r"[A-Za-z]{2,}[^\Wus]s"),
        "an article": _listed("a an the"),
        "a preposition": _listed(
            "of in on at by for from to with into onto over under between among through during "
            "against about after before since until within without toward towards across along"
        ),
        "a pronoun": _listed(
            "i you he she it we they me him her us them my your his its our their mine yours hers "
            "ours theirs himself herself itself themselves who whom whose which that this these"
        ),
        "a conjunction": _listed("and or but nor so yet because although while if unless whereas"),
        "a form of to be": _listed("be is are was were been being am"),
        "an auxiliary verb": _listed(
            "have has had do does did will would can could may might shall should must"
        ),
        "a negation": _listed("not no never none nothing nobody neither nor without cannot"),
        "a month": _listed(
            "january february march april may june july august september october november december"
        ),
        "a day of the week": _listed(
            "monday tuesday wednesday thursday friday saturday sunday weekend"
        ),
        "a number word": _listed(
            "one two three four five six seven eight nine ten eleven twelve twenty thirty forty "
            "fifty hundred thousand million billion first second third fourth fifth sixth half"
        ),
        "a unit of measurement": _listed(
            "metre metres meter meters km kilometres kilometers mile miles feet foot inch inches "
            "kg pounds tons tonnes acres hectares degrees percent hours minutes seconds mm cm"
        ),
        "a time": _listed(
            "year years month months week weeks day days hour hours century decade time today "
            "morning evening night spring summer autumn winter early late"
        ),
        "a direction": _listed(
            "north south east west northern southern eastern western northeast northwest southeast "
            "southwest left right central"
        ),
        "a colour": _listed(
            "red blue green yellow black white brown grey gray orange purple pink golden silver"
        ),
        "a member of a family": _listed(
            "father mother brother sister son daughter wife husband uncle aunt cousin grandfather "
            "grandmother parents children child brothers sisters sons daughters family"
        ),
    }
)
"""By their names, which are the descriptions."""
