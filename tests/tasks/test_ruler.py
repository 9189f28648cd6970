import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.tasks.test_haystack import blanks, byte_pairs, filler
from vesicle.errors import DataError
from vesicle.models import Text, resolve_model
from vesicle.tasks.base import Settings
from vesicle.tasks.haystack import MOST_SPARE_TOKENS, Haystack
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.retrieval import RULER_SUBTASKS
from vesicle.tasks.ruler import (
    _ADJECTIVES,
    _NOUNS,
    LENGTHS,
    PER_CELL,
    SUBTASKS,
    Room,
    Ruler,
    frequent_words,
)

SETTINGS = Settings(encode=blanks)


def items(settings: Settings = SETTINGS) -> list[Item]:
    return list(Ruler().items(filler(), settings))


def of(subtask: str, **changes: object) -> list[Item]:
    """The items of a sub-task, three of each length."""
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    return [item for item in items(settings) if item.group == subtask]


def test_one_item_for_each_sub_task_length_and_number() -> None:
    found = items()
    assert len(found) == len(LENGTHS) * 7 * PER_CELL
    assert len({item.id for item in found}) == len(found)
    assert tuple(SUBTASKS) == RULER_SUBTASKS
    assert tuple(dict.fromkeys(item.group for item in found)) == RULER_SUBTASKS
    assert all(0 < item.max_new_tokens <= 80 for item in found)


@pytest.mark.parametrize("encode", [blanks, byte_pairs])
def test_the_prompt_has_the_length_asked_for(encode: Callable[[str], list[int]]) -> None:
    for item in items(Settings(encode=encode, lengths=(1000, 1024, 4096))):
        spare = item.facts["length"] - len(encode(item.prompt))
        assert 0 <= spare <= MOST_SPARE_TOKENS, item.id


@pytest.mark.model
def test_lengths_hold_with_the_default_model_s_tokenizer() -> None:
    encode = Text.from_folder(resolve_model(None)).encode
    for item in items(Settings(encode=encode, lengths=(512, 1024, 4096), per_cell=1)):
        spare = item.facts["length"] - len(encode(item.prompt))
        assert 0 <= spare <= MOST_SPARE_TOKENS, item.id


def test_items_depend_on_the_seed_and_their_own_cell_only() -> None:
    assert items() == items()
    alone = items(replace(SETTINGS, lengths=(2048,), per_cell=1))
    assert alone == [item for item in items() if item.id.endswith("-2048-0")]
    other = items(replace(SETTINGS, seed=1))
    assert all(a.references != b.references for a, b in zip(items(), other, strict=True))


def test_answers_in_the_question_s_words_score_full_marks_and_a_part_scores_a_part() -> None:
    (metric,) = Ruler.metrics
    for item in items():
        index = RULER_SUBTASKS.index(item.group)
        right = metric.statistics(item, Output(text=" " + ", ".join(item.references).upper()))
        assert right[2 * index : 2 * index + 2] == (1, 1)
        part = metric.statistics(item, Output(text=item.references[0]))
        assert part[2 * index] == pytest.approx(1 / len(item.references))


def secrets(item: Item) -> list[tuple[str, str]]:
    """Names and numbers hidden in the context."""
    return re.findall(r"One of the secret numbers for ([\w ]+) is (\d{7})\.", item.context)


@pytest.mark.parametrize(
    ("subtask", "names", "numbers", "asked"),
    [
        ("single needle", 1, 1, 1),
        ("multi-key", 4, 4, 1),
        ("multi-value", 1, 4, 4),
        ("multi-query", 4, 4, 4),
    ],
)
def test_needles_are_as_many_as_the_sub_task_has(
    subtask: str, names: int, numbers: int, asked: int
) -> None:
    for item in of(subtask):
        found = secrets(item)
        assert len(found) == len({number for _, number in found}) == numbers
        assert len({name for name, _ in found}) == names
        wanted = {number for name, number in found if name in item.question}
        assert wanted == set(item.references)
        assert len(item.references) == asked
        assert all(name in item.opening for name, number in found if number in wanted)


def test_only_the_single_needle_and_variables_lie_in_noise() -> None:
    for item in items():
        assert ("The river is wide." in item.context) == (
            item.group in ("single needle", "variable tracking")
        )


def test_depths_are_where_needles_lie() -> None:
    for item in of("single needle", depths=(0.0,)):
        assert item.context.split("\n\n")[1].startswith("One of the secret numbers")
    for item in of("multi-value", depths=(1.0,)):
        assert item.context.endswith(item.context.rsplit("One of", 1)[1])
        assert item.context.count(". One of the secret numbers") == 4
        assert re.search(r"(One of the secret numbers for [\w ]+ is \d+\. ?){4}$", item.context)


@pytest.mark.parametrize("length", [500, 2048])
def test_variables_form_one_chain_in_order(length: int) -> None:
    for item in of("variable tracking", lengths=(length,)):
        text = item.context.rsplit("\n\n", 1)[1]
        (value,) = re.findall(r"\d{5}", item.question)
        lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
        assert lines[0] == (item.references[0], value)
        assert lines[1:] == list(zip(item.references[1:], item.references[:-1], strict=True))
        assert len(lines) == len(set(item.references)) == 5
        assert item.context.count("Question") == (1 if length >= 1024 else 0)
        assert item.context.count(value) == 1


@pytest.mark.parametrize(("length", "often", "seldom"), [(600, 6, 1), (2048, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_ten_most_common(length: int, often: int, seldom: int) -> None:
    for item in of("common words", lengths=(length,)):
        counts = Counter(re.findall(r"\d+\. ([a-z-]+)", item.context.rsplit("\n\n", 1)[1]))
        assert {word for word, count in counts.items() if count == often} == set(item.references)
        assert {count for word, count in counts.items() if word not in item.references} == {seldom}
        assert len(item.references) == 10
        example = item.context.rsplit("Below is", 1)[0]
        assert ("Answer:" in example) == (length >= 1024)
        assert not set(item.references) & set(example.split())


def test_a_long_list_of_words_does_not_run_out() -> None:
    (item,) = of("common words", lengths=(40_000,), per_cell=1)
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", item.context.rsplit("\n\n", 1)[1]))
    assert len(counts) > len(_NOUNS)
    assert set(counts.values()) == {30, 3}


def test_word_lists_have_no_word_twice() -> None:
    assert len(set(_NOUNS)) == len(_NOUNS)
    assert len(set(_ADJECTIVES)) == len(_ADJECTIVES)


@pytest.mark.parametrize("length", [200, 512, 5000])
def test_frequent_words_are_the_three_most_frequent(length: int) -> None:
    settings = replace(SETTINGS, lengths=(length,))
    room = [item for item in items(settings) if item.group == "frequent words"]
    for item in room:
        counts = Counter(item.context.split("\n\n", 1)[1].split())
        ranked = counts.most_common(5)
        assert ranked[0][0] == "....."
        assert [word for word, _ in ranked[1:4]] == list(item.references)
        assert ranked[3][1] > ranked[4][1]
        # Zeta(2): ranks 2 and 3 in the ratio 9 to 4.
        assert ranked[1][1] / ranked[2][1] == pytest.approx(9 / 4, rel=0.1)


def test_a_length_without_room_is_told() -> None:
    with pytest.raises(DataError, match="60 tokens is too short"):
        items(replace(SETTINGS, lengths=(60,)))


def test_frequent_words_take_enough_words_to_tell_ranks_apart() -> None:
    hay = Haystack(filler())
    room = Room(seed=(0,), n_tokens=100, encode=blanks, essays=hay, noise=hay, depths=())
    with pytest.raises(DataError, match="100 tokens is too short"):
        frequent_words(room)
    for seed in range(5):
        ask = frequent_words(replace(room, seed=(seed,), n_tokens=150))
        counts = [
            count for _, count in Counter(ask.context.split("\n\n", 1)[1].split()).most_common(5)
        ]
        assert counts == sorted(set(counts), reverse=True)
