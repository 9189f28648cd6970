"""Tables, plots and the results page from small records made by hand."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vesicle.errors import VesicleError
from vesicle.evaluation.report import page as results_page
from vesicle.evaluation.report import plots as task_plots
from vesicle.evaluation.report import table as task_table
from vesicle.evaluation.report.results import Score, TaskResult, TaskRow
from vesicle.evaluation.run import tasks as evaluate_tasks
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.figures import MissingPlots

F1 = {"name": "f1", "title": "F1", "percent": True, "higher_is_better": True, "signature": "v1.1"}
EXACT = {**F1, "name": "exact", "title": "EM", "signature": ""}
PERPLEXITY = {
    "name": "perplexity",
    "title": "Perplexity",
    "percent": False,
    "higher_is_better": False,
    "signature": "",
}
SQUAD = {
    "name": "squad",
    "title": "SQuAD v1.1",
    "kind": "generate",
    "style": "chat",
    "split": "validation",
    "data": "squad, validation",
    "sha256": "0123456789abcdef",
    "n_items": 40,
    "prompt_tokens": 12345,
    "shortened": 0,
    "metrics": [F1, EXACT],
}
WIKITEXT = {
    **SQUAD,
    "name": "wikitext2",
    "title": "WikiText-2",
    "kind": "loss",
    "data": "wikitext2, test",
    "shortened": 3,
    "metrics": [PERPLEXITY],
}
NO_INTERVALS: dict[str, None] = dict.fromkeys(("low", "high", "delta_low", "delta_high"))


def make_score(value: float, dense: float, **fields: Any) -> Score:
    delta = value - dense
    intervals = {"low": value - 2, "high": value + 3}
    intervals |= {"delta_low": delta - 1, "delta_high": delta + 1.5}
    return Score(**{"value": value, "delta": delta, **intervals, **fields})


def beaten_by(learnt: float, low: float | None, high: float | None) -> dict[str, Any]:
    """How the learnt modulator stands against a row."""
    return {"learnt": learnt, "learnt_low": low, "learnt_high": high}


def make_row(
    task: dict[str, Any], method: str, budget: float, value: float, **fields: Any
) -> TaskRow:
    """A row whose main metric is `value`; the dense model has 50 everywhere."""
    main, *others = task["metrics"]
    cost = 1.0 if method == "dense" else round(budget + 0.001, 4)
    ratio = dict.fromkeys(("flops", "weight_bytes", "kv_bytes_read", "bytes_read"), cost)
    given = {"kv_bytes_held": 1.0}
    if method.startswith("kvpress:"):
        ratio, given = dict.fromkeys(ratio, 1.0), {"kv_bytes_held": cost}
    return TaskRow(
        task=task["name"],
        method=method,
        budget=budget,
        n_items=task["n_items"],
        scores={
            main["name"]: make_score(value, 50, **fields),
            **{m["name"]: make_score(31.25, 31.25) for m in others},
        },
        executed={},
        dense={},
        ratio={**ratio, **given},
        measured={"seconds": {"prefill": 12.4, "decode": 3.6}, "peak_bytes": 1},
        items={},
    )


def make_result(
    *rows: TaskRow, tasks: tuple[dict[str, Any], ...] = (SQUAD,), **config: Any
) -> TaskResult:
    """A run with these rows behind the dense ones."""
    asked = TaskConfig(
        tasks=tuple(task["name"] for task in tasks),
        methods=("learnt",),
        budgets=(1.0, 0.8),
    )
    dense = [make_row(task, "dense", 1.0, 50) for task in tasks]
    return TaskResult(
        config={**asked.to_dict(), **config},
        config_hash="0",
        seed=0,
        versions={"vesicle": "0.1.0", "torch": "2.9"},
        hardware={"cpu": "Some CPU", "cores": 4, "threads": 2},
        model={"name": "Tiny", "through": "engine", "weights": "int8", "kv": "fp16"},
        modulator={"name": "linear-1"},
        tasks=list(tasks),
        rows=[row for d, task in zip(dense, tasks, strict=True) for row in (d, *of(rows, task))],
    )


def of(rows: tuple[TaskRow, ...], task: dict[str, Any]) -> list[TaskRow]:
    return [row for row in rows if row.task == task["name"]]


@pytest.fixture
def result() -> TaskResult:
    """Two tasks, one of them with a lower-is-better metric; one row is missing."""
    made = make_result(
        make_row(SQUAD, "learnt", 0.8, 47.26),
        make_row(SQUAD, "uniform", 0.8, 41.04, **beaten_by(6.22, 1.5, 9.75)),
        make_row(SQUAD, "learnt", 0.7, 40),
        make_row(SQUAD, "uniform", 0.7, 39, **beaten_by(1, None, None)),
        make_row(WIKITEXT, "learnt", 0.8, 53.4567),
        make_row(WIKITEXT, "uniform", 0.8, 58, **beaten_by(-4.5433, -6.1, -2.25)),
        make_row(WIKITEXT, "learnt", 0.7, 60, **NO_INTERVALS),
        tasks=(SQUAD, WIKITEXT),
        methods=["learnt", "uniform"],
        budgets=[1.0, 0.8, 0.7],
    )
    reason = {"task": "wikitext2", "method": "uniform", "budget": 0.7, "reason": "too low"}
    return replace(made, missing=[reason])


def table_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading of a Markdown page, without the rule."""
    rows = []
    for line in page.split(heading, 1)[1].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return [row for row in rows if set(row) != {"---"}]


# Tables


def test_markdown_has_every_row_and_column(result: TaskResult):
    page = task_table.markdown(result)
    names, dense, learnt, uniform, *rest = table_of(page, "## SQuAD v1.1 (higher is better)")
    assert names == task_table.columns(SQUAD)
    assert names[7] == "F1 [95 %]"
    assert names[10] == "EM"
    assert all(len(row) == len(names) for row in (dense, learnt, uniform, *rest))
    costs = ["1.000"] * 5
    assert dense == ["dense", "1", *costs, "50.0 [48.0, 53.0]", "", "", "31.2", "12", "4"]
    assert learnt[:8] == ["learnt", "0.8", *["0.801"] * 4, "1.000", "47.3 [45.3, 50.3]"]
    assert learnt[8:10] == ["-2.7 [-3.7, -1.2]", ""]
    assert uniform[8:10] == ["-9.0 [-10.0, -7.5]", "+6.2 [+1.5, +9.8]"]
    assert [row[:2] for row in rest] == [["learnt", "0.7"], ["uniform", "0.7"]]
    assert rest[1][9] == "+1.0"  # too few items for an interval


def test_markdown_of_what_is_better_lower(result: TaskResult):
    page = task_table.markdown(result)
    names, _, learnt, uniform, last = table_of(page, "## WikiText-2 (lower is better)")
    assert names[7] == "Perplexity [95 %]"
    assert learnt[7:9] == ["53.457 [51.457, 56.457]", "+3.457 [+2.457, +4.957]"]
    assert uniform[9] == "-4.543 [-6.100, -2.250]"
    assert last[7:9] == ["60.000", "+10.000"]


def test_markdown_says_what_was_measured_on_what(result: TaskResult):
    page = task_table.markdown(result)
    assert page.startswith("# Tiny on 2 tasks\n")
    assert "weights int8, cache fp16; modulator: linear-1. Seed 0; vesicle 0.1.0, torch" in page
    assert "squad, validation; 40 items, 12,345 prompt tokens; SHA-256 0123456789ab.\n" in page
    assert "12,345 prompt tokens; 3 shortened; SHA-256" in page
    assert page.count("F1: `v1.1`.") == 1
    assert "EM: `" not in page
    assert page.endswith("## Missing\n\n- wikitext2, uniform at 0.7: too low\n")


def test_markdown_of_the_dense_model_alone():
    page = task_table.markdown(replace(make_result(), modulator={}))
    assert page.startswith("# Tiny on 1 task\n")
    assert "modulator: none." in page
    assert "Missing" not in page
    assert len(table_of(page, "## SQuAD")) == 2


def printed(result: TaskResult) -> str:
    console = Console(width=240, force_terminal=False)
    with console.capture() as capture:
        for table in task_table.rich_tables(result):
            console.print(table)
    return capture.get()


def test_terminal_tables_say_the_same(result: TaskResult):
    text = printed(result)
    for part in ("SQuAD v1.1 (higher is better)", "WikiText-2 (lower is better)", "F1 [95 %]"):
        assert part in text
    for part in ("47.3 [45.3, 50.3]", "+6.2 [+1.5, +9.8]", "53.457 [51.457, 56.457]", "EM"):
        assert part in text
    for part in ("KV held", "weights read", "prefill s"):
        assert part not in text
    for table, task in zip(task_table.rich_tables(result), result.tasks, strict=True):
        rows = result.of_task(task["name"])
        assert table.row_count == len(rows)
        ends = [row.end_section for row in table.rows[:-1]]
        assert ends == [a.budget != b.budget for a, b in pairwise(rows)]


# Plots


@contextmanager
def drawn(
    result: TaskResult, monkeypatch: pytest.MonkeyPatch, folder: Path, **how: bool
) -> Iterator[Any]:
    """The figure that was saved."""
    figure = pytest.importorskip("matplotlib.figure")
    made: list[Any] = []
    real = figure.Figure.savefig

    def save(self: Any, *given: Any, **named: Any) -> None:
        made.append(self)
        real(self, *given, **named)

    monkeypatch.setattr(figure.Figure, "savefig", save)
    task_plots.save_plots(result, folder, **how)
    yield made[0]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_plots_are_png_files(result: TaskResult, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = task_plots.save_plots(result, tmp_path / "new")
    assert path == tmp_path / "new" / "quality_against_cost.png"
    width, height = png_size(path)
    assert width > 2 * 500 > height > 400  # two panels side by side
    assert [p.name for p in (tmp_path / "new").iterdir()] == [path.name]


def test_a_plot_that_fails_leaves_the_old_one(
    result: TaskResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figure = pytest.importorskip("matplotlib.figure")
    path = task_plots.save_plots(result, tmp_path)
    before = path.read_bytes()

    def half(self: Any, target: Path, **named: Any) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure.Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        task_plots.save_plots(result, tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_plot_that_cannot_be_written(result: TaskResult, tmp_path: Path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(VesicleError, match="cannot write"):
        task_plots.save_plots(result, tmp_path / "file")


def test_without_matplotlib(result: TaskResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPlots, match=r"pip install 'vesicle\[plot\]'"):
        task_plots.save_plots(result, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_line_is_a_method_from_dense_on(
    result: TaskResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with drawn(result, monkeypatch, tmp_path) as figure:
        squad, wikitext = figure.axes
        assert [panel.get_title() for panel in figure.axes] == [
            "SQuAD v1.1, 40 items",
            "WikiText-2, 40 items",
        ]
        lines = {line.get_label(): line for line in squad.get_lines()}
        assert list(lines) == ["learnt", "uniform"]
        assert lines["learnt"].get_xdata().tolist() == [1.0, 0.801, 0.701]
        assert lines["learnt"].get_ydata().tolist() == [50, 47.26, 40]
        assert lines["learnt"].get_color() != lines["uniform"].get_color()
        assert squad.get_ylabel() == "F1, %"
        assert wikitext.get_ylabel() == "Perplexity"
        assert squad.get_xlabel() == "executed FLOPs, share of dense"
        assert squad.get_xlim()[0] > squad.get_xlim()[1]  # cheaper to the right
        assert len(squad.collections) == 2
        assert len(wikitext.collections) == 1  # no band where an interval is missing
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["learnt", "uniform"]


def test_presses_are_drawn_against_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = make_result(
        make_row(SQUAD, "kvpress:SnapKV", 0.5, 44), make_row(SQUAD, "kvpress:Knorm", 0.5, 40)
    )
    with drawn(made, monkeypatch, tmp_path) as figure:
        (panel,) = figure.axes
        assert panel.get_xlabel() == "KV memory held, share of dense"
        snap, knorm = panel.get_lines()
        assert snap.get_xdata().tolist() == knorm.get_xdata().tolist() == [1.0, 0.501]
        assert (snap.get_color(), snap.get_marker()) != (knorm.get_color(), knorm.get_marker())


@pytest.mark.parametrize(
    ("task", "worst", "scale"),
    [(WIKITEXT, 120, "linear"), (WIKITEXT, 900, "log"), (SQUAD, 2, "linear")],
)
def test_axis_fits_the_values(
    task: dict[str, Any],
    worst: float,
    scale: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """A perplexity that explodes would flatten all others; shares of 100 stay as they are."""
    made = make_result(make_row(task, "learnt", 0.8, worst), tasks=(task,))
    with drawn(made, monkeypatch, tmp_path) as figure:
        assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize(
    ("rises", "scale", "points"), [((1, 2, 10), "linear", 4), ((1, 10, 200), "log", 3)]
)
def test_rises_over_dense(
    rises: tuple[float, ...],
    scale: str,
    points: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """Paired differences; on a logarithmic axis the dense model, at a rise of 0, has no place."""
    rest = make_row(WIKITEXT, "learnt", 1.0, 50)
    budgets = (0.9, 0.8, 0.7)
    rows = [
        make_row(WIKITEXT, method, budget, 50 + up)
        for method in ("learnt", "random")
        for budget, up in zip(budgets, rises, strict=True)
    ]
    made = make_result(rest, *rows, tasks=(WIKITEXT,))
    with drawn(made, monkeypatch, tmp_path, rise=True) as figure:
        (panel,) = figure.axes
        assert panel.get_yscale() == scale
        assert panel.get_ylabel() == "Perplexity, less dense"
        for line in panel.get_lines():
            assert line.get_ydata().tolist() == [*([0] * (points - 3)), *rises]
        assert len(panel.collections) == 2
        assert panel.get_xlim()[0] > panel.get_xlim()[1]
    with drawn(make_result(tasks=(WIKITEXT,)), monkeypatch, tmp_path, rise=True) as figure:
        assert figure.axes[0].get_yscale() == "linear"


def test_the_dense_model_alone_is_a_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tasks = tuple({**SQUAD, "name": name} for name in ("squad", "race", "ruler", "needle"))
    with drawn(make_result(tasks=tasks), monkeypatch, tmp_path) as figure:
        used = [panel for panel in figure.axes if panel.get_lines()]
        assert len(used) == 4
        assert all(not panel.axison for panel in figure.axes if panel not in used)
        assert used[0].get_lines()[0].get_ydata().tolist() == [50]


# The results page


def page_of(result: TaskResult, agreement: dict[str, Any] | None = None) -> str:
    return results_page.results_page({"budget_sweep": result}, [agreement] if agreement else [])


def test_page_has_one_line_a_task_and_budget(result: TaskResult):
    page = page_of(result)
    assert "## Budget sweep\n" in page
    assert "(../results/tasks/budget_sweep/table.md)" in page
    names, *rows = table_of(page, "## Budget sweep")
    assert names == ["task, metric", "items", "dense", "executed FLOPs", "learnt", "uniform"]
    assert rows == [
        ["SQuAD v1.1, F1", "40", "50.0", "0.801", "47.3 (-3.7 to -1.2)", "41.0 (-10.0 to -7.5)"],
        ["SQuAD v1.1, F1", "40", "50.0", "0.701", "40.0 (-11.0 to -8.5)", "39.0 (-12.0 to -9.5)"],
        [
            "WikiText-2, Perplexity, lower is better",
            "40",
            "50.00",
            "0.801",
            "53.46 (+2.46 to +4.96)",
            "58.00 (+7.00 to +9.50)",
        ],
        [
            "WikiText-2, Perplexity, lower is better",
            "40",
            "50.00",
            "0.701",
            "60.00",
            "out of reach",
        ],
    ]


def test_page_begins_and_ends_as_pages_do(result: TaskResult):
    page = page_of(result)
    assert page.startswith("# Results\n")
    assert "## When not to use" in page
    assert page.endswith("\n")
    assert not page.endswith("\n\n")
    assert "Tiny, int8 weights, fp16 cache, executed by engine; modulator: linear-1." in page
    assert "At most 50 items of a task, drawn with seed 0." in page
    assert "At most" not in page_of(replace(result, config={**result.config, "limit": None}))


VERDICTS = [
    # metric, interval of learnt less control -> where it belongs
    (SQUAD, 0.5, 3.0, "better"),
    (SQUAD, -3.0, -0.5, "loses"),
    (SQUAD, -1.0, 1.0, "open"),
    (SQUAD, 0.0, 1.0, "open"),
    (SQUAD, -1.0, 0.0, "open"),
    (WIKITEXT, -3.0, -0.5, "better"),
    (WIKITEXT, 0.5, 3.0, "loses"),
    (WIKITEXT, -1.0, 1.0, "open"),
    (WIKITEXT, 0.0, 1.0, "open"),
]


@pytest.mark.parametrize(("task", "low", "high", "verdict"), VERDICTS)
def test_wins_and_losses_in_both_directions(
    task: dict[str, Any], low: float, high: float, verdict: str
):
    against = beaten_by((low + high) / 2, low, high)
    made = make_result(
        make_row(task, "learnt", 0.8, 45),
        make_row(task, "uniform", 0.8, 44, **against),
        make_row(task, "random", 0.8, 44, **beaten_by(9, None, None)),  # too few items to tell
        tasks=(task,),
    )
    page, place = page_of(made), f"{task['name']} at 0.8 against uniform"
    counts = {name: int(name == verdict) for name in ("better", "loses", "open")}
    assert (
        "Of 1 comparisons of the modulator with a control at equal cost, the interval of the "
        f"paired difference favours the modulator in {counts['better']}, the control in "
        f"{counts['loses']}, and holds 0 in {counts['open']}."
    ) in page
    better, loses = (place if verdict == name else "nowhere" for name in ("better", "loses"))
    assert f"- **The modulator is better**: {better}." in page
    assert f"- **The modulator loses**: {loses}." in page


def test_verdicts_add_up():
    rows = []
    for i, (task, low, high, _) in enumerate(VERDICTS):
        budget = round(0.9 - i / 100, 2)
        rows.append(make_row(task, "uniform", budget, 44, **beaten_by(0, low, high)))
    page = page_of(make_result(*rows, tasks=(SQUAD, WIKITEXT)))
    assert (
        "Of 9 comparisons of the modulator with a control at equal cost, the interval of the "
        "paired difference favours the modulator in 2, the control in 2, and holds 0 in 5."
    ) in page
    assert "better**: squad at 0.9 against uniform; wikitext2 at 0.85 against uniform." in page
    assert "loses**: squad at 0.89 against uniform; wikitext2 at 0.84 against uniform." in page


def test_no_verdict_where_nothing_is_compared():
    """Presses, or a modulator without controls beside it."""
    made = make_result(make_row(SQUAD, "kvpress:SnapKV", 0.5, 44))
    page = page_of(made)
    assert "comparisons" not in page
    names, row = table_of(page, "## Budget sweep")
    assert names[3:] == ["KV held", "kvpress:SnapKV"]
    assert row[2:] == ["50.0", "0.501", "44.0 (-7.0 to -4.5)"]


def test_the_dense_model_has_a_table_of_its_own():
    wikitext = {**WIKITEXT, "n_items": 7}
    made = make_result(tasks=(SQUAD, wikitext))
    dense = replace(made.rows[1], scores={"perplexity": make_score(50, 50, **NO_INTERVALS)})
    made = replace(made, rows=[made.rows[0], dense])
    names, *rows = table_of(page_of(made), "## Budget sweep")
    assert names == ["task", "items", "metric", "dense [95 %]", "other metrics"]
    assert rows == [
        ["SQuAD v1.1", "40", "F1", "50.0 [48.0, 53.0]", "EM 31.2"],
        ["WikiText-2", "7", "Perplexity", "50.00", ""],
    ]


def test_runs_and_agreement_follow_one_another(result: TaskResult):
    metric = {
        "title": "F1",
        "values": [50.0, 50.125],
        "items_that_differ": [0, 2],
        "largest_difference": 0.125,
        "agrees": True,
    }
    other = {**metric, "title": "EM", "values": [50.0, 57.0], "agrees": False}
    tasks = [{"name": "squad", "n_items": 40, "metrics": {"f1": metric, "exact": other}}]
    found = {"executors": ["engine, fp32", "reference, fp32"], "tasks": tasks}
    page = results_page.results_page({"dense": make_result(), "sweep": result}, [found])
    order = ("# Results", "## Dense", "## Sweep", "## Agreement of executors", "## When not")
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    names, first, second = table_of(page, "## Agreement")
    assert names[2:5] == ["engine, fp32", "reference, fp32", "items that differ"]
    assert first == ["squad, F1", "40", "50.000", "50.125", "2", "agree"]
    assert second[3:] == ["57.000", "2", "**differ**"]
    assert "Agreement" not in results_page.results_page({"dense": make_result()})


COMMANDS: dict[str, dict[str, Any]] = {
    "least": {},
    "most": {
        "tasks": ("squad", "needle"),
        "methods": ("dense", "learnt", "per-layer"),
        "budgets": (1.0, 0.85, 0.7),
        "data": "sample",
        "split": "test",
        "limit": None,
        "seed": 5,
        "max_length": 512,
        "window": 64,
        "lengths": (1024, 100000),
        "depths": (0.0, 0.25, 1.0),
        "per_cell": 3,
        "dial": "shipped",
    },
    "text": {"tasks": ("wikitext2",), "window": 512, "context": 128, "phases": ("gaba=all",)},
    "few": {"limit": 7, "methods": ("uniform",), "budgets": (0.5,)},
}


@pytest.mark.parametrize("settings", COMMANDS.values(), ids=COMMANDS)
def test_the_command_asks_for_the_same_again(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """What the page prints is read back by the command line itself."""
    from vesicle.cli import app

    config = TaskConfig(**{"tasks": ("squad",), "budgets": (1.0, 0.8), **settings})
    words = shlex.split(results_page.command(replace(make_result(), config=config.to_dict())))
    asked: list[TaskConfig] = []

    def take(subject: Any, config: TaskConfig, *given: Any, **named: Any) -> None:
        asked.append(config)
        raise VesicleError("enough")

    monkeypatch.setattr(evaluate_tasks, "evaluate_tasks", take)
    monkeypatch.setattr("vesicle.commands.eval._subject", lambda *given: None)
    CliRunner().invoke(app, words[1:])
    assert words[:2] == ["vesicle", "eval"]
    assert asked == [config]


def test_a_data_folder_is_called_dir(tmp_path: Path):
    """Where the data lay on some machine is nobody's business."""
    config = TaskConfig(tasks=("squad",), data=str(tmp_path))
    line = results_page.command(replace(make_result(), config=config.to_dict()))
    assert "--data DIR " in line
    assert tmp_path.name not in line


def test_the_legend_fits_every_panel(monkeypatch, tmp_path: Path):
    a, b, c = (f"kvpress:{name}" for name in "ABC")
    race = {**SQUAD, "name": "race"}
    made = make_result(
        make_row(SQUAD, a, 0.5, 40),
        make_row(SQUAD, b, 0.5, 40),
        make_row(race, b, 0.5, 40),
        make_row(race, c, 0.5, 40),
        tasks=(WIKITEXT, SQUAD, race),
    )
    with drawn(made, monkeypatch, tmp_path) as figure:
        (legend,) = figure.legends
        named = dict(
            zip(
                (t.get_text() for t in legend.get_texts()),
                (h.get_color() for h in legend.legend_handles),
                strict=True,
            )
        )
        for panel in figure.axes:
            for line in panel.get_lines():
                assert named[line.get_label()] == line.get_color()
        assert len(set(named.values())) == len(named)


def test_a_budget_that_no_method_reached_is_on_the_page():
    made = make_result(make_row(WIKITEXT, "learnt", 0.8, 53), tasks=(SQUAD, WIKITEXT))
    gone = {"task": "squad", "method": "learnt", "budget": 0.8, "reason": "no dial"}
    page = page_of(replace(made, missing=[gone]))
    assert "SQuAD v1.1, F1 | 40 | 50.0" in page
    assert "out of reach" in page


def test_the_command_names_best_of_and_selection():
    config = TaskConfig(tasks=("squad",), best_of=5, selection=2)
    line = results_page.command(replace(make_result(), config=config.to_dict()))
    assert "--best-of 5" in line
    assert "--selection 2" in line


def test_the_command_is_quoted_for_a_shell():
    config = {**make_result().config, "methods": ["kvpress:SnapKV(window_size=32)"]}
    line = results_page.command(replace(make_result(), config=config))
    assert "kvpress:SnapKV(window_size=32)" in shlex.split(line)
    assert "--method kvpress:SnapKV(" not in line  # a shell would stumble over the bracket


def test_costs_that_differ_are_a_range():
    uniform = make_row(SQUAD, "uniform", 0.8, 41)
    dearer = replace(uniform, ratio={**uniform.ratio, "flops": 0.805})
    made = make_result(make_row(SQUAD, "learnt", 0.8, 44), dearer)
    _, row = table_of(page_of(made), "## Budget sweep")
    assert row[3] == "0.801 to 0.805"
