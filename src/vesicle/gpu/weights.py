"""Weights on the GPU: channel-major, in float32, bfloat16, 8 or 4 bits.

An int8 or int4 weight is w = low + scale * code, with one low and one scale (bfloat16 would lose
the exactness below, so float16) for each output and group of 32 input channels. Two 4-bit codes
share a byte, along the outputs: the even output in the low half. The LM head, which 4 bits would
hurt most, has 8 in either format. Weights that came from an
asymmetric 4-bit group-32 format (GGUF Q4_1) are given back to within the rounding of scale and low.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.errors import ModelError
from vesicle.families import DecoderConfig, find_family
from vesicle.families.base import Affine, Lookup

GROUP = 32
FORMATS = {"fp32": 0, "bf16": 0, "int8": 1, "int4": 2}
"""Name to the kernels' number."""
STORED_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight (in, out) in one of `FORMATS`.

    Attributes:
        data: (in, out) floats or codes, or (in, out / 2) bytes of two codes.
        scale: (in / 32 rounded up, out); one number for float formats.
        low: The same.
        bias: (out,) or None.
        n_in: Input channels.
        n_out: Outputs.
        format: A key of `FORMATS`.
    """

    data: Tensor
    scale: Tensor
    low: Tensor
    bias: Tensor | None
    n_in: int
    n_out: int
    format: str

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, name: str, device: torch.device) -> Packed:
        """Encode a channel-major float weight (in, out).

        Raises:
            ModelError: If 4 bits are asked for an odd number of outputs.
        """
        n_in, n_out = weight.shape
        none = torch.zeros(1, dtype=torch.float16, device=device)
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        bias = None if bias is None else bias.to(device, torch.float32)
        data, scale, low = weight.to(device, dtype).contiguous(), none, none
        if name in ("int8", "int4"):
            if name == "int4" and n_out % 2:
                raise ModelError(f"a projection has {n_out} outputs; int4 needs an even number")
            codes, scale, low = _quantise(weight.to(device, torch.float32), STORED_BITS[name])
            data = codes if name == "int8" else codes[:, ::2] | (codes[:, 1::2] << 4)
        return cls(
            data=data.contiguous(),
            scale=scale,
            low=low,
            bias=bias,
            n_in=n_in,
            n_out=n_out,
            format=name,
        )

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.low))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (in, out) as floats."""
        if FORMATS[self.format] == 0:
            return self.data.to(dtype)
        codes = self.data
        if self.format == "int4":
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        group = torch.arange(self.n_in, device=codes.device) // GROUP
        return (self.low.float()[group] + self.scale.float()[group] * codes).to(dtype)


def _quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (in, out) uint8, and scale and low (groups, out) fp16, of a float weight (in, out)."""
    n_in, n_out = weight.shape
    groups = -(-n_in // GROUP)
    # Repeating the last channel leaves a short group's range as it is.
    padded = torch.cat([weight, weight[-1:].expand(groups * GROUP - n_in, n_out)])
    grouped = padded.view(groups, GROUP, n_out)
    low = grouped.amin(1).half()
    scale = ((grouped.amax(1) - low.float()) / (2**bits - 1)).half()
    steps = (grouped - low.float()[:, None]) / scale.float()[:, None].clamp(min=1e-12)
    codes = steps.round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes.view(-1, n_out)[:n_in].contiguous(), scale, low


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer; values, keys, queries side by side in `attention_in`, gate and up in `ffn_in`."""

    attention_gain: Tensor
    attention_in: Packed
    attention_out: Packed
    ffn_gain: Tensor
    ffn_in: Packed
    ffn_out: Packed


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A decoder on a device."""

    config: DecoderConfig
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_gain: Tensor
    head: Packed
    format: str

    @property
    def n_bytes(self) -> int:
        """Bytes of the projections and the head."""
        packed = [
            p for w in self.layers for p in (w.attention_in, w.attention_out, w.ffn_in, w.ffn_out)
        ]
        return sum(p.n_bytes for p in [*packed, self.head])


def build(config: Any, lookup: Lookup, name: str, device: torch.device) -> Weights:
    """Pack the parameters that `lookup` finds for a Hugging Face config.

    Raises:
        ModelError: If the format is unknown or the architecture is none of Llama's shape.
    """
    if name not in FORMATS:
        raise ModelError(f"weights are {name!r}; allowed: {', '.join(FORMATS)}")
    family = find_family(config)
    decoder = family.decoder_config(config)
    size = 4 if name == "fp32" else 2
    bits = STORED_BITS[name] if FORMATS[name] else None
    shape = replace(
        decoder.shape, weight_bytes=size, kv_bytes=size, stored_bits=bits, head_bits=bits and 8
    )
    decoder = replace(decoder, shape=shape)
    _check(decoder)
    dtype = torch.float32 if name == "fp32" else torch.bfloat16

    def joined(*parts: Affine, name: str = name) -> Packed:
        # Joined where the parts are, packed on the device: peak memory there is one projection.
        weight = torch.cat([p.weight.detach() for p in parts]).t()
        bias = None
        if any(p.bias is not None for p in parts):
            bias = torch.cat(
                [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
            )
        return Packed.pack(weight, bias, name, device)

    layers = []
    for number in range(decoder.shape.n_layers):
        t = family.layer_tensors(decoder, number, lookup)
        if t.query_norm is not None or t.gate is None:
            raise ModelError("the GPU engine has no norms on queries and keys (Qwen3)")
        layers.append(
            LayerWeights(
                attention_gain=t.attention_norm.weight.to(device, torch.float32),
                attention_in=joined(t.value, t.key, t.query),
                attention_out=joined(t.out),
                ffn_gain=t.ffn_norm.weight.to(device, torch.float32),
                ffn_in=joined(t.gate, t.up),
                ffn_out=joined(t.down),
            )
        )
    m = family.model_tensors(lookup)
    return Weights(
        config=decoder,
        embedding=m.embedding.to(device, dtype),
        layers=tuple(layers),
        final_gain=m.final_norm.weight.to(device, torch.float32),
        head=joined(
            Affine(weight=m.head, bias=m.head_bias), name="int8" if FORMATS[name] else name
        ),
        format=name,
    )


def _check(config: DecoderConfig) -> None:
    """Refuse what the kernels do not compute."""
    refusals = {
        "LayerNorm": not config.rms_norm,
        "a parallel residual": config.parallel_residual,
        f"the activation {config.activation!r}": config.activation != "silu",
        "a plain FFN": not config.shape.gated,
        "rotary phases over a part of the head": 2 * len(config.rotary_frequencies)
        != config.shape.head_size,
    }
    for what, found in refusals.items():
        if found:
            raise ModelError(
                f"the GPU engine runs Llama's shape (RMSNorm, rotary, SiLU-gated FFN); "
                f"this model has {what}"
            )


def from_model(model: nn.Module, name: str, device: torch.device) -> Weights:
    """Pack a Hugging Face causal LM."""
    config: Any = model.config
    tied = config.tie_word_embeddings
    tensors = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    return build(config, tensors.get, name, device)


_BYTES = {"int4": 0.625, "int8": 1.125, "bf16": 2.0, "fp32": 4.0}
"""Bytes that a weight takes in each format, for a check of memory before anything is read."""


def from_folder(folder: Path, name: str, device: torch.device) -> Weights:
    """Pack a folder of safetensors and `config.json`, tensor by tensor.

    Raises:
        ModelError: If files are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    from vesicle.models.checks import check_weights, read_config

    config = read_config(folder)
    stored = check_weights(folder, config, _BYTES[name])
    tied = config.tie_word_embeddings
    try:
        with ExitStack() as stack:
            files = {tensor.file for tensor in stored.values()}
            opened = {f: stack.enter_context(safe_open(f, framework="pt")) for f in files}

            def lookup(key: str) -> Tensor | None:
                if key not in stored or (tied and key == "lm_head.weight"):
                    return None
                tensor: Tensor = opened[stored[key].file].get_tensor(stored[key].key)
                return tensor

            return build(config, lookup, name, device)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}") from error
