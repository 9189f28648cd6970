"""Scales and lows of the blocks in a GGUF file, saved beside the weights they are unpacked to.

Of each block only its head is read; d and m are its fp16 numbers:

    kind         block  weight                     scale  low
    Q4_0          32    d (code - 8)               d      -8 d
    Q5_0          32    d (code - 16)              d      -16 d
    Q8_0          32    d (code - 128)             d      -128 d
    Q4_1, Q5_1    32    d code + m                 d      m
    Q4_K, Q5_K    256   d s code - m t, for each   d s    -m t
                        32 with s, t of 6 bits

Codes of Q8_0 are stored as signed bytes; here they start at 0. Products with s and t take 17 bits,
which fp32 holds and fp16 does not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.models.finite import check_finite
from vesicle.models.gguf_header import GgufHeader, GgufTensor
from vesicle.models.groups import BITS, GROUP, GROUPS_FILE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_PLACES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
_ZEROS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
"""The code that stands for 0, where it is the same in every block."""
_CHECKED_ROWS = 64


def read_blocks(path: Path, tensor: GgufTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and lows of a matrix, in the file's order of rows.

    Args:
        path: The file.
        tensor: Of a kind among `BITS`.

    Returns:
        Two arrays (out, in / 32).
    """
    import numpy as np

    n_out, n_in = tensor.shape
    long = tensor.kind.endswith("_K")
    blocks = n_out * n_in // (8 * GROUP if long else GROUP)
    raw = np.memmap(path, np.uint8, "r", tensor.start, (blocks, tensor.n_bytes // blocks))
    scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
    if zero := _ZEROS.get(tensor.kind):
        low = -zero * scale
    else:
        low = raw[:, 2:4].copy().view(np.float16).astype(np.float32)
    if long:
        factors, offsets = _six_bits(raw[:, 4:16])
        scale, low = scale * factors, -low * offsets
    return scale.reshape(n_out, -1), low.reshape(n_out, -1)


def write_groups(path: Path, header: GgufHeader, folder: Path, weights: dict[str, Tensor]) -> None:
    """Save the groups of a GGUF file's matrices into the folder it is converted to.

    Args:
        path: The GGUF file.
        header: What `read_gguf_header` gave for it, checked by `check_gguf_model`.
        folder: Gets `groups.safetensors`.
        weights: What the file was unpacked to, by name.

    Raises:
        ModelError: A scale is not finite.
        ValueError: The groups do not give the weights back: rows were ordered in another way.
    """
    import torch
    from safetensors.torch import save_file

    numbers: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for gguf_name, tensor in header.tensors.items():
        if len(tensor.shape) != 2:
            continue
        name = _name(gguf_name)
        kinds[name] = tensor.kind
        if tensor.kind not in BITS:
            continue
        heads = _interleaved_heads(header, gguf_name)
        scale, low = (torch.from_numpy(_ordered(x, heads)) for x in read_blocks(path, tensor))
        for part, values in (("scale", scale), ("low", low)):
            check_finite(f"{gguf_name} ({part} of its groups)", values, path)
            numbers[f"{name}.{part}"] = _smallest(values)
        _check_given_back(name, weights[name], scale, low, BITS[tensor.kind])
    save_file(numbers, folder / GROUPS_FILE, {"kinds": json.dumps(kinds)})


def _name(gguf_name: str) -> str:
    """A matrix's name in the folder."""
    if match := _LAYER.fullmatch(gguf_name):
        return f"model.layers.{match[1]}.{_PLACES[match[2]]}.weight"
    return _OUTSIDE[gguf_name]


def _six_bits(packed: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The eight factors and eight offsets of each block, from (blocks, 12) bytes.

    Bytes 0-3 hold the first four factors and bytes 4-7 the first four offsets, in their lower six
    bits. Bytes 8-11 hold the lower four bits of the others, a factor and an offset each; their
    upper two are the upper two of bytes 0-3 and 4-7.
    """
    import numpy as np

    early = packed[:, :8] & 63
    upper = packed[:, :8] >> 6 << 4
    factors = np.hstack([early[:, :4], (packed[:, 8:] & 15) | upper[:, :4]])
    offsets = np.hstack([early[:, 4:], (packed[:, 8:] >> 4) | upper[:, 4:]])
    return factors.astype(np.float32), offsets.astype(np.float32)


def _interleaved_heads(header: GgufHeader, gguf_name: str) -> int:
    """Heads of a matrix whose rows llama.cpp interleaves within each head; 0 for others."""
    place = gguf_name.split(".")[-2]
    if header.metadata["general.architecture"] != "llama" or place not in ("attn_q", "attn_k"):
        return 0
    key = "head_count" if place == "attn_q" else "head_count_kv"
    heads = header.metadata[f"llama.attention.{key}"]
    assert isinstance(heads, int)
    return heads


def _ordered(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in the order of the folder: where pairs alternate, all first halves come first."""
    if not heads:
        return values
    n_out, groups = values.shape
    pairs = values.reshape(heads, n_out // heads // 2, 2, groups)
    return pairs.swapaxes(1, 2).reshape(n_out, groups)


def _smallest(values: Tensor) -> Tensor:
    """In fp16 if that holds every number."""
    import torch

    halves = values.half()
    return halves if torch.equal(halves.float(), values) else values


def _check_given_back(name: str, weight: Tensor, scale: Tensor, low: Tensor, bits: int) -> None:
    """Compare some rows with what they were unpacked to, all over the matrix."""
    import torch

    rows = torch.linspace(0, len(weight) - 1, min(len(weight), _CHECKED_ROWS)).long()
    grouped = weight[rows].unflatten(1, (-1, GROUP))
    step, start = scale[rows, :, None], low[rows, :, None]
    codes = ((grouped - start) / torch.where(step == 0, 1, step)).round_().clamp_(0, 2**bits - 1)
    # Of rounding a sum of two numbers, each of which may be larger than the sum.
    allowed = 1e-6 * (step.abs() * 2**bits + start.abs())
    if bool(((codes * step + start - grouped).abs() > allowed).any()):
        raise ValueError(f"the groups of {name} do not give its weights back")
