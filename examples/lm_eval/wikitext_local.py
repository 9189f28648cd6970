"""Rows of one article each, as lm_eval's task `wikitext` has them."""

from __future__ import annotations

from typing import Any

import vesicle.evaluation.lm_eval  # noqa: F401 - registers the model, so that lm_eval knows it


def stock_rows(rows: Any) -> Any:
    """Give the text the stock task's name for it.

    Args:
        rows: A `datasets.Dataset` with the field text.
    """
    return rows.rename_column("text", "page")
