"""Rows of one question each, as lm_eval's task `race` has them: an article with its questions."""

from __future__ import annotations

from typing import Any

import vesicle.evaluation.lm_eval  # noqa: F401 - registers the model, so that lm_eval knows it

LEVEL = "high"
"""Of the stock task's questions."""


def stock_rows(rows: Any) -> Any:
    """Group questions by article; the stock task shows all but the last one with their answers.

    Args:
        rows: A `datasets.Dataset` with the fields article, question, options, answer and level.
    """
    from datasets import Dataset

    articles: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["level"] == LEVEL:
            question = {
                "question": row["question"],
                "options": row["options"],
                "answer": "ABCD"[row["answer"]],
            }
            articles.setdefault(row["article"], []).append(question)
    return Dataset.from_list(
        [{"article": text, "problems": repr(asked)} for text, asked in articles.items()]
    )
