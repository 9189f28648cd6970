"""Where tiles are small: tilings of real texts by layer, and what their sizes go with."""

from __future__ import annotations

import heapq
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from vesicle.kept import classes
from vesicle.studies.att.judging import Judge
from vesicle.studies.att.runs import corpus_of, trained
from vesicle.studies.att.scale import SCALES
from vesicle.studies.att.variants import Decoder
from vesicle.tiling.partition import LARGEST, tile_sizes
from vesicle.tiling.soft import wanted_sizes

_TENTHS = 10


def draw_tilings(
    out: Path, *, scale: str, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Tilings that the learnt importance network makes of prose, code and a table; a job.

    Args:
        out: The study's folder.
        scale: One of `SCALES`.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
    """
    size, corpus = SCALES[scale], corpus_of("lm", scale, data, text)
    decoder = trained(out, "lm", size, 0, "att")
    judge = Judge(decoder, corpus, "lm", None)
    share = size.shares[0]
    budget = judge.dial(share)
    assert decoder.state is not None
    decoder.state.budget = budget
    length = size.lengths["lm"]
    prose = corpus.tokenizer.decode(corpus.test[0].tolist(), skip_special_tokens=False)
    given = {"prose": prose, "code": inspect.getsource(heapq), "table": _table()}
    found = []
    for name, whole in given.items():
        encoded = corpus.tokenizer.encode(whole)
        ids, spans = encoded.ids[:length], encoded.offsets[:length]
        sizes, losses = _tiling(decoder, ids)
        suffix = ".py" if name == "code" else None
        found.append(
            {
                "name": name,
                "pieces": [corpus.tokenizer.decode([i], skip_special_tokens=False) for i in ids],
                "sizes": sizes.tolist(),
                "by_class": _by_class(sizes, classes(whole, spans, suffix)),
                "by_surprise": _by_surprise(sizes, losses),
                "by_place": _by_place(sizes),
            }
        )
    return {"share": share, "budget": budget, "texts": found}


def _table() -> str:
    """Rows of numbers with their squares and cubes, as a table in Markdown."""
    rows = [f"| {n} | {n * n} | {n**3} | {n % 7} |" for n in range(1, 200)]
    return "\n".join(["| n | square | cube | rest |", "| --- | --- | --- | --- |", *rows])


@torch.no_grad()
def _tiling(decoder: Decoder, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(L, T) sizes of the tiles that positions lie in, and (T,) losses, of the first 0."""
    tokens = torch.tensor([ids])
    logits = decoder.model(tokens).logits
    losses = cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    assert decoder.state is not None
    sizes = [tile_sizes(wanted_sizes(level[0]).numpy()) for level in decoder.state.levels]
    return np.stack(sizes), np.concatenate([[0.0], losses.numpy()])


def _whole(length: int) -> int:
    """Positions of complete blocks, which alone are tiled."""
    return length // LARGEST * LARGEST


def _fineness(sizes: np.ndarray) -> np.ndarray:
    """Tiles a position, of all layers: 1 where all stand alone."""
    return (1 / sizes[:, : _whole(sizes.shape[1])]).mean(0)


def _by_class(sizes: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    fine = _fineness(sizes)
    told = np.array(names[: len(fine)])
    return [
        {
            "class": str(name),
            "tokens": int((told == name).sum()),
            "tiles": _mean(fine[told == name]),
        }
        for name in dict.fromkeys(names)
        if (told == name).any()
    ]


def _by_surprise(sizes: np.ndarray, losses: np.ndarray) -> list[dict[str, Any]]:
    """Fifths of the tokens, from the least surprising on."""
    fine = _fineness(sizes)
    order = np.argsort(losses[: len(fine)], kind="stable")
    return [
        {"loss": _mean(losses[part]), "tiles": _mean(fine[part])}
        for part in np.array_split(order, 5)
        if len(part)
    ]


def _by_place(sizes: np.ndarray) -> list[list[float]]:
    """Tiles a position of each layer, in tenths of the text."""
    whole = 1 / sizes[:, : _whole(sizes.shape[1])]
    return [[_mean(part) for part in np.array_split(row, _TENTHS) if len(part)] for row in whole]


def _mean(values: np.ndarray) -> float:
    return round(float(np.mean(values)), 4)
