"""LongBench: 21 data sets with long contexts in English, Chinese and code, each with its metric.

Bai et al. 2024, https://aclanthology.org/2024.acl-long.172. A row names its data set, which sets
the prompt, the most new tokens and the metric. Instructions are put in our own words; what metrics
rely on ("Paragraph 1", "unanswerable") is as published, and so are the parts' order and the limits.
Few-shot and code data sets are plain completions, as in the original; all others are chats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from vesicle.tasks.base import Row, Settings, Task, no_text
from vesicle.tasks.hub import HubArchive
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.longbench import LongBenchScore


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a data set asks.

    Attributes:
        before: In front of the row's context.
        after: Behind it; `{input}` is the row's own question.
        tokens: Most new tokens.
        plain: Whether it is completed rather than put into a chat.
        stop: What ends an answer.
    """

    before: str
    after: str
    tokens: int
    plain: bool = False
    stop: tuple[str, ...] = ()


_PASSAGES = Form(
    before="Answer the question from the passages below. Give only the answer.\n\nPassages:\n",
    after=(
        "\n\nAnswer the question from the passages above. Give only the answer.\n\n"
        "Question: {input}\nAnswer:"
    ),
    tokens=32,
)
_QASPER = (
    "Answer the question about the article in as few words as you can. If the article does not "
    'answer it, write "unanswerable". If it is a yes/no question, answer "yes", "no" or '
    '"unanswerable". Do not explain.'
)
_STORY = "Answer the question about the story in as few words as you can. Do not explain."

FORMS = {
    "narrativeqa": Form(
        before=f"{_STORY}\n\nStory: ",
        after=f"\n\n{_STORY}\n\nQuestion: {{input}}\n\nAnswer:",
        tokens=128,
    ),
    "qasper": Form(
        before=f"{_QASPER}\n\nArticle: ",
        after=f"\n\n{_QASPER}\n\nQuestion: {{input}}\n\nAnswer:",
        tokens=128,
    ),
    "multifieldqa_en": Form(
        before="Read the text and answer briefly.\n\n",
        after=(
            "\n\nAnswer the question from the text above. Give only the answer.\n\n"
            "Question: {input}\nAnswer:"
        ),
        tokens=64,
    ),
    "multifieldqa_zh": Form(
        before="请阅读下文，并用中文简短作答：\n\n",
        after="\n\n请根据上文回答问题，只写答案。\n\n问题：{input}\n回答：",
        tokens=64,
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "dureader": Form(
        before="请根据文章回答问题。\n\n文章：",
        after="\n\n请根据上面的文章回答问题。\n\n问题：{input}\n回答：",
        tokens=128,
    ),
    "gov_report": Form(
        before="Write a one-page summary of this government report.\n\nReport:\n",
        after="\n\nWrite a one-page summary of the report.\n\nSummary:",
        tokens=512,
    ),
    "qmsum": Form(
        before="Answer a query about a meeting in one or more sentences.\n\nTranscript:\n",
        after=(
            "\n\nAnswer the query about the meeting in one or more sentences.\n\n"
            "Query: {input}\nAnswer:"
        ),
        tokens=512,
    ),
    "multi_news": Form(
        before="Write a one-page summary of these news articles.\n\nNews:\n",
        after="\n\nWrite a one-page summary of all the news.\n\nSummary:",
        tokens=512,
    ),
    "vcsum": Form(
        before="请总结下面的会议记录。\n会议记录：\n",
        after="\n\n会议总结：",
        tokens=512,
    ),
    "trec": Form(
        before="Determine the type of the last question. Here are examples.\n\n",
        after="\n{input}",
        tokens=64,
        plain=True,
        stop=("\n",),
    ),
    "triviaqa": Form(
        before="Answer the question from the passage. Give only the answer. Examples:\n\n",
        after="\n\n{input}",
        tokens=32,
        plain=True,
        stop=("\n",),
    ),
    "samsum": Form(
        before="Summarize the dialogue in a few short sentences. Examples:\n\n",
        after="\n\n{input}",
        tokens=128,
        plain=True,
        stop=("\n",),
    ),
    "lsht": Form(
        before="请判断最后一条新闻的类别。例子如下。\n\n",
        after="\n{input}",
        tokens=64,
        plain=True,
        stop=("\n",),
    ),
    "passage_count": Form(
        before=(
            "Below are paragraphs from Wikipedia, some of them more than once. Count how many "
            "different paragraphs there are.\n\n"
        ),
        after=(
            "\n\nGive the number of different paragraphs, repeats not counted. Write only the "
            "number, such as 1, 2, 3.\n\nThe final answer is:"
        ),
        tokens=32,
    ),
    "passage_retrieval_en": Form(
        before="Here are 30 paragraphs from Wikipedia, and a summary of one of them.\n\n",
        after=(
            "\n\nThis is the summary.\n\n{input}\n\nWhich paragraph does it summarize? Answer "
            'in the form "Paragraph 1", "Paragraph 2".\n\nThe answer is:'
        ),
        tokens=32,
    ),
    "passage_retrieval_zh": Form(
        before="下面有若干段落，以及其中一段的摘要。\n\n",
        after=(
            "\n\n摘要如下。\n\n{input}\n\n这是哪一段的摘要？请按“段落1”、“段落2”的格式作答。\n\n"
            "答案是："
        ),
        tokens=32,
    ),
    "lcc": Form(
        before="Complete this code.\n",
        after="Next line of code:\n",
        tokens=64,
        plain=True,
    ),
    "repobench-p": Form(
        before="Complete this code.\n",
        after="{input}Next line of code:\n",
        tokens=64,
        plain=True,
    ),
}
"""The data sets in the order of the paper's table."""


class LongBench(Task):
    """LongBench, all of its data sets or those that a local folder has."""

    name = "longbench"
    title = "LongBench"
    kind = "generate"
    style = "chat"
    metrics = (LongBenchScore(),)
    folder = "longbench"
    hub = HubArchive(
        path="zai-org/LongBench",
        file="data.zip",
        members=tuple(f"data/{name}.jsonl" for name in FORMS),
    )
    splits = ("test",)
    default_split = "test"
    fields: ClassVar[Mapping[str, type]] = {
        "input": str,
        "context": str,
        "answers": list,
        "dataset": str,
    }
    optional = ("id", "_id", "all_classes")

    def check(self, row: Row) -> str:
        """The data set must be known, and there must be what its metric compares with."""
        name, classes = row["dataset"], row.get("all_classes")
        if name not in FORMS:
            return f"is of the data set {name!r}; allowed: {', '.join(FORMS)}"
        known = classes is None or isinstance(classes, list)
        if not known or not all(isinstance(one, str) for one in classes or ()):
            return "field 'all_classes' is no list of texts; allowed: a list of texts, or null"
        return no_text(row, "answers")

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item a row; `group` is its data set, `style` how its prompt is put."""
        for row in rows:
            name = row["dataset"]
            form = FORMS[name]
            yield Item(
                id=str(row.get("_id", row["id"])),
                context=form.before + row["context"],
                question=form.after.replace("{input}", row["input"]),
                references=tuple(row["answers"]),
                max_new_tokens=form.tokens,
                stop=form.stop,
                group=name,
                style="plain" if form.plain else "chat",
                facts={"dataset": name, "all_classes": row.get("all_classes")},
            )
