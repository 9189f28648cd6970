"""Time of tokens that take big, small or no FFNs, drawn at random, beside all big and the ledger.

    python benchmarks/mixed_ffns.py --text test.jsonl.gz --small-ffns runs/small

Every token and layer draws its FFN: small or none with the shares asked for, big otherwise. Told
are milliseconds of a decoded token and of one in a prompt, over those of all big by turns in the
same run, and beside them what the ledger says of FLOPs and of bytes read.
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
from vesicle.duo import load_small_ffns
from vesicle.engine import core
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.files import check_target, write_json
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL, Dense, Method, Plan, Replay, StandIns
from vesicle.shapes import ModelShape
from vesicle.small_modules import SmallModule

PROMPT, STEPS, CHUNK = 256, 64, 128
MIXES = ((0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (0.25, 0.25))
"""Shares of small FFNs and of none."""


def drawn(shape: ModelShape, small: float, skip: float, seed: int = 0) -> Plan:
    """A Plan in which every token and layer draws its FFN."""
    rest = Plan.rest(shape, PROMPT + STEPS)
    dice = np.random.default_rng(seed).random((PROMPT + STEPS, shape.n_layers))
    ffn = np.where(dice < small, FFN_SMALL, np.where(dice < small + skip, FFN_SKIP, FFN_BIG))
    return rest.with_fields(ffn=ffn)


def timed(engine: vesicle.Engine, ids: list[int], method: Method) -> dict[str, Any]:
    """Milliseconds of a token in a prompt and of a decoded one, and the ledger's shares."""
    sequence = engine.start(method)
    begun = time.perf_counter()
    for start in range(0, PROMPT, CHUNK):
        engine.forward([(sequence, ids[start : start + CHUNK])], "none")
    reading = 1e3 * (time.perf_counter() - begun) / PROMPT
    before, dense_before = sequence.cost, sequence.dense_cost
    steps = []
    for token in ids[PROMPT : PROMPT + STEPS]:
        begun = time.perf_counter()
        # All of the head: how much of it a search for the likeliest token reads depends on states.
        engine.forward([(sequence, [token])])
        steps.append(1e3 * (time.perf_counter() - begun))
    after, dense_after = sequence.cost, sequence.dense_cost
    sequence.close()
    shares = {
        key: (getattr(after, key) - getattr(before, key))
        / (getattr(dense_after, key) - getattr(dense_before, key))
        for key in ("flops_total", "bytes_read")
    }
    return {"prompt_ms": reading, "step_ms": statistics.median(steps), **shares}


def measure(model: str | None, text: Path, small_ffns: Path, rounds: int) -> dict[str, Any]:
    """All mixes, by turns."""
    folder = vesicle.resolve_model(model)
    windows = load_windows(text, vesicle.Text.from_folder(folder), length=PROMPT + STEPS, limit=1)
    engine = vesicle.Engine.from_pretrained(folder)
    small: SmallModule = load_small_ffns(small_ffns, engine.shape)
    asked: list[tuple[str, Method]] = [("all big", Dense())]
    for share, skip in MIXES:
        plan = drawn(engine.shape, share, skip)
        asked.append((f"small {share:g} none {skip:g}", Replay(plan, StandIns(ffn=small))))
    ids = windows.ids.tolist()[0]
    taken: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):  # by turns, since a machine is not always as fast
        for name, method in asked:
            taken.setdefault(name, []).append(timed(engine, ids, method))
    rows = []
    for name, found in taken.items():
        middle = {key: statistics.median(f[key] for f in found) for key in found[0]}
        over = {
            f"{key[:-3]}_ratio": statistics.median(
                f[key] / rest[key] for f, rest in zip(found, taken["all big"], strict=True)
            )
            for key in ("prompt_ms", "step_ms")
        }
        rows.append({"mix": name, **middle, **over})
        told = "  ".join(f"{key} {value:.3f}" for key, value in rows[-1].items() if key != "mix")
        print(f"{name:<22} {told}", file=sys.stderr)
    instructions = core.instructions() if engine._native else None
    return {
        "model": model,
        "instructions": instructions,
        "weights": engine.weights_format,
        "small_weights": small.weights,
        "rows": rows,
    }


def main(words: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the default model if none")
    parser.add_argument("--text", type=Path, required=True, help="a text, .txt or .jsonl[.gz]")
    parser.add_argument("--small-ffns", type=Path, required=True, help="of vesicle distil")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write JSON here; standard output if none")
    given = parser.parse_args(words)
    try:
        if given.rounds < 1:
            raise VesicleError(f"--rounds is {given.rounds}; allowed: 1 and above")
        if given.out is not None:
            check_target(given.out)
        found = measure(given.model, given.text, given.small_ffns, given.rounds)
    except VesicleError as error:
        print(f"mixed_ffns: error: {error}", file=sys.stderr)
        return 2
    if given.out is None:
        print(json.dumps(found))
    else:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
