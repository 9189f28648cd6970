"""One turn: prefill once, then decode steps, timed by the same lines for every contender."""

from __future__ import annotations

import gc
import time
from typing import Any

from vesicle.bench.runners import Runner
from vesicle.evaluation.execution.memory import peak_bytes, reset_peak


def measure(runner: Runner, rows: list[list[int]], prompt_tokens: int) -> dict[str, Any]:
    """Read the first tokens of each row as a prompt, and feed the rest one step at a time.

    Args:
        runner: With its weights loaded.
        rows: B rows of ids of equal length, one more than are fed: the last is what the last step
            should say.
        prompt_tokens: How many of each row are the prompt.

    Returns:
        `prefill_s`; `steps_s`, a list; `greedy`, the likeliest token after the prompt and after
        each step, one list a row; `cpu_s` of this process; `peak_bytes`, None if unknown; and what
        `Runner.work` tells.
    """
    steps = len(rows[0]) - prompt_tokens - 1
    fed = [[row[prompt_tokens + i] for row in rows] for i in range(steps)]
    prompts = [row[:prompt_tokens] for row in rows]
    gc.collect()
    reset_peak()
    cpu_begun = time.process_time()
    runner.begin(len(rows), len(rows[0]))
    begun = time.perf_counter()
    greedy = [runner.prefill(prompts)]
    prefill_s = time.perf_counter() - begun
    steps_s = []
    for tokens in fed:
        begun = time.perf_counter()
        greedy.append(runner.step(tokens))
        steps_s.append(time.perf_counter() - begun)
    cpu_s = time.process_time() - cpu_begun
    return {
        "prefill_s": prefill_s,
        "steps_s": steps_s,
        "greedy": [list(row) for row in zip(*greedy, strict=True)],
        "cpu_s": cpu_s,
        "peak_bytes": peak_bytes() or None,
        **runner.work(steps),
    }
