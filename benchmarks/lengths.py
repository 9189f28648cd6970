"""How the time of attention grows with a text, in the engine, at rest and reading a fixed number.

    python benchmarks/lengths.py --text essays.jsonl.gz --lengths 1024,2048,4096,8000 --read 1024

One text for each length is read, and gone on with for some tokens, by turns. Told are seconds in
attention alone (the choice of what is read is part of it) and in all, and the slopes of the
logarithm of both against that of the length. PyTorch's own dense attention of the same shape, all
layers, stands beside them.
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
import torch
from torch.nn.functional import scaled_dot_product_attention

import vesicle
from vesicle.engine import core
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.files import check_target, write_json
from vesicle.namm import Namm
from vesicle.plan import Dense, Method
from vesicle.reading import Reading
from vesicle.shapes import ModelShape
from vesicle.shipped import namm_for

CHUNK, STEPS = 512, 32
ATTENTION = core.PHASES.index("attention")


def timed(
    engine: vesicle.Engine, seconds: np.ndarray, ids: list[int], method: Method
) -> dict[str, float]:
    """Seconds to read a text and milliseconds of a step after it, attention's own and all."""
    sequence, steps, near = engine.start(method), [], []
    sequence.begin_prompt(len(ids))
    before, begun = seconds[ATTENTION], time.perf_counter()
    for start in range(0, len(ids), CHUNK):
        engine.forward([(sequence, ids[start : start + CHUNK])], "none")
    reading, attention = time.perf_counter() - begun, seconds[ATTENTION] - before
    token = ids[-1]
    for _ in range(STEPS):
        before, begun = seconds[ATTENTION], time.perf_counter()
        token = engine.likeliest([(sequence, [token])])[0]
        steps.append(1e3 * (time.perf_counter() - begun))
        near.append(1e3 * (seconds[ATTENTION] - before))
    sequence.close()
    return {
        "reading_s": reading,
        "reading_attention_s": float(attention),
        "step_ms": statistics.median(steps),
        "step_attention_ms": statistics.median(near),
    }


def pytorch(shape: ModelShape, length: int) -> dict[str, float]:
    """Seconds of PyTorch's dense attention in all layers that see all of a text."""
    sizes = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    parts = [torch.randn(1, n, length, shape.head_size) for n in sizes]
    layers = int((shape.layer_windows == 0).sum())
    begun = time.perf_counter()
    scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    return {"reading_attention_s": layers * (time.perf_counter() - begun)}


def slope(rows: list[dict[str, Any]], method: str, key: str) -> float | None:
    """Of the logarithm of a figure against that of the length."""
    points = [(r["length"], r[key]) for r in rows if r["method"] == method and key in r]
    if len(points) < 2:
        return None
    x, y = (np.log([p[i] for p in points]) for i in (0, 1))
    return round(float(np.polyfit(x, y, 1)[0]), 3)


def measure(
    model: str | None, text: Path, lengths: list[int], reads: list[int], rounds: int
) -> dict[str, Any]:
    """All lengths under all methods."""
    folder = vesicle.resolve_model(model)
    windows = load_windows(text, vesicle.Text.from_folder(folder), length=max(lengths), limit=1)
    engine = vesicle.Engine.from_pretrained(folder)
    shape, source = engine.shape, namm_for(folder)
    profile = None if source is None else Namm.load(source).profile_of(shape)
    asked: list[tuple[str, Method]] = [("rest", Dense())]
    asked += [(f"read {n}", Reading(n, shape, profile=profile)) for n in reads]
    native = engine._native
    if native is None:
        raise VesicleError(f"there is no native core: {engine.uncovered}")
    seconds, ids, rows = native.clock(), windows.ids.tolist()[0], []
    for length in lengths:
        taken: dict[str, list[dict[str, float]]] = {}
        for _ in range(rounds):  # by turns, since a machine is not always as fast
            for name, method in asked:
                taken.setdefault(name, []).append(timed(engine, seconds, ids[:length], method))
            taken.setdefault("pytorch", []).append(pytorch(shape, length))
        for name, found in taken.items():
            middle = {key: statistics.median(f[key] for f in found) for key in found[0]}
            rows.append({"length": length, "method": name, **middle})
            told = "  ".join(f"{key} {value:.3f}" for key, value in middle.items())
            print(f"{length:>6}  {name:<10} {told}", file=sys.stderr)
    names = dict.fromkeys(row["method"] for row in rows)
    keys = ("reading_attention_s", "step_attention_ms", "reading_s", "step_ms")
    slopes = {name: {key: slope(rows, name, key) for key in keys} for name in names}
    return {"model": model, "rows": rows, "slopes": slopes}


def main(words: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the default model if none")
    parser.add_argument("--text", type=Path, required=True, help="a long text, .txt or .jsonl[.gz]")
    parser.add_argument("--lengths", default="1024,2048,4096,8000")
    parser.add_argument("--read", default="1024", help="entries, with commas between")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write JSON here; standard output if none")
    given = parser.parse_args(words)
    try:
        lengths, reads = ([int(n) for n in x.split(",")] for x in (given.lengths, given.read))
        if min(lengths) < 1 or given.rounds < 1:
            raise ValueError("--lengths and --rounds: allowed are whole numbers from 1 up")
        if given.out is not None:
            check_target(given.out)
        found = measure(given.model, given.text, lengths, reads, given.rounds)
    except (VesicleError, ValueError) as error:
        print(f"lengths: error: {error}", file=sys.stderr)
        return 2
    if given.out is None:
        print(json.dumps(found))
    else:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
