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
CHUNK = 128


def read(engine: vesicle.Engine, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Loss (T - 1,) in nats of each next token, and the likeliest ones.

    Logits of a large vocabulary are not kept: 128 tokens at a time.
    """
    sequence, losses, likeliest = engine.start(), [], []
    for start in range(0, len(ids) - 1, CHUNK):
        logits = engine.forward([(sequence, ids[start : start + CHUNK])], "all")[0]
        following = torch.tensor(ids[start + 1 : start + CHUNK + 1])
        logits = logits[: len(following)]
        losses.append(cross_entropy(logits.double(), following, reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(likeliest)


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
    ranks = []
    for part in states.split(CHUNK):
        best = head.multiply(part).argmax(-1, keepdim=True)
        screened = head.multiply(part, 4)
        ranks.append((screened > screened.gather(1, best)).sum(1))
    rank = torch.cat(ranks)
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
        expected, likeliest = read(exact, ids)
        states.append(model.model(torch.tensor([ids])).last_hidden_state[0])
        for kv, engine in engines.items():
            losses, found = read(engine, ids)
            run = f"{kv} cache"
            rises.setdefault(run, []).append(losses - expected)
            same.setdefault(run, []).append(found == likeliest)
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
