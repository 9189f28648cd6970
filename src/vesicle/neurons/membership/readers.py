"""Who is asked for the probabilities of tokens: a Hugging Face model, or the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vesicle.engine import Engine
from vesicle.plan import Method
from vesicle.reference.attach import attach

Read = Callable[[Tensor], Tensor]
"""Token ids (B, T) to logits (B, T, V), every row a sequence of its own."""


@contextmanager
def reading(model: nn.Module, method: Method | None = None) -> Iterator[Read]:
    """Ask a Hugging Face causal LM, one of `vesicle.scratch` too, under a method if one is given.

    Args:
        model: The model; in evaluation mode meanwhile.
        method: Who decides, executed by the reference; nothing is attached if None.

    Raises:
        ModelError: If a method is given and the model's family does not fit.
    """
    device = next(model.parameters()).device

    def read(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids.to(device), use_cache=False).logits.cpu()

    before = model.training
    model.eval()
    try:
        if method is None:
            yield read
        else:
            with attach(model, method):
                yield read
    finally:
        model.train(before)


@contextmanager
def reading_by_engine(engine: Engine, method: Method | None = None) -> Iterator[Read]:
    """Ask the engine, which skips what a method's Plans leave out; dense if none is given."""

    def read(ids: Tensor) -> Tensor:
        sequences = [engine.start(method) for _ in ids]
        try:
            rows = engine.forward(list(zip(sequences, ids.tolist(), strict=True)), "all")
        finally:
            for sequence in sequences:
                sequence.close()
        return torch.stack(rows).cpu()

    yield read
