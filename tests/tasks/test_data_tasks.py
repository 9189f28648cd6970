"""Prompts of the tasks that come from data sets, word by word, and on their pages."""

import re
from pathlib import Path

import pytest

from tests.tasks.rows import HUB, LOCAL, SETTINGS
from vesicle.tasks.longbench import FORMS
from vesicle.tasks.metrics.longbench import DATA_SETS, FIRST_LINE
from vesicle.tasks.race import asked
from vesicle.tasks.registry import find_task
from vesicle.tasks.wmt14 import PAIRS
from vesicle.training.data import joined

DOCS = Path(__file__).parents[2] / "docs" / "tasks"
PAGES = {"wikitext2": "wikitext", "wikitext103": "wikitext"}


def items(name, rows=None):
    numbered = ({"id": str(n), **row} for n, row in enumerate(rows or LOCAL[name]))
    return list(find_task(name).items(numbered, SETTINGS))


def page(name):
    return (DOCS / f"{PAGES.get(name, name)}.md").read_text(encoding="utf-8")


def test_squad():
    item = items("squad")[0]
    assert item.context.endswith("\n\nPassage: The harbour froze in 1709.\n\n")
    assert item.question == "Question: When did it freeze?\nAnswer:"
    assert item.references == ("1709", "in 1709")
    assert (item.stop, item.max_new_tokens) == (("\n",), 32)


def test_race():
    item = items("race")[0]
    assert item.context == "Article: Ann reads.\n\n"
    assert item.question == "Ann"
    assert item.choices == (" runs", " eats", " reads", " sings")
    assert (item.answer, item.group) == (2, "high")


@pytest.mark.parametrize(
    ("question", "end"),
    [
        ("Who reads?", None),
        ("The best title is  _  .", "The best title is"),
        ("We learn that _", "We learn that"),
        ("Where did she go ____ ?", "Where did she go"),
        ("  _  .", None),
        ("The  _  is red.", None),
        ("The _ is red, so   _  .", None),
        ('The word is "  _  ".', None),
    ],
)
def test_a_gap_at_the_end_is_what_an_option_fills(question, end):
    assert asked(question) == (end or f"Question: {question.strip()}\nAnswer:")


def test_cnn_dailymail():
    item = items("cnn_dailymail")[0]
    assert item.prompt == "Article:\nIt rained.\n\nSummarize the article in three sentences."
    assert item.references == ("Rain .\nMore .",)
    assert (item.stop, item.max_new_tokens) == ((), 96)


def test_arxiv():
    item = items("arxiv")[0]
    assert item.context == "Article:\nwe test tea ."
    assert item.question == "\n\nWrite the abstract of the article in one paragraph."
    assert (item.references, item.max_new_tokens) == (("tea is warm .",), 200)


def test_wmt14():
    item = items("wmt14_en_de")[0]
    assert item.context.startswith("English: The house is small.\nGerman: Das Haus ist klein.\n\n")
    assert item.context.count("English: ") == item.context.count("\n\n") == len(PAIRS) == 3
    assert item.question == "English: A house.\nGerman:"
    assert (item.references, item.stop) == (("Ein Haus.",), ("\n",))
    assert item.max_new_tokens == 96


def test_wikitext_restores_the_lines_of_one_blank():
    task = find_task("wikitext2")
    rows = [row for hub in HUB["wikitext2"] for row in task.from_hub(hub)]
    assert [item.context for item in items("wikitext2", rows)] == [
        " \n = Tea = \n \n A drink . \n",
    ]


@pytest.mark.parametrize(
    ("texts", "documents"),
    [
        (["a\n", "b\n"], ["a\nb\n"]),
        ([" \n", "a\n", "", "b\n"], [" \na\nb\n"]),
        (["a\n"], ["a\n"]),
        (["a", "b\n"], ["a", "b\n"]),
        (["a", " ", ""], ["a"]),
        ([" \n"], []),
    ],
)
def test_pieces_of_one_document_are_joined(texts, documents):
    assert joined(texts) == documents


def test_longbench_has_the_published_data_sets_and_limits():
    assert tuple(FORMS) == DATA_SETS
    plain = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, form in FORMS.items() if form.plain} == plain
    assert {name for name, form in FORMS.items() if form.stop} == FIRST_LINE
    limits = {32: 7, 64: 6, 128: 4, 512: 4}
    assert {n: sum(f.tokens == n for f in FORMS.values()) for n in limits} == limits


def test_longbench_takes_text_as_it_is():
    item = items("longbench")[0]
    assert item.context.endswith("Do not explain.\n\nArticle: Bob sings.")
    assert item.question.endswith("\n\nQuestion: Who {sings}?\n\nAnswer:")
    assert (item.id, item.group, item.max_new_tokens) == ("abc", "qasper", 128)
    assert item.style == "chat"
    assert item.facts == {"dataset": "qasper", "all_classes": None}


def test_longbench_keeps_the_words_that_metrics_look_for():
    forms = {name: form.before + form.after for name, form in FORMS.items()}
    assert '"unanswerable"' in forms["qasper"]
    assert '"Paragraph 1"' in forms["passage_retrieval_en"]
    assert "“段落1”" in forms["passage_retrieval_zh"]
    asks = {name for name, form in FORMS.items() if "{input}" in form.after}
    without = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
    assert set(FORMS) - asks == without
    assert all("{input}" not in form.before for form in FORMS.values())


# Pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squad", "race", "cnn_dailymail", "arxiv", "wmt14_en_de"])
def test_the_page_shows_the_prompt_of_the_first_sample(name):
    from vesicle.tasks.sources import load_items

    item = load_items(find_task(name), data="sample", split=None, settings=SETTINGS, limit=None)
    shown = re.search(r"```text\n(.*?)```", page(name), re.DOTALL)[1].rstrip("\n")
    begin, _, end = shown.partition(" [...] ")
    prompt = item.items[0].prompt
    assert prompt.startswith(begin)
    assert prompt.endswith(end)


@pytest.mark.parametrize("name", HUB)
def test_the_page_names_what_can_be_chosen(name):
    task, text = find_task(name), page(name)
    names = [task.hub.path, *task.splits, *task.fields, *(m.name for m in task.metrics)]
    names += [task.hub.configuration] if task.hub.configuration else []
    assert [n for n in names if f"`{n}`" not in text] == []
    limit = "" if task.kind != "generate" or name == "longbench" else "Most new tokens"
    assert limit in text


def test_the_page_of_longbench_shows_every_prompt():
    text = page("longbench")
    for name, form in FORMS.items():
        assert f"`{name}`" in text
        for part in filter(None, (form.before + "{context}" + form.after).split("\n")):
            assert part.strip() in text, name


def test_local_data_is_documented_field_by_field():
    text = (DOCS / "local_data.md").read_text(encoding="utf-8")
    for name in LOCAL:
        task = find_task(name)
        assert f"`{task.folder}/`" in text
        row = next(
            line for line in text.splitlines() if line.startswith("|") and task.folder in line
        )
        assert [f for f in task.fields if f"`{f}`" not in row] == []
