"""Speed beside rivals: every contender in a process of its own, one computing at a time.

The parent (`schedule`) neither computes nor loads a model. It sends each turn to one worker and
waits; the workers (`worker`) run a contender through the same interface (`runners`), so that all
are timed by the same lines. What was measured is a `Report` (`results`).
"""

from __future__ import annotations

from vesicle.bench.contenders import RIVALS, Contender, line_up
from vesicle.bench.results import Report, Row, Spread
from vesicle.bench.schedule import BenchConfig, run_bench

__all__ = ["RIVALS", "BenchConfig", "Contender", "Report", "Row", "Spread", "line_up", "run_bench"]
