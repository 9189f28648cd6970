from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.test_haystack import blanks, byte_pairs, filler
from vesicle.errors import DataError
from vesicle.models import Text, resolve_model
from vesicle.tasks.base import Settings
from vesicle.tasks.haystack import MOST_SPARE_TOKENS, generator
from vesicle.tasks.instruction_checks import (
    INSTRUCTIONS,
    conflict,
    draw,
    in_words,
    is_kept,
    loose_variants,
    wording,
)
from vesicle.tasks.instructions import LENGTHS, PER_CELL, Instructions
from vesicle.tasks.items import Item, Output

SETTINGS = Settings(encode=blanks)

# Kind, parameters, answers that keep it, answers that break it.
EXAMPLES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("lower_case", {}, ["all small, 1 2 3.", "straße"], ["One capital", "ALL", "12 3"]),
    ("upper_case", {}, ["ALL LARGE, 1 2."], ["ALL BUT oNE", "none", "12 3"]),
    ("no_commas", {}, ["No pause; none."], ["Well, one.", ","]),
    ("at_most_words", {"n": 3}, ["one two three", "one-two three!", "- a"], ["a b c d", "a-b-c d"]),
    ("at_least_words", {"n": 3}, ["one two three", "a-b-c d"], ["a b", "a . , ! b"]),
    (
        "keyword",
        {"word": "time", "n": 2},
        ["Time after time.", "time; TIME 'time'"],
        ["time", "times and timely time", "bedtime time"],
    ),
    (
        "avoids",
        {"forbidden": ["very", "good"]},
        ["every goods", "nice"],
        ["Very nice", "so-so, good!", "GOOD"],
    ),
    (
        "starts_with",
        {"word": "Today"},
        ["Today is", "today, we", ' "Today" it'],
        ["A day. Today", "Todays", "Yesterday"],
    ),
    (
        "ends_with",
        {"sentence": "That is all for now."},
        ["So. That is all for now.", "x THAT IS ALL FOR NOW. \n", '"x That is all for now."'],
        ["That is all for now. Bye.", "That is all for now", "all for now."],
    ),
    ("quoted", {}, ['"All of it."', ' "two\nlines" '], ['"Half" of it', 'of "it"', '"', "'x'"]),
    (
        "titled",
        {},
        ["<<A title>>\ntext", "text <<t>>", "<< T >>"],
        ["<A title>", "<<>>", "<< >>", "<<two\nlines>>", "title"],
    ),
    (
        "bullets",
        {"n": 2},
        ["* a\n* b", "Intro:\n - a\n\t* b\nEnd", "* a\n* b\n***"],
        ["* a", "* a\n* b\n* c", "a * b\nc * d", "**a**\n**b**", "*\n*", "-a\n-b", "1. a\n2. b"],
    ),
    (
        "paragraphs",
        {"n": 2},
        ["a\n***\nb", "a *** b", "***\na\n\nA\n***\nb\n***"],
        ["a\n\nb", "a\n***\nb\n***\nc", "a\n***\n***\nb", "***", "a\n***"],
    ),
    ("paragraphs", {"n": 1}, ["a", "***\na"], ["a\n***\nb"]),
    ("paragraphs", {"n": 3}, ["a***b***c"], ["a\n***\n***\nb", "a\n***\n \n***\nb"]),
    (
        "blanks",
        {"n": 2},
        ["Dear [name], in [your town]", "[a][b][c]"],
        ["Dear [name]", "[] []", "(name) (town)", "[name\n] [town"],
    ),
    (
        "postscript",
        {},
        ["Text.\nP.S. more", "p. s. small", "x\n\n**P.S.** bold"],
        ["P.S.", "Text with P.S. inside", "PS more", "P.P.S. more"],
    ),
]


def items(settings: Settings = SETTINGS) -> list[Item]:
    return list(Instructions().items(filler(), settings))


@pytest.mark.parametrize(
    ("kind", "parameters", "kept", "broken"), EXAMPLES, ids=[example[0] for example in EXAMPLES]
)
def test_each_check_tells_keeping_from_breaking(
    kind: str, parameters: dict[str, Any], kept: list[str], broken: list[str]
) -> None:
    instruction = {"kind": kind, **parameters}
    assert [answer for answer in kept if not is_kept(instruction, answer)] == []
    assert [answer for answer in broken if is_kept(instruction, answer)] == []


def test_every_kind_has_examples() -> None:
    assert {example[0] for example in EXAMPLES} == set(INSTRUCTIONS)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
@pytest.mark.parametrize("answer", ["", " ", "\n\n"])
def test_an_answer_without_text_keeps_nothing(kind: str, answer: str) -> None:
    instruction = {"kind": kind, **INSTRUCTIONS[kind].draw(generator(0))}
    assert not is_kept(instruction, answer)
    assert not is_kept(instruction, answer, loose=True)


def keep(instructions: list[dict[str, Any]]) -> str:
    """An answer of filler words that keeps all of these, as a person would write it."""
    wanted = {one["kind"]: one for one in instructions}
    lines = [" ".join(["stone"] * wanted.get("at_least_words", {"n": 3})["n"])]
    if one := wanted.get("keyword"):
        lines.append(" ".join([one["word"]] * one["n"]))
    if one := wanted.get("blanks"):
        lines.append(" ".join(["[stone]"] * one["n"]))
    if one := wanted.get("bullets"):
        lines += ["* stone"] * one["n"]
    if "titled" in wanted:
        lines.insert(0, "<<stone>>")
    if one := wanted.get("starts_with"):
        lines.insert(0, one["word"])
    if one := wanted.get("paragraphs"):
        lines += ["***", "stone"] * (one["n"] - 1)
    if one := wanted.get("ends_with"):
        lines.append(one["sentence"])
    if "postscript" in wanted:
        lines.append("P.S. stone")
    text = "\n".join(lines)
    text = text.upper() if "upper_case" in wanted else text
    text = text.lower() if "lower_case" in wanted else text
    return f'"{text}"' if "quoted" in wanted else text


def test_all_that_can_be_asked_together_can_be_kept_together() -> None:
    n_triples = 0
    for kinds in combinations(INSTRUCTIONS, 3):
        if any(conflict(a, b) for a, b in combinations(kinds, 2)):
            continue
        n_triples += 1
        for seed in range(8):
            rng = generator(seed, *kinds)
            chosen = [{"kind": kind, **INSTRUCTIONS[kind].draw(rng)} for kind in kinds]
            answer = keep(chosen)
            assert [one for one in chosen if not is_kept(one, answer)] == [], answer
    assert n_triples > 250


@given(st.integers(0, 10_000))
def test_drawn_instructions_never_conflict(seed: int) -> None:
    chosen = draw(generator(seed), 3)
    assert len(chosen) == 3
    for one, other in combinations(chosen, 2):
        assert not conflict(one["kind"], other["kind"])


def test_all_kinds_are_drawn() -> None:
    rng = generator("kinds")
    drawn = {one["kind"] for _ in range(200) for one in draw(rng, 3)}
    assert drawn == set(INSTRUCTIONS)


def test_conflicts_go_both_ways_and_name_kinds() -> None:
    for kind, instruction in INSTRUCTIONS.items():
        assert instruction.conflicts <= set(INSTRUCTIONS)
        assert conflict(kind, kind)
    assert conflict("lower_case", "upper_case")
    assert conflict("upper_case", "lower_case")
    assert not conflict("no_commas", "titled")


def test_what_one_instruction_asks_for_no_other_forbids() -> None:
    asked = " ".join((*wording.KEYWORDS, *wording.FIRST_WORDS, *wording.LAST_SENTENCES)).lower()
    assert not set(wording.words(asked)) & set(wording.FORBIDDEN)
    assert "," not in asked


# Properties ---------------------------------------------------------------------------------------

WORDS = st.lists(st.text("abcdexyz", min_size=1, max_size=6), min_size=1, max_size=30)


@given(WORDS, st.integers(1, 40))
def test_word_limits_meet(found: list[str], n: int) -> None:
    text = ", ".join(found)
    assert is_kept({"kind": "at_most_words", "n": n}, text) == (len(found) <= n)
    assert is_kept({"kind": "at_least_words", "n": n}, text) == (len(found) >= n)


@given(WORDS, st.integers(0, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_keyword_is_counted(found: list[str], times: int, n: int, random: Any) -> None:
    mixed = [*found, *["Work"] * times]
    random.shuffle(mixed)
    text = " ".join(mixed)
    assert is_kept({"kind": "keyword", "word": "work", "n": n}, text) == (times >= n)
    assert is_kept({"kind": "avoids", "forbidden": ["good", "work"]}, text) == (times == 0)


@given(WORDS, st.integers(1, 30))
def test_bullets_and_paragraphs_are_counted(found: list[str], n: int) -> None:
    right = len(found) == n
    assert is_kept({"kind": "bullets", "n": n}, "\n".join(f"* {word}" for word in found)) == right
    assert is_kept({"kind": "paragraphs", "n": n}, "\n***\n".join(found)) == right


@given(WORDS)
def test_form_is_kept_with_marks_and_broken_without(found: list[str]) -> None:
    text = " ".join(found)
    for kind, marked in [
        ("quoted", f'"{text}"'),
        ("titled", f"<<{text}>>"),
        ("blanks", f"[{text}]"),
        ("postscript", f"{text}\nP.S. {text}"),
        ("upper_case", text.upper()),
    ]:
        parameters = {"n": 1} if kind == "blanks" else {}
        assert is_kept({"kind": kind, **parameters}, marked)
        assert not is_kept({"kind": kind, **parameters}, text)
    assert is_kept({"kind": "lower_case"}, text)
    assert not is_kept({"kind": "lower_case"}, text + "A")
    assert is_kept({"kind": "no_commas"}, text)
    assert not is_kept({"kind": "no_commas"}, text + ",")


@given(st.text(), st.sampled_from(sorted(INSTRUCTIONS)), st.integers(0, 20))
def test_any_answer_can_be_checked_and_strict_implies_loose(
    answer: str, kind: str, seed: int
) -> None:
    instruction = {"kind": kind, **INSTRUCTIONS[kind].draw(np.random.default_rng(seed))}
    if is_kept(instruction, answer):
        assert is_kept(instruction, answer, loose=True)


def test_loose_variants_leave_out_lines_and_asterisks() -> None:
    assert set(loose_variants("Sure:\n*one* two\nBye.")) == {
        "Sure:\n*one* two\nBye.",
        "Sure:\none two\nBye.",
        "*one* two\nBye.",
        "one two\nBye.",
        "Sure:\n*one* two",
        "Sure:\none two",
        "*one* two",
        "one two",
    }


def test_loose_forgives_a_polite_first_line_and_bold_type() -> None:
    answer = "Sure, here you are:\n**today** it rains"
    for instruction in ({"kind": "lower_case"}, {"kind": "no_commas"}):
        assert not is_kept(instruction, answer)
        assert is_kept(instruction, answer, loose=True)
    assert not is_kept({"kind": "quoted"}, answer, loose=True)


# Items --------------------------------------------------------------------------------------------


def test_one_item_for_each_length_and_number() -> None:
    found = items()
    assert len(found) == len(LENGTHS) * PER_CELL
    assert len({item.id for item in found}) == len(found)
    assert [item.group for item in found[:2]] == ["no document", "1024 tokens"]


@pytest.mark.parametrize("encode", [blanks, byte_pairs])
def test_the_prompt_has_the_length_asked_for(encode: Callable[[str], list[int]]) -> None:
    for item in items(Settings(encode=encode, lengths=(400, 1024, 3000))):
        assert 0 <= item.facts["length"] - len(encode(item.prompt)) <= MOST_SPARE_TOKENS


@pytest.mark.model
def test_lengths_hold_with_the_default_model_s_tokenizer() -> None:
    encode = Text.from_folder(resolve_model(None)).encode
    for item in items(Settings(encode=encode, lengths=(512, 2048), per_cell=4)):
        assert 0 <= item.facts["length"] - len(encode(item.prompt)) <= MOST_SPARE_TOKENS


def test_rules_come_first_then_the_document_and_the_task_is_the_question() -> None:
    for item in items():
        rules, *document = item.context.split("\n\nText:\n\n")
        assert bool(document) == (item.facts["length"] > 0)
        assert rules.splitlines()[1:] == [
            f"{number}. {in_words(one)}"
            for number, one in enumerate(item.facts["instructions"], start=1)
        ]
        assert "{" not in rules
        assert item.question.endswith("Keep to all of the rules given at the beginning.")
        assert ("text" in item.question) == bool(document)


def test_lengths_share_their_instructions() -> None:
    found = items()
    for short, long in zip(found[0::2], found[1::2], strict=True):
        assert short.facts["instructions"] == long.facts["instructions"]
    assert len({str(item.facts["instructions"]) for item in found}) == PER_CELL


def test_items_depend_on_the_seed_and_their_own_cell_only() -> None:
    assert items() == items()
    alone = items(replace(SETTINGS, lengths=(1024,), per_cell=2))
    assert alone == [item for item in items() if item.id in ("1024-0", "1024-1")]
    other = items(replace(SETTINGS, seed=1))
    assert [item.facts for item in items()] != [item.facts for item in other]


def test_all_metrics_are_full_for_an_answer_that_keeps_all() -> None:
    for item in items():
        answer = Output(text=keep(item.facts["instructions"]))
        assert {m.statistics(item, answer) for m in Instructions.metrics} == {(1, 1)}


@pytest.mark.parametrize("length", [30, -5])
def test_a_length_without_room_is_told(length: int) -> None:
    with pytest.raises(DataError, match=f"{length} tokens is too short"):
        items(replace(SETTINGS, lengths=(length,)))
