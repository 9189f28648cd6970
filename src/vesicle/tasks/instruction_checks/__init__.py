"""Verifiable instructions: which there are, which go together, and whether an answer keeps one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from vesicle.tasks.instruction_checks import form, wording
from vesicle.tasks.instruction_checks.base import Instruction, Parameters, one_of


def _keyword(rng: np.random.Generator) -> dict[str, Any]:
    return {"word": str(rng.choice(wording.KEYWORDS)), "n": int(rng.integers(2, 5))}


def _forbidden(rng: np.random.Generator) -> dict[str, Any]:
    return {"forbidden": [str(word) for word in rng.choice(wording.FORBIDDEN, 2, replace=False)]}


INSTRUCTIONS: dict[str, Instruction] = {
    "lower_case": Instruction(
        ask="Write in lower case only, without any capital letter.",
        kept=wording.lower_case,
        conflicts=frozenset({"upper_case", "starts_with", "ends_with", "postscript"}),
    ),
    "upper_case": Instruction(
        ask="Write everything in capital letters.",
        kept=wording.upper_case,
        conflicts=frozenset({"starts_with", "ends_with"}),
    ),
    "no_commas": Instruction(
        ask="Do not use any commas.",
        kept=wording.no_commas,
    ),
    "at_most_words": Instruction(
        ask="Use at most {n} words.",
        kept=wording.at_most_words,
        draw=one_of("n", (40, 60, 80)),
        conflicts=frozenset({"at_least_words"}),
    ),
    "at_least_words": Instruction(
        ask="Use at least {n} words.",
        kept=wording.at_least_words,
        draw=one_of("n", (40, 60, 80)),
    ),
    "keyword": Instruction(
        ask='Use the word "{word}" at least {n} times.',
        kept=wording.keyword,
        draw=_keyword,
    ),
    "avoids": Instruction(
        ask='Do not use the words "{forbidden[0]}" and "{forbidden[1]}".',
        kept=wording.avoids,
        draw=_forbidden,
    ),
    "starts_with": Instruction(
        ask='Begin your answer with the word "{word}".',
        kept=wording.starts_with,
        draw=one_of("word", wording.FIRST_WORDS),
        conflicts=frozenset({"quoted", "titled"}),
    ),
    "ends_with": Instruction(
        ask='End your answer with this sentence and write nothing after it: "{sentence}"',
        kept=wording.ends_with,
        draw=one_of("sentence", wording.LAST_SENTENCES),
        conflicts=frozenset({"quoted", "postscript"}),
    ),
    "quoted": Instruction(
        ask="Put your whole answer between double quotation marks.",
        kept=form.quoted,
        conflicts=frozenset({"postscript"}),
    ),
    "titled": Instruction(
        ask="Give your answer a title in double angle brackets, such as <<title>>.",
        kept=form.titled,
    ),
    "bullets": Instruction(
        ask="Include exactly {n} bullet points, each on a line of its own that begins with '* '.",
        kept=form.bullets,
        draw=one_of("n", (2, 3, 4, 5)),
        conflicts=frozenset({"paragraphs"}),
    ),
    "paragraphs": Instruction(
        ask="Write exactly {n} paragraphs, with a line of three asterisks (***) between them.",
        kept=form.paragraphs,
        draw=one_of("n", (2, 3, 4)),
    ),
    "blanks": Instruction(
        ask="Leave at least {n} blanks to fill in, in square brackets such as [name].",
        kept=form.blanks,
        draw=one_of("n", (1, 2, 3)),
    ),
    "postscript": Instruction(
        ask='Add a postscript at the end that begins with "P.S."',
        kept=form.postscript,
    ),
}


def conflict(one: str, other: str) -> bool:
    """Whether two kinds cannot be asked together; a kind conflicts with itself."""
    return (
        one == other or other in INSTRUCTIONS[one].conflicts or one in INSTRUCTIONS[other].conflicts
    )


def draw(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Instructions that go together.

    Args:
        rng: Draws kinds and parameters.
        count: How many; up to 3 can always be had.

    Returns:
        Each as `{"kind": name, **parameters}`.
    """
    chosen: list[dict[str, Any]] = []
    for kind in rng.permutation(list(INSTRUCTIONS)):
        name = str(kind)
        if len(chosen) < count and not any(conflict(name, other["kind"]) for other in chosen):
            chosen.append({"kind": name, **INSTRUCTIONS[name].draw(rng)})
    return chosen


def in_words(instruction: Parameters) -> str:
    """The wish as the model reads it."""
    return INSTRUCTIONS[instruction["kind"]].ask.format(**instruction)


def is_kept(instruction: Parameters, answer: str, *, loose: bool = False) -> bool:
    """Whether an answer keeps an instruction. An answer without any text keeps none.

    Args:
        instruction: `{"kind": name, **parameters}`.
        answer: What the model said.
        loose: Also accept the answer if one of IFEval's variants of it keeps the instruction:
            without its first line, its last, both, and each of these without asterisks.
    """
    parameters = {name: value for name, value in instruction.items() if name != "kind"}
    kept = INSTRUCTIONS[instruction["kind"]].kept
    return any(
        bool(variant.strip()) and kept(variant, **parameters)
        for variant in (loose_variants(answer) if loose else [answer])
    )


def loose_variants(answer: str) -> Iterable[str]:
    """The eight readings of an answer that IFEval's loose accuracy allows, itself first."""
    lines = answer.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part).strip()
        yield from (text, text.replace("*", ""))
