from dataclasses import replace

import pytest

from tests.tasks.test_haystack import blanks, filler
from vesicle.errors import DataError
from vesicle.tasks.base import Settings
from vesicle.tasks.briefing import LENGTHS, PER_CELL, Briefing
from vesicle.tasks.haystack import MOST_SPARE_TOKENS
from vesicle.tasks.items import Item, Output

SETTINGS = Settings(encode=blanks)


def items(settings: Settings = SETTINGS) -> list[Item]:
    return list(Briefing().items(filler(), settings))


def test_lengths_and_numbers() -> None:
    found = items()
    assert len(found) == len({item.id for item in found}) == len(LENGTHS) * PER_CELL
    for item in found:
        assert 0 <= item.facts["length"] - len(blanks(item.prompt)) <= MOST_SPARE_TOKENS
    chosen = items(replace(SETTINGS, lengths=(100,), per_cell=3))
    assert [item.facts["asked"] for item in chosen] == ["name", "code", "office"]


def test_what_is_asked_stands_in_the_preamble_and_nowhere_else() -> None:
    for item in items():
        (answer,) = item.references
        assert item.context.startswith(item.preamble)
        assert item.prompt.count(answer) == item.preamble.count(answer) == 1
        assert item.preamble.count("\n- ") == 3
        assert "Question" not in item.context


def test_the_opening_leads_to_the_answer() -> None:
    """As the preamble has it, but for who speaks."""
    for item in items(replace(SETTINGS, lengths=(100,), per_cell=6)):
        (line,) = (line for line in item.preamble.split("\n") if item.references[0] in line)
        last_words = item.opening.split()[-2:]
        assert (
            f"{' '.join(last_words)} {item.references[0]}".split()[1:]
            == line.rstrip(".").split()[-len(item.references[0].split()) - 1 :]
        )


def test_one_number_is_the_same_at_all_lengths_and_depends_on_the_seed() -> None:
    found = items()
    by_number = [found[i : i + len(LENGTHS)] for i in range(0, len(found), len(LENGTHS))]
    for same in by_number:
        assert len({(item.preamble, item.question, item.references) for item in same}) == 1
    assert len({same[0].preamble for same in by_number}) > PER_CELL // 2
    assert items() == found
    alone = items(replace(SETTINGS, lengths=(LENGTHS[1],)))
    assert alone == [item for item in found if item.facts["length"] == LENGTHS[1]]
    assert items(replace(SETTINGS, seed=1)) != found


def test_the_metric_finds_it() -> None:
    item, metric = items()[1], Briefing.metrics[0]
    assert metric.statistics(item, Output(text=f" {item.references[0]}.")) == (1, 1)
    assert metric.statistics(item, Output(text=" somebody else.")) == (0, 1)


def test_a_length_below_the_briefing_is_told() -> None:
    with pytest.raises(DataError, match="20 tokens is too short"):
        items(replace(SETTINGS, lengths=(20,)))
