"""The proposal's test case: an abstract to be summarised, by the default model, dense and in tiles.

The model was not trained with tiles. Blocks are split where attention was received; a block of 64
has 16 tiles, whatever the text's length, so that a tile that stands goes on standing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from vesicle.scratch.patterns import Dense, Pattern, Tiles, TilesState, patterned
from vesicle.tiling.partition import tile_sizes
from vesicle.tiling.soft import wanted_sizes

ABSTRACT = (
    "Transformer models have achieved state-of-the-art performance in various natural language "
    "processing tasks. However, their quadratic computational complexity with respect to sequence "
    "length has limited their application to long documents. In this paper, we propose a novel "
    "attention mechanism that scales linearly with sequence length without sacrificing "
    "performance. Our method, called Linear Attention, approximates the full attention matrix "
    "using a low-rank decomposition. We demonstrate that Linear Attention achieves comparable "
    "performance to full attention on language modeling and machine translation tasks, while being "
    "significantly faster and more memory-efficient on long sequences."
)
REQUEST = f"Summarize the following research paper abstract: '{ABSTRACT}'"
_TILES, _NEW = 16, 120


@torch.no_grad()
def answer_case(out: Path) -> dict[str, Any]:
    """Both answers, what was read, and the tiling of the prompt; a job."""
    from transformers import AutoModelForCausalLM

    from vesicle.models import Text, resolve_model

    folder = resolve_model(None)
    text = Text.from_folder(folder)
    ids = text.chat(REQUEST, None)
    answers = []
    for what in ("dense", "tiles"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        state = TilesState(budget=0.5)
        patterns = patterned(model, partial(_pattern, what, state, model.config))
        told, share = _write(model, patterns, ids, text.eos_ids)
        answers.append({"what": what, "text": text.decode(told), "share": share})
    model(torch.tensor([ids]))
    sizes = [tile_sizes(wanted_sizes(level[0]).numpy()).tolist() for level in state.levels]
    return {
        "request": REQUEST,
        "answers": answers,
        "pieces": text.pieces(ids),
        "sizes": sizes,
    }


def _pattern(what: str, state: TilesState, config: Any, layer: int) -> Pattern:
    if what == "dense":
        return Dense()
    return Tiles(
        layer,
        state,
        config.hidden_size,
        config.num_key_value_heads,
        importance="received",
        per_block=_TILES,
        recent=16,
        pools=False,
    )


def _write(
    model: Any, patterns: list[Pattern], ids: list[int], stops: frozenset[int]
) -> tuple[list[int], float]:
    """Greedy tokens, each by a pass over all before it, and the share read in the last one."""
    told = list[int]()
    while len(told) < _NEW:
        logits = model(torch.tensor([[*ids, *told]]), logits_to_keep=1, use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in stops:
            break
        told.append(token)
    dense = (len(ids) + len(told) + 1) / 2
    return told, sum(float(p.reads) for p in patterns) / len(patterns) / dense
