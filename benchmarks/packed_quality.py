"""What the default engine's rounding costs in quality: loss and likeliest tokens against fp32.

    python benchmarks/packed_quality.py --text wikitext2-test.jsonl.gz --out quality.json

Each window is read in several KV formats, with activations rounded to 8 bits, and by the engine in
fp32. The last part asks where a 4-bit screen of the LM head ranks the word that the whole head
likes best, on the model's own hidden states.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import vesicle
from vesicle.engine.packed import PackedHead
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.files import write_json

KV_FORMATS = ("fp16", "int8")
RANKS = (1, 8, 16, 32, 64)


def losses(logits: Tensor, ids: list[int]) -> Tensor:
    """Loss (T - 1,) in nats of each next token."""
    return cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none")


def summary(differences: list[Tensor], same: list[Tensor]) -> dict[str, float]:
    """Mean rise in loss in nats with its standard error, and share of equal likeliest tokens."""
    rise = torch.cat(differences)
    return {
        "loss_difference": float(rise.mean()),
        "standard_error": float(rise.std() / len(rise) ** 0.5),
        "same_likeliest": float(torch.cat(same).double().mean()),
    }


def screen_ranks(head: PackedHead, states: Tensor) -> dict[str, float]:
    """Share of normed states (T, D) whose likeliest word is among the first m of a 4-bit screen."""
    best = head.multiply(states).argmax(-1, keepdim=True)
    screened = head.multiply(states, 4)
    rank = (screened > screened.gather(1, best)).sum(1)
    return {f"first_{m}": float((rank < m).double().mean()) for m in RANKS}


@torch.inference_mode()
def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder, GGUF file, hub id or name; the default model")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a field 'text'")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    folder = vesicle.resolve_model(args.model)
    text = vesicle.Text.from_folder(folder)
    windows = load_windows(args.text, text, length=args.tokens, limit=args.windows)
    exact = vesicle.Engine.from_pretrained(folder, weights="fp32")
    engines = {kv: vesicle.Engine.from_pretrained(folder, kv=kv) for kv in KV_FORMATS}
    rises: dict[str, list[Tensor]] = {}
    same: dict[str, list[Tensor]] = {}
    states: list[Tensor] = []  # what the LM head reads
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids in windows.ids.tolist():
        dense = exact.forward([(exact.start(), ids)], "all")[0]
        states.append(model.model(torch.tensor([ids])).last_hidden_state[0])
        for kv, engine in engines.items():
            logits = engine.forward([(engine.start(), ids)], "all")[0]
            run = f"{kv} cache"
            rises.setdefault(run, []).append(losses(logits, ids) - losses(dense, ids))
            same.setdefault(run, []).append((logits.argmax(-1) == dense.argmax(-1))[:-1])
    head = engines["fp16"]._weights.head
    assert isinstance(head, PackedHead)
    result = {
        "text": windows.description,
        "runs": {run: summary(rises[run], same[run]) for run in rises},
        "head_screen": screen_ranks(head, torch.cat(states)),
    }
    print(json.dumps(result, indent=2))
    write_json(args.out, result)


if __name__ == "__main__":
    main()
