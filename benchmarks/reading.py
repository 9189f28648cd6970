"""What reading less of a long text saves, and what it loses, beside other ways to read as much.

    python benchmarks/reading.py --text essays.jsonl.gz --tokens 8000 --out reading.json

One text is read in full and under each method by turns; then each goes on from its end. The rise in
loss is that of the text's own tokens after the first 512. Methods: `reading` (a fixed number of
entries, as `vesicle run --read`), `alike` (the same in all KV heads), `bounds` (chosen by the
bounds of Quest), `share` (a share of what is seen, as GABA has it), `window` (the first and the
newest entries alone, as in StreamingLLM and Longformer), and `namm` (the shipped one, which
forgets).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import vesicle
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.eviction import SinksAndRecent
from vesicle.files import check_target, write_json
from vesicle.namm import Namm, NammMemory
from vesicle.plan import Dense, Method, Plan, Replay
from vesicle.reading import Reading
from vesicle.shipped import namm_for

CHUNK, SKIPPED, STEPS = 512, 512, 48


def methods(
    engine: vesicle.Engine, folder: Path, n_tokens: int, reads: list[int]
) -> Iterator[tuple[str, int, Method]]:
    """Name, entries and method, for each number that is to be read."""
    shape, source = engine.shape, namm_for(folder)
    namm = None if source is None else Namm.load(source)
    profile = None if namm is None else namm.profile_of(shape)
    rest = Plan.rest(shape, n_tokens + STEPS + 1)
    for entries in reads:
        share = entries / n_tokens
        yield "reading", entries, Reading(entries, shape, profile=profile)
        yield "alike", entries, Reading(entries, shape)
        yield "bounds", entries, Reading(entries, shape, profile=profile, summary="bounds")
        # Half of a text is seen on average, so that twice the share reads about as much.
        seen = rest.kv_blocks
        fewer = np.clip(np.ceil(2 * share * seen), np.minimum(seen, 8), seen).astype(np.int32)
        yield "share", entries, Replay(rest.with_fields(kv_blocks=fewer))
        yield "window", entries, SinksAndRecent(entries)
        if namm is not None:
            yield "namm", entries, NammMemory(namm, memory=share)


def read(
    engine: vesicle.Engine, ids: list[int], method: Method
) -> tuple[Tensor, vesicle.engine.Sequence]:
    """Loss (T - 1,) in nats of each next token, and the sequence."""
    sequence, losses = engine.start(method), []
    sequence.begin_prompt(len(ids))
    for start in range(0, len(ids), CHUNK):
        logits = engine.forward([(sequence, ids[start : start + CHUNK])], "all")[0]
        following = torch.tensor(ids[start + 1 : start + CHUNK + 1])
        losses.append(cross_entropy(logits[: len(following)], following, reduction="none"))
    return torch.cat(losses), sequence


def timed(engine: vesicle.Engine, ids: list[int], method: Method) -> tuple[float, float]:
    """Seconds to read a text without logits, and milliseconds of a step after it."""
    sequence, steps = engine.start(method), []
    sequence.begin_prompt(len(ids))
    begun = time.perf_counter()
    for start in range(0, len(ids), CHUNK):
        engine.forward([(sequence, ids[start : start + CHUNK])], "none")
    reading = time.perf_counter() - begun
    token = ids[-1]
    for _ in range(STEPS):
        begun = time.perf_counter()
        token = engine.likeliest([(sequence, [token])])[0]
        steps.append(1e3 * (time.perf_counter() - begun))
    sequence.close()
    return reading, statistics.median(steps)


def measure(model: str, text: Path, n_tokens: int, reads: list[int], rounds: int) -> dict[str, Any]:
    """All methods on one text."""
    folder = vesicle.resolve_model(model)
    windows = load_windows(text, vesicle.Text.from_folder(folder), length=n_tokens, limit=1)
    engine = vesicle.Engine.from_pretrained(folder)
    ids: list[int] = windows.ids.tolist()[0]
    asked = [("dense", n_tokens, Dense()), *methods(engine, folder, n_tokens, reads)]
    times: list[list[tuple[float, float]]] = [[] for _ in asked]
    for _ in range(rounds):  # by turns, since a machine is not always as fast
        for found, (_, _, method) in zip(times, asked, strict=True):
            found.append(timed(engine, ids, method))
    base, rows = None, []
    for (name, entries, method), taken in zip(asked, times, strict=True):
        losses, sequence = read(engine, ids, method)
        base = losses if base is None else base
        rise = (losses - base)[SKIPPED:].double()
        ratio = sequence.cost.ratio(sequence.dense_cost)
        rows.append(
            {
                "method": name,
                "entries": entries,
                "rise": float(rise.mean()),
                "standard_error": float(rise.std() / len(rise) ** 0.5),
                "kv_bytes_read": ratio["kv_bytes_read"],
                "kv_bytes_held": ratio["kv_bytes_held"],
                "reading_s": statistics.median(t[0] for t in taken) if taken else None,
                "step_ms": statistics.median(t[1] for t in taken) if taken else None,
            }
        )
        sequence.close()
        print(json.dumps(rows[-1]), flush=True)
    return {"model": model, "text": windows.description, "tokens": n_tokens, "methods": rows}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as in vesicle run")
    parser.add_argument(
        "--text", type=Path, required=True, help=".txt, or .jsonl with a field 'text'"
    )
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--reads", type=int, nargs="+", default=[512, 1024, 2048], help="entries")
    parser.add_argument("--rounds", type=int, default=2, help="of timing; 0 for losses alone")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        check_target(args.out)
        found = measure(args.model, args.text, args.tokens, args.reads, args.rounds)
        write_json(args.out, found)
    except VesicleError as error:
        print(f"reading: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
