import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.tasks.test_haystack import blanks, byte_pairs, filler
from vesicle.errors import DataError
from vesicle.models import Text, resolve_model
from vesicle.tasks.base import Settings
from vesicle.tasks.haystack import MOST_SPARE_TOKENS, sentences_of
from vesicle.tasks.items import Item, Output
from vesicle.tasks.needle import DEPTHS, LENGTHS, PER_CELL, Needle

SETTINGS = Settings(encode=blanks)


def items(settings: Settings = SETTINGS) -> list[Item]:
    return list(Needle().items(filler(), settings))


def needle_of(item: Item) -> str:
    """The sentence that is hidden in the item."""
    opening = item.opening.strip()
    return f"{opening[0].upper()}{opening[1:]} {item.facts['key']}."


def test_one_item_for_each_cell_and_number() -> None:
    found = items()
    assert len(found) == len(LENGTHS) * len(DEPTHS) * PER_CELL
    assert len({item.id for item in found}) == len(found)
    assert len({item.group for item in found}) == len(LENGTHS) * len(DEPTHS)
    assert found[2].group == "512 tokens, depth 0.5"
    assert found[2].facts == {"length": 512, "depth": 0.5, "key": found[2].references[0]}


def test_settings_choose_cells() -> None:
    chosen = items(replace(SETTINGS, lengths=(100, 300), depths=(0.2,), per_cell=3))
    assert [item.group for item in chosen] == [
        "100 tokens, depth 0.2",
        "300 tokens, depth 0.2",
    ] * 3


@pytest.mark.parametrize("encode", [blanks, byte_pairs])
def test_the_prompt_has_the_length_asked_for(encode: Callable[[str], list[int]]) -> None:
    for item in items(replace(SETTINGS, encode=encode)):
        spare = item.facts["length"] - len(encode(item.prompt))
        assert 0 <= spare <= MOST_SPARE_TOKENS


def test_the_needle_is_there_once_between_sentences_and_the_key_nowhere_else() -> None:
    for item in items():
        needle = needle_of(item)
        assert item.prompt.count(needle) == item.context.count(needle) == 1
        assert item.prompt.count(item.facts["key"]) == 1
        text = item.context.split("\n\n", 1)[1]
        assert needle in sentences_of(text)


def test_the_needle_lies_at_the_depth_asked_for() -> None:
    depths = (0.0, 0.1, 0.35, 0.5, 0.9, 1.0)
    for item in items(replace(SETTINGS, lengths=(300, 2000), depths=depths)):
        before, after = (
            len(part.split()) for part in item.context.split("\n\n", 1)[1].split(needle_of(item))
        )
        # The nearest boundary is at most half a sentence away; the longest one here has 30 words.
        assert abs(before - item.facts["depth"] * (before + after)) <= 15
        if item.facts["depth"] in (0.0, 1.0):
            assert min(before, after) == 0


def test_the_question_comes_after_the_context() -> None:
    item = items()[0]
    thing = item.opening.removeprefix(" The pass key of the ").removesuffix(" is")
    assert item.question == f"\n\nQuestion: What is the pass key of the {thing}?\nAnswer:"
    assert "Question" not in item.context
    assert not item.prompt.endswith(" ")


def test_the_main_metric_finds_the_key() -> None:
    item, metric = items()[0], Needle.metrics[0]
    assert metric.statistics(item, Output(text=f" {item.facts['key']}.")) == (1, 1)
    assert metric.statistics(item, Output(text=" 1.")) == (0, 1)


def test_an_item_depends_on_seed_and_its_own_cell_only() -> None:
    assert items() == items()
    alone = items(replace(SETTINGS, lengths=(1024,), depths=(0.75,)))
    assert alone == [item for item in items() if item.group == "1024 tokens, depth 0.75"]
    other = items(replace(SETTINGS, seed=1))
    assert all(a.references != b.references for a, b in zip(items(), other, strict=True))
    assert len({item.references for item in items()}) == len(items())


def test_items_are_the_same_in_other_processes() -> None:
    code = (
        "from tests.tasks.test_needle import items;"
        "print(*(item.context for item in items()), sep='\\n', end='')"
    )
    for hash_seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path), "PYTHONUTF8": "1"},
        )
        assert found.stdout == "\n".join(item.context for item in items())


def test_a_key_that_the_filler_has_is_not_taken() -> None:
    settings = replace(SETTINGS, lengths=(100,), depths=(0.5,), per_cell=1)
    key = items(settings)[0].facts["key"]
    rows = [*filler(), {"text": f"There were {key} people."}]
    assert next(iter(Needle().items(rows, settings))).facts["key"] != key


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lengths": (20,)}, "20 tokens is too short"), ({"depths": (2.0,)}, "depth 2")],
)
def test_bad_settings_are_told(change: dict[str, tuple[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        items(replace(SETTINGS, **change))  # type: ignore[arg-type]


@pytest.mark.model
def test_lengths_hold_with_the_default_model_s_tokenizer() -> None:
    encode = Text.from_folder(resolve_model(None)).encode
    for item in items(Settings(encode=encode)):
        assert 0 <= item.facts["length"] - len(encode(item.prompt)) <= MOST_SPARE_TOKENS
