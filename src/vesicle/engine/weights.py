"""Loads a decoder's weights into the engine's layout: joined by shared input, dense or packed.

Dense weights are channel-major in one number format. Packed weights have 4- or 8-bit codes
(`packed`), the same everywhere or (`mixed`) as few as each projection can do with. Where nothing is
asked for, weights of a quantised file are packed in the bits that they have there, others to 4 bits
if that loses nothing at all, and are kept as stored otherwise.

Tensors are read one at a time and encoded at once, so the peak is one packed model and the tensors
of one projection.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.activations import capped
from vesicle.engine.encoding import GROUP, Grid
from vesicle.engine.linear import ChannelMajor, Projection, logits
from vesicle.engine.packed import (
    HALF_TILE,
    HEAD_TILE,
    PackedHead,
    PackedPair,
    PackedWeight,
)
from vesicle.engine.pages import Arena
from vesicle.errors import ModelError
from vesicle.families import DecoderConfig, find_family
from vesicle.families.base import Affine, Lookup
from vesicle.families.checks import check_tensors, flag
from vesicle.models.checks import check_weights, read_config
from vesicle.models.finite import check_finite
from vesicle.models.groups import BITS, Groups, StoredGroups, read_groups
from vesicle.shapes import ModelShape

PACKED = {"int4": 4, "int8": 8, "mixed": None}
"""Packed formats, and the bits of their projections; None where each has its own."""
DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
FORMATS = (*PACKED, *DENSE)
HEAD_BITS = 8
"""Of the packed LM head and embedding, whatever the projections have."""
_NAMES = {dtype: name for name, dtype in DENSE.items()}
_BYTES = {name: ((bits or 4) + 1) / 8 for name, bits in PACKED.items()} | {
    name: float(dtype.itemsize) for name, dtype in DENSE.items()
}
"""What a weight takes in memory, group scales included."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer: values, keys, queries share `attention_in`, in that order; gate, up `ffn_in`.

    Keys and queries lie side by side so that one rotation serves both; values and keys come first
    so that a token whose attention is skipped computes a leading part of the projection. Packed,
    that part is a weight of its own: `attention_in` is then a `PackedPair`, the others are
    `PackedWeight`.
    """

    attention_norm: Affine
    attention_in: Projection
    attention_out: Projection
    query_norm: Affine | None
    key_norm: Affine | None
    attention_post_norm: Affine | None
    ffn_norm: Affine
    ffn_in: Projection
    ffn_out: Projection
    ffn_post_norm: Affine | None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """In the order of `plan.SITES`."""
        return (self.attention_in, self.attention_out, self.ffn_in, self.ffn_out)

    @property
    def norms(self) -> tuple[Affine, ...]:
        """The layer's two to six norms: only those that it has."""
        norms = (
            self.attention_norm,
            self.query_norm,
            self.key_norm,
            self.attention_post_norm,
            self.ffn_norm,
            self.ffn_post_norm,
        )
        return tuple(n for n in norms if n is not None)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A whole decoder.

    Attributes:
        config: Its arithmetic and sizes, with the number formats that costs depend on.
        format: One of `FORMATS`.
        dtype: Of activations: the dense weights' own, fp32 where weights are packed.
        embedding: (V, D), or packed rows.
        layers: In order.
        final_norm: Before the head.
        head: (V, D), the embedding itself where the two are tied, or packed.
        head_bias: (V,) or None; a packed head holds it too.
        packing: What packing has cost, matrix by matrix; empty where nothing is packed.
    """

    config: DecoderConfig
    format: str
    dtype: torch.dtype
    embedding: Tensor | PackedHead
    layers: tuple[LayerWeights, ...]
    final_norm: Affine
    head: Tensor | PackedHead
    head_bias: Tensor | None
    packing: tuple[Packing, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether projections and head are packed."""
        return self.format in PACKED

    @property
    def device(self) -> torch.device:
        """The device on which the weights lie."""
        embedding = self.embedding
        return embedding.high.device if isinstance(embedding, PackedHead) else embedding.device

    @property
    def bytes_held(self) -> int:
        """Bytes of all weights; a tied embedding counts once."""
        held = sum(p.bytes_held for layer in self.layers for p in layer.projections) + _size(
            self.head_bias if isinstance(self.head, Tensor) else None
        )
        for norm in (self.final_norm, *(n for layer in self.layers for n in layer.norms)):
            held += _size(norm.weight) + _size(norm.bias)
        tied = self.head is self.embedding
        for matrix in (self.embedding,) if tied else (self.embedding, self.head):
            held += matrix.bytes_held if isinstance(matrix, PackedHead) else _size(matrix)
        return held

    def embed(self, token_ids: Tensor) -> Tensor:
        """What enters the first layer (T, D), in `dtype`, of token ids (T,)."""
        if isinstance(self.embedding, PackedHead):
            rows = self.embedding.rows(token_ids)
        else:
            rows = self.embedding[token_ids].to(self.dtype)
        scale = self.config.embedding_scale
        return rows if scale == 1 else rows * scale

    def logits(self, x: Tensor) -> Tensor:
        """Logits (T, V) of the normed residual stream x (T, D), by the full LM head."""
        return capped(logits(x, self.head, self.head_bias), self.config.logit_cap)


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What packing a matrix, or several that are joined, has cost.

    Attributes:
        name: Of the (first) parameter.
        kinds: How the parameters were stored in a quantised file, in order; empty if not known.
        bits: Of a packed code.
        error: The largest difference between a weight and what is given back.
        largest: The largest magnitude of a weight.
    """

    name: str
    kinds: tuple[str, ...]
    bits: int
    error: float
    largest: float


class _InexactError(Exception):
    """A projection that 4-bit groups do not give back."""


def build(
    config: Any,
    lookup: Lookup,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    stored: torch.dtype = torch.float32,
) -> Weights:
    """Arrange the parameters that `lookup` finds for a Hugging Face config.

    Args:
        config: Of the model.
        lookup: Finds parameters by name.
        dtype: A dense store in this number format.
        weights: One of `FORMATS`, in place of `dtype`. With neither, 4 bits if they give every
            projection back exactly, else dense in `stored`.
        stored: Number format for the dense store that no one asked for.

    Raises:
        ModelError: If the family or format is not supported, or a parameter is missing, of the
            wrong shape or not finite.
    """
    form = _asked_for(dtype, weights)
    if form is None and stored not in DENSE.values():
        raise ModelError(f"dtype is {stored}; allowed: {', '.join(map(str, DENSE.values()))}")

    def on_meta(name: str) -> Tensor | None:
        tensor = lookup(name)
        if tensor is not None and not tensor.is_floating_point():
            raise ModelError(f"weight {name!r} is of {tensor.dtype}; allowed: floating-point types")
        return None if tensor is None else tensor.to("meta")  # its shape, without reading it

    def checked(name: str) -> Tensor | None:
        tensor = lookup(name)
        if tensor is not None:
            check_finite(name, tensor, "the model")
        return tensor

    check_tensors(find_family(config), config, on_meta)
    return _build(config, checked, form) if form else _build_exact(config, checked, lambda: stored)


def _asked_for(dtype: torch.dtype | None, weights: str | None) -> str | None:
    """The one of `FORMATS` that two options name; None where neither does.

    Raises:
        ModelError: If there is no such format, or the two do not agree.
    """
    if weights is not None and weights not in FORMATS:
        raise ModelError(f"weights is {weights!r}; allowed: {', '.join(FORMATS)}")
    if weights is not None and dtype is not None and DENSE.get(weights) != dtype:
        raise ModelError(f"weights {weights!r} and dtype {dtype} do not agree; give one of them")
    if dtype is not None and dtype not in DENSE.values():
        raise ModelError(f"dtype is {dtype}; allowed: {', '.join(map(str, DENSE.values()))}")
    return weights if dtype is None else _NAMES[dtype]


def _build_exact(config: Any, lookup: Lookup, stored: Callable[[], torch.dtype]) -> Weights:
    """In 4 bits if that loses nothing, else dense in what `stored` then answers."""
    # Also where a weight is too large to pack: the dense store takes anything.
    with suppress(_InexactError, ModelError):
        return _build(config, lookup, "int4", only_exact=True)
    return _build(config, lookup, _NAMES[stored()])


def _build(
    config: Any,
    lookup: Lookup,
    form: str,
    only_exact: bool = False,
    groups: StoredGroups | None = None,
) -> Weights:
    family = find_family(config)
    decoder = family.decoder_config(config)
    dense = DENSE.get(form)
    dtype = torch.float32 if dense is None else dense
    size = torch.empty(0, dtype=dtype).element_size()
    shape = replace(
        decoder.shape,
        weight_bytes=size,
        kv_bytes=size,
        head_bits=None if dense is not None else HEAD_BITS,
    )
    decoder = replace(decoder, shape=shape)

    def get(name: str) -> Tensor | None:
        tensor = lookup(name)
        if tensor is None:
            return None
        return tensor.detach() if dense is None else tensor.detach().to(dense)

    arena = None if dense is not None else Arena(_packed_bytes(shape, _most_bits(form, groups)))
    packing: list[Packing] = []

    def placed(packed: PackedWeight | PackedHead) -> Any:
        assert arena is not None
        trailing = None if packed.trailing is None else arena.place(packed.trailing)
        return replace(packed, high=arena.place(packed.high), trailing=trailing)

    def grid_of(parts: Sequence[Affine]) -> Grid | None:
        return _joined_grid([groups.get(p.name) if groups and p.name else None for p in parts])

    def needed(*parts: Affine) -> int:
        """Bits of the codes of parts that are joined."""
        if (asked := PACKED[form]) is not None:
            return asked
        grid = grid_of(parts)
        if grid is not None:
            return 4 if grid.bits <= 4 else 8
        return (
            4 if PackedWeight.stack([p.weight for p in parts], [None] * len(parts), 4).exact else 8
        )

    def joined(*parts: Affine, bits: int | None = None) -> Any:
        weights, biases = [p.weight for p in parts], [p.bias for p in parts]
        if dense is not None:
            return ChannelMajor.stack(weights, biases)
        bits = bits or needed(*parts)
        packed = PackedWeight.stack(weights, biases, bits, _fitting(grid_of(parts), bits))
        if only_exact and not packed.exact:
            raise _InexactError
        note(parts[0].name, [p.name for p in parts], packed, weights)
        return placed(packed)

    def note(
        name: str | None,
        names: list[str | None],
        packed: PackedWeight | PackedHead,
        weights: list[Tensor],
    ) -> None:
        kinds = {} if groups is None else groups.kinds
        packing.append(
            Packing(
                name=name or "a fused weight",
                kinds=tuple(kinds[n] for n in names if n in kinds),
                bits=packed.bits,
                error=packed.error,
                largest=max(float(w.abs().amax()) for w in weights),
            )
        )

    layers = []
    for number in range(shape.n_layers):
        t = family.layer_tensors(decoder, number, get)
        attention_in: Projection
        if dense is None:
            # A site's codes all have as many bits.
            bits = max(needed(t.value, t.key), needed(t.query))
            attention_in = PackedPair(
                parts=(joined(t.value, t.key, bits=bits), joined(t.query, bits=bits))
            )
        else:
            attention_in = joined(t.value, t.key, t.query)
        layers.append(
            LayerWeights(
                attention_norm=_norm(t.attention_norm, dense),
                attention_in=attention_in,
                attention_out=joined(t.out),
                query_norm=_optional_norm(t.query_norm, dense),
                key_norm=_optional_norm(t.key_norm, dense),
                attention_post_norm=_optional_norm(t.attention_post_norm, dense),
                ffn_norm=_norm(t.ffn_norm, dense),
                ffn_in=joined(t.up) if t.gate is None else joined(t.gate, t.up),
                ffn_out=joined(t.down),
                ffn_post_norm=_optional_norm(t.ffn_post_norm, dense),
            )
        )
        del t
        _return_freed_memory()
    m = family.model_tensors(get)
    embedding: Tensor | PackedHead = m.embedding
    head: Tensor | PackedHead = m.head
    if dense is None:
        grid = grid_of([Affine(weight=m.head, name=m.head_name)])
        packed = PackedHead.pack(m.head, HEAD_BITS, m.head_bias, grid)
        note(m.head_name, [m.head_name], packed, [m.head])
        head = placed(packed)
        if m.head is m.embedding:
            embedding = head
        elif m.embedding.dtype == torch.bfloat16:
            # Only a row a token is read of it, so that packing would save no time.
            embedding = m.embedding.clone()
        else:
            embedding = PackedHead.pack(m.embedding, HEAD_BITS)
        _return_freed_memory()
    if dense is None:
        each = tuple(tuple(_bits(p) for p in layer.projections) for layer in layers)
        alike = {bits for layer in each for bits in layer}
        form = form if len(alike) > 1 else f"int{alike.pop()}"
        stored_bits = PACKED[form] or each
        decoder = replace(decoder, shape=replace(decoder.shape, stored_bits=stored_bits))
    return Weights(
        config=decoder,
        format=form,
        dtype=dtype,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=_norm(m.final_norm, dense),
        head=head,
        head_bias=m.head_bias,
        packing=tuple(packing),
    )


def _bits(projection: Projection) -> int:
    assert isinstance(projection, PackedWeight | PackedPair)
    return projection.bits


def _joined_grid(groups: list[Groups | None]) -> Grid | None:
    """The grid of matrices side by side; None where any is not known to have one."""
    known = [g for g in groups if g is not None]
    if len(known) < len(groups):
        return None
    bits = max(g.bits for g in known)
    return Grid(
        bits=bits,
        # Codes of fewer bits become leading bits of those of the others.
        scale=torch.cat([g.scale / 2 ** (bits - g.bits) for g in known]),
        low=torch.cat([g.low for g in known]),
    )


def _fitting(grid: Grid | None, bits: int) -> Grid | None:
    """The grid, if codes of so many bits can hold it."""
    return grid if grid is not None and grid.bits <= bits else None


def _most_bits(form: str, groups: StoredGroups | None) -> int:
    """Bits that no code of a packed projection exceeds."""
    if (asked := PACKED[form]) is not None:
        return asked
    # Of matrices in layers, which have their numbers in their names; head and embedding have none.
    stored = {} if groups is None else groups.kinds
    kinds = {kind for name, kind in stored.items() if re.search(r"\.\d+\.", name)}
    return 4 if kinds and all(BITS.get(kind, 8) <= 4 for kind in kinds) else 8


def _packed_bytes(shape: ModelShape, bits: int) -> int:
    """Bytes of the packed projections and head, each blob on a cache line."""
    width, query, kv = shape.width, shape.query_width, 2 * shape.kv_width
    sizes = [(kv, width), (query, width), (width, query)]
    sizes += [(shape.site_outputs[2], width), (width, shape.ffn_width)]
    layer = sum(_up(o, HALF_TILE) * _up(w, GROUP) for o, w in sizes)
    head = _up(shape.vocabulary, HEAD_TILE) * _up(width, GROUP)
    packed = shape.n_layers * layer * (bits + 1) + head * (HEAD_BITS + 1)
    return packed // 8 + 64 * (2 * len(sizes) * shape.n_layers + 2)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _norm(norm: Affine, dense: torch.dtype | None) -> Affine:
    """A norm; beside packed weights in fp32, and copied, so that no file stays open for it."""
    if dense is not None:
        return norm
    bias = None if norm.bias is None else norm.bias.to(torch.float32, copy=True)
    return Affine(weight=norm.weight.to(torch.float32, copy=True), bias=bias)


def _optional_norm(norm: Affine | None, dense: torch.dtype | None) -> Affine | None:
    return None if norm is None else _norm(norm, dense)


def _return_freed_memory() -> None:
    """Give the scratch of encoding back to the system, where the C library can.

    It lies between blobs that stay, and the allocator would keep as much again as they take.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def from_model(
    model: nn.Module, dtype: torch.dtype | None = None, weights: str | None = None
) -> Weights:
    """Copy the weights of a Hugging Face causal LM; arguments as in `build`.

    Where no format is asked for and 4 bits do not do, in the model's own.
    """
    config: Any = model.config
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        tensors = {
            k: v
            for k, v in tensors.items()
            if not k.endswith(("lm_head.weight", "embed_out.weight"))
        }
    return build(config, tensors.get, dtype, weights, next(model.parameters()).dtype)


def from_folder(
    folder: Path, dtype: torch.dtype | None = None, weights: str | None = None
) -> Weights:
    """Read a folder of safetensors and `config.json`.

    Args:
        folder: As `resolve_model` returns.
        dtype: As in `build`.
        weights: As in `build`; if no one asks, weights of a quantised GGUF file are `mixed`, and a
            dense store is bfloat16 where the file is, else float32.

    Raises:
        ModelError: If files are missing or damaged, a weight is not finite, or the machine has too
            little memory.
    """
    from safetensors import SafetensorError, safe_open

    form = _asked_for(dtype, weights)
    config, groups = read_config(folder), read_groups(folder)
    stored = check_weights(folder, config, _BYTES[form or "int4"])
    tied = flag(config, "tie_word_embeddings")

    def lookup(name: str) -> Tensor | None:
        if name not in stored or (tied and name in ("lm_head.weight", "embed_out.weight")):
            return None
        # Opened anew for each tensor: what one mapping has read stays in memory with it.
        with safe_open(stored[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(stored[name].key)
        check_finite(name, tensor, stored[name].file)
        return tensor

    def dense() -> torch.dtype:
        halves = next(iter(stored.values())).dtype == "BF16"
        check_weights(folder, config, _BYTES["bf16" if halves else "fp32"])
        return torch.bfloat16 if halves else torch.float32

    try:
        if form is None and groups is not None and groups.quantised:
            form = "mixed"
        if form is None:
            return _build_exact(config, lookup, dense)
        return _build(config, lookup, form, groups=groups)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}") from error
