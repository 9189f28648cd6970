"""Scoring text: the loss of each window under a method, and what the method executed.

Every window is a fresh sequence. Its first token has nothing before it and is not scored, nor is
what is given as its context, a prompt; logits are paid for at all positions from the last one
before what is scored, as a prefill that returns log-likelihoods pays for them. With L the
summed loss in nats and n the UTF-8 bytes of the scored text,

    bits per byte = L / (n ln 2)

where a window's text is what its scored tokens decode to, special tokens left out. A character that
is cut by a window's edge decodes to one or more U+FFFD of three bytes: an error of a few bytes a
window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.activations import capped
from vesicle.cost import Cost, price, price_dense_span
from vesicle.errors import ModelError, VesicleError
from vesicle.evaluation.execution.prompts import Codec
from vesicle.families import find_family
from vesicle.plan import Author, FloatArray, Method, StandIns
from vesicle.reference.attach import Run, attach
from vesicle.shapes import ModelShape, Overhead
from vesicle.training.data import load_documents, token_windows

HEAD_POSITIONS = 256
"""Positions whose logits exist at once, over all windows of a batch."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Text to score.

    Attributes:
        ids: (N, T) token ids.
        description: What it is, in words.
    """

    ids: Tensor
    description: str

    @property
    def sha256(self) -> str:
        """Of the token ids and their arrangement in windows."""
        ids = self.ids.to("cpu", torch.int64).contiguous().numpy()
        return hashlib.sha256(f"{ids.shape}".encode() + ids.astype("<i8").tobytes()).hexdigest()


def scored_bytes(ids: Sequence[int], codec: Codec, context: int = 0) -> int:
    """UTF-8 bytes of a window's scored text."""
    return len(codec.decode(ids[first_scored(context) :]).encode("utf-8"))


def first_scored(context: int) -> int:
    """Position of the first token that is scored; the one before it is the first with logits."""
    return max(context, 1)


def load_windows(
    source: str | Path,
    codec: Codec,
    *,
    split: str = "test",
    field: str = "text",
    length: int = 1024,
    limit: int | None = None,
) -> Windows:
    """Read a text and cut it into windows.

    Args:
        source: A file, a folder or a hub data set, as `vesicle.training.data` tells.
        codec: The model's text side.
        split: Which part of the source.
        field: The field of JSON lines that holds the text.
        length: Tokens in a window.
        limit: Keep this many windows, spread evenly over the text; None for all.

    Raises:
        DataError: The source is missing, empty, malformed or shorter than a window.
    """
    documents = load_documents(source, split, field)
    ids = token_windows(documents, codec.encode, length)
    n = len(ids)
    ids = ids[evenly(n, limit)]
    name = Path(source).name if Path(source).expanduser().exists() else str(source)
    return Windows(
        ids=ids,
        description=f"{name}, split {split}, field {field}: {len(documents)} document(s), "
        f"{len(ids)} of {n} windows of {length} tokens, evenly spread",
    )


def evenly(n: int, limit: int | None) -> list[int]:
    """Places of at most `limit` of n things, spread evenly; all of them for None."""
    kept = n if limit is None else min(limit, n)
    return [i * n // kept for i in range(kept)]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What scoring N windows gave.

    Attributes:
        nats: (N,) summed loss of each window's scored tokens.
        costs: Executed for each window.
        generated: The same for its tokens behind the prompt.
        dense: What the dense model costs for one.
        levels: Released levels, one (T, L, 5) a window, if they were asked for.
    """

    nats: FloatArray
    costs: list[Cost]
    generated: list[Cost]
    dense: Cost
    levels: list[FloatArray] = field(default_factory=list)

    @property
    def cost_share(self) -> float:
        """Executed FLOPs as a share of the dense model's, over all windows."""
        return sum(c.flops_total for c in self.costs) / (len(self.costs) * self.dense.flops_total)


class Together(Method):
    """Several methods, one for each sequence of a batch, in order."""

    def __init__(self, methods: Sequence[Method]) -> None:
        """Take methods that share their stand-ins and overhead, such as controls of one modulator.

        Raises:
            ValueError: If there are none.
        """
        if not methods:
            raise ValueError("methods is empty; give one for each sequence")
        self._methods = list(methods)
        self._next = 0

    @property
    def stand_ins(self) -> StandIns:
        """The first method's stand-ins and block summary, which all of them share."""
        return self._methods[0].stand_ins

    def overhead(self, shape: ModelShape) -> Overhead:
        """The work that the first method adds, which is that of all of them."""
        return self._methods[0].overhead(shape)

    def author(self, shape: ModelShape) -> Author:
        """An author of the next method; after the last comes the first again."""
        method = self._methods[self._next % len(self._methods)]
        self._next += 1
        return method.author(shape)


def model_shape(model: nn.Module) -> ModelShape:
    """The sizes by which a model's costs are counted.

    Raises:
        ModelError: If its family is not supported.
    """
    config: Any = model.config
    size = next(model.parameters()).element_size()
    shape = find_family(config).decoder_config(config).shape
    return replace(shape, weight_bytes=size, kv_bytes=size)


def score(
    model: nn.Module,
    ids: Tensor,
    method: Method | Sequence[Method] | None = None,
    *,
    context: int = 0,
    batch: int = 1,
    keep_levels: bool = False,
) -> Scores:
    """Score windows under a method, executed by the hard reference.

    Args:
        model: A causal LM of a supported family.
        ids: (N, T) token ids; each row is a fresh sequence.
        method: For all windows, or one for each; None for the bare model.
        context: Tokens at the head of each window that are a prompt, and not scored.
        batch: Windows in a forward pass. Compare losses of one batch size only: sums of floats
        round by it.
        keep_levels: Whether to keep the released levels.

    Raises:
        VesicleError: A loss is not finite.
        ModelError: The model is not supported.
    """
    nats: list[float] = []
    costs: list[Cost] = []
    generated: list[Cost] = []
    levels: list[FloatArray] = []
    first, n = first_scored(context) - 1, ids.shape[1]
    shape = model_shape(model)
    dense = price_dense_span(shape, 0, n, first)
    behind = price_dense_span(shape, first, n, first)
    for rows, hidden, run in _passes(model, ids, method, context, batch):
        nats += _losses(model, hidden, rows, first)
        costs += [dense] * len(rows) if run is None else _executed(run, 0, first)
        generated += [behind] * len(rows) if run is None else _executed(run, first, first)
        if keep_levels and run is not None:
            levels += run.levels
    if not np.isfinite(nats).all():
        window = int(np.argmin(np.isfinite(nats)))
        raise VesicleError(f"the loss of window {window} is {nats[window]}; it must be finite")
    return Scores(nats=np.array(nats), costs=costs, generated=generated, dense=dense, levels=levels)


@torch.no_grad()
def _passes(
    model: nn.Module,
    ids: Tensor,
    method: Method | Sequence[Method] | None,
    context: int,
    batch: int,
) -> Iterator[tuple[Tensor, Tensor, Run | None]]:
    """For each batch: token ids (B, T), the hidden states before the LM head (B, T, D), the run."""
    backbone: Any = getattr(model, "base_model", None)
    if backbone is None or backbone is model:
        raise ModelError(f"{type(model).__name__} is not a causal LM of transformers")
    device = next(model.parameters()).device
    with _evaluating(model):
        for start in range(0, len(ids), batch):
            rows = ids[start : start + batch].to(device)
            part = (
                Together(method[start : start + batch]) if isinstance(method, Sequence) else method
            )
            attached = nullcontext() if part is None else attach(model, part, prompt_tokens=context)
            with attached as run:
                hidden = backbone(input_ids=rows, use_cache=False).last_hidden_state
            yield rows, hidden, run


def _executed(run: Run, start: int, first: int) -> list[Cost]:
    """What each sequence executed from `start` on, with logits from position `first` on."""
    overhead = run.method.overhead(run.shape)
    return [
        price(
            plan.tokens(start, plan.n_tokens),
            run.shape,
            overhead,
            first_position=start,
            with_logits=np.arange(start, plan.n_tokens) >= first,
            released=released[start:],
        )
        for plan, released in zip(run.plans, run.released, strict=True)
    ]


@torch.no_grad()
def _losses(model: nn.Module, hidden: Tensor, rows: Tensor, first: int) -> list[float]:
    """Summed loss of each window, predicted from position `first` on.

    The head runs on a few positions at a time: logits are large.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # a method of PreTrainedModel
    config: Any = model.config
    cap = find_family(config).decoder_config(config).logit_cap
    b, t = rows.shape
    total = torch.zeros(b, dtype=torch.float64)
    step = max(1, HEAD_POSITIONS // b)
    for start in range(first, t - 1, step):
        stop = min(start + step, t - 1)
        logits = capped(head(hidden[:, start:stop]), cap)
        # A float64 model keeps its precision; anything coarser is worked out in float32.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, start + 1 : stop + 1].flatten(), reduction="none"
        )
        total += loss.view(b, -1).double().sum(1).cpu()
    return [float(x) for x in total]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
