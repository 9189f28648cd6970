"""Which positions a press keeps: one forward pass of transformers, then a look at what is left.

A press lets attention see the whole context, layer by layer, and leaves a smaller cache behind. The
cache used here remembers every key and value as it was written, so each row that is left can be
looked up, bit for bit, among those that came in. That works for whatever a press computes inside,
wrappers and presses that read the context twice included, so long as it *selects* entries.

Some presses (AdaKV and its kin) leave the cache whole and mark entries that later attention must
not see, `masked_key_indices`, because a tensor cannot hold another number of entries for each head.
The engine's blocks can, and free them.

Refused, because a list of kept positions cannot say it: presses that change keys or values (channel
pruning, new rotary phases, merging) or the tokens, and presses that go on dropping while tokens are
generated.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.families import cache_argument, find_family
from vesicle.plan import IntArray, Method
from vesicle.retention import Retention

_WHILE_DECODING = ("DecodingPress", "PrefillDecodingPress")
_READS_ATTENTION = ("ObservedAttentionPress",)

_Rows = tuple[Tensor, Tensor]
"""Keys and values (G, n, K) of one layer."""


def press_method(press: Any, model: nn.Module, ids: list[int], *, seed: int = 0) -> Method:
    """What a press keeps of a context, as a method for the engine.

    Args:
        press: Of kvpress, built by `make_press` or by hand.
        model: The Hugging Face causal LM whose weights the engine has.
        ids: The context's token ids. The method serves sequences that begin with them.
        seed: Of presses that draw random numbers.

    Returns:
        A method that is dense until `ids` are read, and then holds only what the press keeps.

    Raises:
        VesicleError: As `kept_by`.
    """
    return Retention(kept_by(press, model, ids, seed=seed), at=len(ids))


def kept_by(press: Any, model: nn.Module, ids: list[int], *, seed: int = 0) -> list[list[IntArray]]:
    """The positions that each KV head of each layer keeps, by one dense forward pass over `ids`.

    Args:
        press: A press; called with the model it must be a context manager, inside which a forward
            pass shrinks the cache.
        model: A Hugging Face causal LM. It is left as it was.
        ids: Token ids of the context.
        seed: Of presses that draw random numbers.

    Returns:
        For each layer, for each KV head, (n,) positions, rising; n differs between the heads of a
        layer only where the press marks entries.

    Raises:
        VesicleError: If the press fails, or its result is not a selection of entries.
    """
    name = type(press).__name__
    if not ids:
        raise VesicleError(f"{name} was given no tokens to choose from; give at least one")
    if _is_any(press, _WHILE_DECODING) or getattr(press, "decoding", False):
        raise VesicleError(
            f"{name} drops entries while tokens are generated; a press must choose once, after "
            "the context"
        )
    base: Any = model.base_model
    cache, written = _recording_cache()
    filled = cache_argument(base, cache)
    with _untouched(model, eager=_nested_any(press, _READS_ATTENTION)) as attention:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            tokens = torch.tensor([ids], device=next(model.parameters()).device)
            try:
                with press(model):
                    base(input_ids=tokens, **filled)
            except Exception as error:  # whatever a press may raise
                reason = f"{type(error).__name__}: {error}".removeprefix("AssertionError: ")
                raise VesicleError(f"{name} failed on this model: {reason}") from error
        masked = [getattr(module, "masked_key_indices", None) for module in attention]
    left = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    kept = []
    for layer, marks in enumerate(masked):
        if written[layer][0].shape[1] != len(ids):
            raise VesicleError(
                f"{name} made {written[layer][0].shape[1]} entries of {len(ids)} tokens; a press "
                "must leave the tokens as they are"
            )
        positions = _look_up(written[layer], left[layer], f"{name}, layer {layer}")
        kept.append([np.array(sorted(row), np.int32) for row in _unmarked(positions, marks)])
    return kept


def _recording_cache() -> tuple[Any, dict[int, _Rows]]:
    """A Hugging Face cache, and where it puts each layer's keys and values as first written."""
    from transformers import DynamicCache

    written: dict[int, _Rows] = {}

    class Recording(DynamicCache):
        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            # The first time only: some presses run the model again over the same cache.
            if layer_idx not in written:
                written[layer_idx] = key_states[0].clone(), value_states[0].clone()
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return Recording(), written


@contextmanager
def _untouched(model: Any, *, eager: bool) -> Iterator[list[nn.Module]]:
    """Lend the attention modules of a model, and leave behind nothing that a press adds to them.

    With `eager`, attention hands out its probabilities meanwhile.
    """
    family = find_family(model.config)
    attention = [family.modules(layer).attention for layer in family.layers(model)]
    before = [set(vars(module)) | set(module._modules) for module in attention]
    implementation = model.config._attn_implementation
    for module in attention:
        if hasattr(module, "masked_key_indices"):
            delattr(module, "masked_key_indices")  # left by a press that ran before
    if eager:
        model.set_attn_implementation("eager")
    try:
        yield attention
    finally:
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        for module, names in zip(attention, before, strict=True):
            for name in (set(vars(module)) | set(module._modules)) - names:
                delattr(module, name)


def _look_up(written: _Rows, left: _Rows, where: str) -> list[list[int]]:
    """For each head, the positions of the rows left, in their order.

    Rows equal in both key and value are interchangeable, and are taken in order of position.

    Raises:
        VesicleError: If a row was not written, or is left more often than it was.
    """
    if left[0].shape[0] != written[0].shape[0]:
        raise VesicleError(f"{where}: {left[0].shape[0]} KV heads are left of {len(written[0])}")
    found = []
    for head in range(len(written[0])):
        keys = _bytes(written[0][head])
        known = defaultdict[tuple[bytes, bytes], deque[int]](deque)
        for position, row in enumerate(zip(keys, _bytes(written[1][head]), strict=True)):
            known[row].append(position)
        positions = []
        for row in zip(_bytes(left[0][head]), _bytes(left[1][head]), strict=True):
            if not known[row]:
                changed = "values" if row[0] in keys else "keys"
                raise VesicleError(
                    f"{where}: it changes {changed} of the entries it keeps (or repeats an entry); "
                    "only presses that select entries can be bridged"
                )
            positions.append(known[row].popleft())
        found.append(positions)
    return found


def _bytes(rows: Tensor) -> list[bytes]:
    """Each row (n, K) as its bytes."""
    array: NDArray[np.uint8] = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in array]


def _unmarked(positions: list[list[int]], marks: Any) -> list[list[int]]:
    """Positions without the marked ones: `marks` has batch, head and place of each, or is None."""
    if marks is None:
        return positions
    hidden = set(zip(marks[1].tolist(), marks[2].tolist(), strict=True))
    return [
        [position for place, position in enumerate(row) if (head, place) not in hidden]
        for head, row in enumerate(positions)
    ]


def _is_any(press: Any, names: tuple[str, ...]) -> bool:
    """Whether a press is of a class of one of these names, or of one derived from it."""
    return any(kind.__name__ in names for kind in type(press).__mro__)


def _nested_any(press: Any, names: tuple[str, ...]) -> bool:
    """The same for a press or any that it wraps."""
    if _is_any(press, names):
        return True
    if isinstance(press, list | tuple):
        return any(_nested_any(one, names) for one in press)
    return is_dataclass(press) and any(
        _nested_any(getattr(press, field.name, None), names) for field in fields(press)
    )
