"""Make every table and figure in results/, and docs/results.md, again from the JSON beside them.

python benchmarks/render_results.py          # write
python benchmarks/render_results.py --check  # fail if a page is stale
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from vesicle.evaluation.report.old_results import load_result
from vesicle.evaluation.report.page import results_page
from vesicle.evaluation.report.plots import save_plots
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.report.table import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with its text."""
    for path in sorted(RESULTS.glob("*/result.json")):
        yield path.with_name("table.md"), markdown(load_result(path))
    runs: dict[str, TaskResult] = {}
    for path in sorted(RESULTS.glob("tasks/*/result.json")):
        runs[path.parent.name] = TaskResult.load(path)
        yield path.with_name("table.md"), markdown(runs[path.parent.name])
    agreements = [
        json.loads(path.read_text("utf-8"))
        for path in sorted(RESULTS.glob("tasks/agreement*.json"))
    ]
    if runs:
        yield ROOT / "docs" / "results.md", results_page(runs, agreements)


def figures() -> None:
    """Draw every figure."""
    for path in sorted(RESULTS.glob("*/result.json")):
        save_plots(load_result(path), path.parent, "loss_against_cost.png", rise=True)
    for path in sorted(RESULTS.glob("tasks/*/result.json")):
        save_plots(TaskResult.load(path), path.parent)


def main(check: bool) -> int:
    """Render, or compare; returns the exit status."""
    stale = 0
    for path, text in pages():
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"stale: {path.relative_to(ROOT)}; run make results")
            stale += 1
    if not check:
        figures()
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
