"""Requests of all kinds through the scheduler, with prefix reuse, against each of them alone.

    python benchmarks/scheduler_exact.py --text FILE --requests 100

Budgets, phases, sampling and lengths are drawn at random; most prompts begin alike. Tokens, Plans
and levels must be equal to the bit: the command fails if any request differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vesicle import Engine, load_default_modulator
from vesicle.engine import Sampling
from vesicle.engine.scheduler import Finished, Request, Scheduler
from vesicle.modulator import Modulator
from vesicle.phases import EVERYWHERE


def drawn(number: int, ids: list[int], modulator: Modulator, rng: np.random.Generator) -> Request:
    """A request: an opening that others share, for three of four, and an end of its own."""
    openings = (ids[:200], ids[500:620], ids[900:1300], [])
    opening = openings[number % 4]
    start = int(rng.integers(0, len(ids) - 60))
    own = ids[start : start + int(rng.integers(1, 60))]
    budget = (None, 0.9, 0.8, 0.7)[int(rng.integers(4))]
    warm = Sampling(temperature=0.8, top_p=0.9, seed=number)
    return Request(
        prompt=opening[: int(rng.integers(30, 400))] + own,
        method=None if budget is None else modulator,
        budget=budget,
        phases=EVERYWHERE if budget is not None and rng.random() < 0.3 else None,
        max_new_tokens=int(rng.integers(1, 24)),
        sampling=warm if rng.random() < 0.3 else Sampling(),
        stop=(),
    )


def same(engine: Engine, request: Request, end: Finished) -> bool:
    """Whether a request got what it gets alone."""
    alone = engine.generate(
        request.prompt,
        request.method,
        request.budget,
        phases=request.phases,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop=request.stop,
    )
    alone.sequence.close()
    return (
        end.tokens == alone.ids
        and end.sequence.plan.equals(alone.plan)
        and np.array_equal(end.sequence.levels, alone.levels)
    )


def main() -> None:
    """Print how many requests differ, and how many tokens were reused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="UTF-8 text of 1,400 tokens or more"
    )
    parser.add_argument("--requests", type=int, default=100)
    given = parser.parse_args()
    engine, modulator = Engine.from_pretrained(), load_default_modulator()
    ids = engine.encode(given.text.read_text(encoding="utf-8"))
    if len(ids) < 1400:
        parser.error(f"--text has {len(ids)} tokens; allowed: 1400 and more")
    rng = np.random.default_rng(0)
    requests = [drawn(i, ids, modulator, rng) for i in range(given.requests)]
    scheduler = Scheduler(engine, max_running=8, chunk=96)
    numbers = [scheduler.add(request) for request in requests]
    ends = {e.request_id: e for e in scheduler.run() if isinstance(e, Finished)}
    reused = sum(end.reused_tokens for end in ends.values())
    total = sum(len(request.prompt) for request in requests)
    different = [n for n, r in zip(numbers, requests, strict=True) if not same(engine, r, ends[n])]
    print(f"{len(different)} of {len(requests)} requests differ: {different}")
    print(f"{reused} of {total} prompt tokens reused")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
