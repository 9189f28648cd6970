"""Time of sampled tokens, at rest and at a budget, and how a previewed head draws.

    python benchmarks/drawing.py --text test.jsonl.gz --budget 0.7

Greedy tokens, tokens drawn at a temperature, and tokens drawn from a nucleus, by turns in one run.
*Same* is how often a head that is previewed, and nothing else, draws the token that the whole head
draws with the same noise from the same states.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import vesicle
from vesicle.engine import Sampling, core
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.files import check_target, write_json
from vesicle.phases import Phases
from vesicle.plan import Dense, Method, Plan, Replay
from vesicle.processors import maker
from vesicle.shipped import shipped_modulators

STEPS, WARM = 64, 8


def timed(engine: vesicle.Engine, ids: list[int], method: Method, sampling: Sampling) -> float:
    """Milliseconds of a token after a prompt: the pass and the draw."""
    sequence, steps = engine.start(method), []
    tokens = engine.stream(sequence, ids, max_new_tokens=STEPS, sampling=sampling, stop=())
    for _ in range(STEPS):
        begun = time.perf_counter()
        next(tokens)
        steps.append(1e3 * (time.perf_counter() - begun))
    sequence.close()
    return statistics.median(steps[WARM:])


def same(engine: vesicle.Engine, ids: list[int], head: Method, sampling: Sampling) -> float:
    """Share of tokens that a previewed head draws as the whole one."""
    generator, found = sampling.generator(), []
    sequences = engine.start(), engine.start(head)
    for token in ids:
        noise = sampling.noise(engine.shape.vocabulary, generator)
        drawn = [engine.likeliest([(sequence, [token])], [noise])[0] for sequence in sequences]
        found.append(drawn[0] == drawn[1])
    return float(np.mean(found))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All ways of drawing, at rest and at the budget, by turns."""
    name = given.model or "smollm2-135m-instruct"
    folder = vesicle.resolve_model(given.model)
    text = vesicle.Text.from_folder(folder)
    windows = load_windows(given.text, text, length=given.prompt, limit=1)
    if name not in shipped_modulators():
        raise VesicleError(
            f"no modulator is shipped for {name}; known: {', '.join(shipped_modulators())}"
        )
    engine = vesicle.Engine.from_pretrained(folder)
    modulator = vesicle.Modulator.from_pretrained(shipped_modulators()[name])
    served = modulator.at(given.budget, Phases.saving_time(core.instructions(), maker()))
    ids = windows.ids.tolist()[0]
    ways = {
        "greedy": Sampling(),
        "drawn": Sampling(temperature=given.temperature),
        "nucleus": Sampling(temperature=given.temperature, top_p=0.95),
    }
    taken: dict[str, list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        for way, sampling in ways.items():
            pair = (timed(engine, ids, Dense(), sampling), timed(engine, ids, served, sampling))
            taken.setdefault(way, []).append(pair)
    rows = [
        {
            "way": way,
            "rest_ms": statistics.median(rest for rest, _ in pairs),
            "budget_ms": statistics.median(below for _, below in pairs),
            "ratio": statistics.median(below / rest for rest, below in pairs),
        }
        for way, pairs in taken.items()
    ]
    words = np.full(len(ids), modulator.gaba.likeliest, np.int32)
    plan = Plan.rest(engine.shape, len(ids)).with_fields(likeliest=words)
    head = Replay(plan, modulator.stand_ins)
    return {
        "model": name,
        "budget": given.budget,
        "temperature": given.temperature,
        "prompt": given.prompt,
        "instructions": core.instructions() if engine._native else None,
        "rows": rows,
        "same": same(engine, ids, head, ways["drawn"]) if modulator.gaba.likeliest else None,
    }


def main(words: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the default model if none")
    parser.add_argument("--text", type=Path, required=True, help="a text, .txt or .jsonl[.gz]")
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument(
        "--prompt", type=int, default=1024, help="tokens before those timed, from the text"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write JSON here; standard output if none")
    given = parser.parse_args(words)
    try:
        for name, least in (("rounds", 1), ("prompt", 2)):
            if getattr(given, name) < least:
                raise VesicleError(
                    f"--{name} is {getattr(given, name)}; allowed: {least} and above"
                )
        if given.out is not None:
            check_target(given.out)
        found = measure(given)
    except VesicleError as error:
        print(f"drawing: error: {error}", file=sys.stderr)
        return 2
    for row in found["rows"]:
        told = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "way")
        print(f"{row['way']:<10} {told}", file=sys.stderr)
    if given.out is None:
        print(json.dumps(found))
    else:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
