"""Figures and tables from a Result alone."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.evaluation.test_regret_results import make_row, result
from vesicle.evaluation.plots import MissingPlots
from vesicle.evaluation.text_plots import plot, save_plot
from vesicle.evaluation.text_results import Result
from vesicle.evaluation.text_table import COLUMNS, markdown, rich_table

__all__ = ["result"]  # a fixture


def with_rises(result: Result, rises: tuple[float, ...]) -> Result:
    rows = [
        replace(make_row(method, budget), delta_nats=rise, delta_low_nats=-rise, delta_high_nats=9)
        for method in ("learnt", "random")
        for budget, rise in zip((0.9, 0.8, 0.7), rises, strict=True)
    ]
    return replace(result, rows=rows)


@pytest.mark.parametrize(
    ("rises", "scale"), [((0.01, 0.02, 0.1), "linear"), ((0.01, 0.1, 2.0), "log")]
)
def test_axis_fits_the_rises(result: Result, rises: tuple[float, ...], scale: str):
    pytest.importorskip("matplotlib")
    axes = plot(with_rises(result, rises)).axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_xlim()[0] > axes.get_xlim()[1]


def test_oracle_has_its_own_panel(result: Result):
    pytest.importorskip("matplotlib")
    assert len(plot(result).axes) == 1
    row = replace(make_row("oracle"), subset="oracle")
    assert len(plot(replace(result, rows=[*result.rows, row])).axes) == 2


def test_nothing_to_draw(result: Result, tmp_path: Path):
    pytest.importorskip("matplotlib")
    save_plot(replace(result, rows=[make_row("dense", 1.0)]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_without_matplotlib(result: Result, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPlots, match=r"pip install 'vesicle\[plot\]'"):
        plot(result)


def test_tables_say_the_same(result: Result):
    console = Console(width=200, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(rich_table(result))
    terminal, page = capture.get(), markdown(result)
    for text in ("uniform", "+0.5000", *COLUMNS):
        assert text in terminal
        assert text in page
    assert "- random at 0.3 (all): too low" in page
    assert "|" + " --- |" * len(COLUMNS) in page
