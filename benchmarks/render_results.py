"""Make every table and figure in results/ again, from the JSON beside it.

python benchmarks/render_results.py          # write
python benchmarks/render_results.py --check  # fail if a table is stale
"""

from __future__ import annotations

import sys
from pathlib import Path

from vesicle.evaluation.plots import save_plot
from vesicle.evaluation.results import Result
from vesicle.evaluation.table import markdown

RESULTS = Path(__file__).parents[1] / "results"


def main(check: bool) -> int:
    """Render, or compare; returns the exit status."""
    stale = 0
    for path in sorted(RESULTS.glob("*/result.json")):
        result = Result.load(path)
        table, text = path.with_name("table.md"), markdown(result)
        if check:
            if not table.exists() or table.read_text(encoding="utf-8") != text:
                print(f"stale: {table}; run make results")
                stale += 1
            continue
        table.write_text(text, encoding="utf-8")
        save_plot(result, path.with_name("loss_against_cost.png"))
        print(f"wrote {table.parent}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
