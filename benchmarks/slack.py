"""Where a model has slack: the rise in loss when one thing is left out, and what that saves.

    python benchmarks/slack.py --model gemma3-270m --text wikitext2-test.jsonl.gz --out slack.json

Every probe is a Plan for all tokens, executed by the engine as it is by default: at one site the
same share of input channels in every layer; blocks of the cache, the same share in every layer, of
the second halves of the windows; and one FFN or one attention layer left out outright, layer by
layer. Costs are the ledger's, the LM head included.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import vesicle
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.files import check_target, write_json
from vesicle.plan import FFN_SKIP, SITES, Plan, Replay, StandIns
from vesicle.shapes import ModelShape

SHARES = (0.75, 0.5, 0.25)
CHUNK = 128


@dataclass(frozen=True)
class Probe:
    """A Plan that leaves out one thing."""

    what: str
    share: float
    plan: Plan


def probes(shape: ModelShape, n_tokens: int) -> list[Probe]:
    """All of a model, for texts of `n_tokens`."""
    rest = Plan.rest(shape, n_tokens)
    found = []
    for site, name in enumerate(SITES):
        for share in SHARES:
            channels = rest.channels.copy()
            channels[..., site] = np.ceil(share * channels[..., site])
            found.append(Probe(f"channels, {name}", share, rest.with_fields(channels=channels)))
    late = np.arange(n_tokens)[:, None] >= n_tokens // 2
    for share in SHARES:
        fewer = np.maximum(np.ceil(share * rest.kv_blocks), np.minimum(rest.kv_blocks, 8))
        blocks = np.where(late, fewer, rest.kv_blocks).astype(np.int32)
        found.append(Probe("blocks", share, rest.with_fields(kv_blocks=blocks)))
    for layer in range(shape.n_layers):
        ffn, attention = rest.ffn.copy(), rest.attention.copy()
        ffn[:, layer], attention[:, layer] = FFN_SKIP, 0
        found.append(Probe("one FFN", layer, rest.with_fields(ffn=ffn)))
        found.append(Probe("one attention", layer, rest.with_fields(attention=attention)))
    return found


def read(engine: vesicle.Engine, ids: list[int], plan: Plan) -> tuple[Tensor, Any]:
    """Loss (T - 1,) in nats of each next token, and the sequence."""
    sequence, losses = engine.start(Replay(plan, StandIns())), []
    for start in range(0, len(ids) - 1, CHUNK):
        part = ids[start : start + CHUNK]
        logits = engine.forward([(sequence, part)], "all")[0]
        following = torch.tensor(ids[start + 1 : start + CHUNK + 1])
        losses.append(cross_entropy(logits[: len(following)], following, reduction="none"))
    return torch.cat(losses), sequence


def measure(model: str, text: Path, n_windows: int, length: int) -> dict[str, Any]:
    """All probes of one model."""
    folder = vesicle.resolve_model(model)
    windows = load_windows(text, vesicle.Text.from_folder(folder), length=length, limit=n_windows)
    engine = vesicle.Engine.from_pretrained(folder)
    rows: list[list[int]] = windows.ids.tolist()
    dense = [read(engine, ids, Plan.rest(engine.shape, length)) for ids in rows]
    head = dense[0][1].cost.flops_head / dense[0][1].cost.flops_total
    found = []
    for probe in probes(engine.shape, length):
        rises, flops, bytes_read = [], [], []
        for ids, (base, at_rest) in zip(rows, dense, strict=True):
            losses, sequence = read(engine, ids, probe.plan)
            half = len(base) // 2 if probe.what == "blocks" else 0
            rises.append((losses - base)[half:].double())
            ratio = sequence.cost.ratio(at_rest.cost)
            flops.append(ratio["flops"])
            bytes_read.append(ratio["bytes_read"])
        rise = torch.cat(rises)
        found.append(
            {
                "what": probe.what,
                "share" if probe.share < 1 and "one" not in probe.what else "layer": probe.share,
                "rise": float(rise.mean()),
                "standard_error": float(rise.std() / len(rise) ** 0.5),
                "flops": float(np.mean(flops)),
                "bytes_read": float(np.mean(bytes_read)),
            }
        )
        print(model, json.dumps(found[-1]), flush=True)
    return {
        "model": model,
        "weights": engine.weights_format,
        "text": windows.description,
        "loss": float(torch.cat([base for base, _ in dense]).mean()),
        "head_share_of_flops": head,
        "probes": found,
    }


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="as --model of vesicle run")
    parser.add_argument(
        "--text", type=Path, required=True, help=".txt, or .jsonl with a field 'text'"
    )
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        check_target(args.out)
        results = [measure(m, args.text, args.windows, args.tokens) for m in args.model]
        write_json(args.out, {"models": results})
    except VesicleError as error:
        print(f"slack: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
