"""Looking again where a cheap pass is not sure (DynaLay), beside chance and one static shape.

    python benchmarks/reevaluate.py --text test.jsonl.gz --small-ffns runs/small --out again.json

The first look has small FFNs in the layers that cost least (as `vesicle distil` compared them), the
second is dense. Told are nats a token above the dense model and executed FLOPs, both looks
included, for rules of rising confidence, and for as many second looks drawn at random.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import vesicle
from vesicle.duo import Reevaluated, by_chance, load_small_ffns, reevaluate, unsure
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.files import check_target, read_json, write_json
from vesicle.intervals import interval
from vesicle.plan import FFN_BIG, FFN_SMALL, Dense, Plan, Replay, StandIns

PROMPT, LENGTH = 64, 320
CONFIDENCES = (0.1, 0.2, 0.4)


def layers_of(small_ffns: Path) -> list[list[int]]:
    """The layers that are small, for each number of them that was compared."""
    path = small_ffns / "comparison.json"
    if not path.is_file():
        raise VesicleError(f"{small_ffns} holds no comparison.json; vesicle distil writes one")
    return [p["layers"] for p in read_json(path)["kinds"][0]["points"]]


def measure(model: str | None, text: Path, small_ffns: Path, texts: int) -> dict[str, Any]:
    """All rules on all texts."""
    folder = vesicle.resolve_model(model)
    windows = load_windows(text, vesicle.Text.from_folder(folder), length=LENGTH, limit=texts)
    engine = vesicle.Engine.from_pretrained(folder)
    small, rest = load_small_ffns(small_ffns, engine.shape), Plan.rest(engine.shape, LENGTH)
    rows = []
    for layers in [found for found in layers_of(small_ffns)[1:] if len(found) <= 12]:
        ffn = np.full((LENGTH, engine.shape.n_layers), FFN_BIG)
        ffn[:, layers] = FFN_SMALL
        first = Replay(rest.with_fields(ffn=ffn), StandIns(ffn=small))

        def look(rule: Any, first: Replay = first) -> list[Reevaluated]:
            return [
                reevaluate(engine, ids, PROMPT, first, Dense(), rule)
                for ids in windows.ids.tolist()
            ]

        dense = look(lambda logits: True)
        tried = [("never", look(lambda logits: False))]
        for confidence in CONFIDENCES:
            found = look(unsure(confidence))
            share = float(np.mean([f.again.float().mean() for f in found]))
            tried += [(f"under {confidence:g}", found), ("by chance", look(by_chance(share)))]
        for name, found in tried:
            rises = [float((f.nats - d.nats).mean()) for f, d in zip(found, dense, strict=True)]
            low, high = interval(np.array(rises))
            rows.append(
                {
                    "small_ffns": len(layers),
                    "again": name,
                    "share_again": float(np.mean([f.again.float().mean() for f in found])),
                    "flops": float(np.mean([f.share for f in found])),
                    "rise": float(np.mean(rises)),
                    "interval": [low, high],
                }
            )
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), file=sys.stderr)
    return {"model": model, "texts": len(windows.ids), "rows": rows}


def main(words: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the default model if none")
    parser.add_argument("--text", type=Path, required=True, help="a text, .txt or .jsonl[.gz]")
    parser.add_argument("--small-ffns", type=Path, required=True, help="of vesicle distil")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write JSON here; standard output if none")
    given = parser.parse_args(words)
    try:
        if given.texts < 1:
            raise VesicleError(f"--texts is {given.texts}; allowed: 1 and above")
        if given.out is not None:
            check_target(given.out)
        found = measure(given.model, given.text, given.small_ffns, given.texts)
    except VesicleError as error:
        print(f"reevaluate: error: {error}", file=sys.stderr)
        return 2
    if given.out is None:
        print(json.dumps(found))
    else:
        write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
