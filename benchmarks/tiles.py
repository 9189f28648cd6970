"""What tiles lose on a pretrained model that was never trained with them.

    python benchmarks/tiles.py --text essays.jsonl.gz --tokens 2048 --out tiles.json

Every probe replaces the attention of all layers by `vesicle.tiling`, in transformers and fp32: the
first 16 positions and the newest 64 to 127 one by one, all that lies further back in tiles of one
size. Told are the rise in loss of tokens 512 on, and what a query reads of what it sees.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoModelForCausalLM

import vesicle
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import load_windows
from vesicle.files import check_target, write_json
from vesicle.tiling import tile_sizes, tiled_attention

FROM = 512
PROBES: list[dict[str, Any]] = [
    {"tile": 16, "opened": 8, "drops": True},
    {"tile": 16, "opened": 16, "drops": True},
    {"tile": 16, "opened": 16, "pooling": "mean"},
    {"tile": 16, "opened": 16, "pooling": "query"},
    {"tile": 16, "opened": 0, "pooling": "mean"},
    {"tile": 16, "opened": 0, "pooling": "query"},
    {"tile": 64, "opened": 0, "pooling": "query"},
    {"tile": 64, "opened": 4, "drops": True},
    {"tile": 64, "opened": 4, "pooling": "query"},
    {"tile": 4, "opened": 64, "drops": True},
    {"tile": 4, "opened": 64, "pooling": "query"},
]


class Probed:
    """The attention of a model, which is this probe's."""

    def __init__(self) -> None:
        self.probe: dict[str, Any] | None = None
        self.shares: list[float] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """As transformers has it: (1, T, H, K) of (1, H, T, K)."""
        if self.probe is None:
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2).contiguous(), None
        length = query.shape[2]
        given = {name: x for name, x in self.probe.items() if name != "tile"}
        sizes = tile_sizes(np.full(length, self.probe["tile"]))
        found = tiled_attention(query[0], key[0], value[0], sizes, scaling, **given)
        self.shares.append(float(found.read.sum()) / (length * (length + 1) / 2))
        return found.output.transpose(0, 1)[None].contiguous(), None


def measure(model: str | None, text: Path, n_windows: int, length: int) -> dict[str, Any]:
    """All probes."""
    folder = vesicle.resolve_model(model)
    windows = load_windows(text, vesicle.Text.from_folder(folder), length=length, limit=n_windows)
    probed = Probed()
    AttentionInterface.register("probed", probed)
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="probed"
    ).eval()

    def losses() -> Tensor:
        found = []
        for ids in windows.ids:
            logits = network(ids[None], use_cache=False).logits[0, FROM - 1 : -1]
            found.append(cross_entropy(logits, ids[FROM:], reduction="none"))
        return torch.cat(found).double()

    dense, rows = losses(), []
    for probe in PROBES:
        probed.probe, probed.shares = probe, []
        rise = losses() - dense
        row = {
            **probe,
            "rise": float(rise.mean()),
            "standard_error": float(rise.std() / len(rise) ** 0.5),
            "read": float(np.mean(probed.shares)),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return {"text": windows.description, "loss": float(dense.mean()), "probes": rows}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="as --model of vesicle run")
    parser.add_argument(
        "--text", type=Path, required=True, help=".txt, or .jsonl with a field 'text'"
    )
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        check_target(args.out)
        if args.tokens <= FROM:
            raise VesicleError(f"--tokens is {args.tokens}; allowed: more than {FROM}")
        write_json(args.out, measure(args.model, args.text, args.windows, args.tokens))
    except VesicleError as error:
        print(f"tiles: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
