"""GGUF files with small random models: a Llama, byte-level, and a Gemma 3 with SentencePiece."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, FFN, HEADS = 32, 64, 4
GEMMA_LAYERS, GEMMA_SIZE = 7, 16
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def write_gguf(
    path: Path,
    kinds: dict[str, Kind] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    width: int = WIDTH,
    ffn: int = FFN,
    kv_heads: int = HEADS,
) -> Path:
    """Write a file with a Llama of one layer.

    Args:
        path: Where to.
        kinds: Types of tensors by name (without "blk.0."), where they are not F32.
        settings: Metadata to add or replace, by key; None leaves a key out.
        width: Of the hidden state.
        ffn: Width of the FFN.
        kv_heads: Heads of keys and values.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), width)}
    shapes["output_norm"] = (width,)
    layer: dict[str, tuple[int, ...]]
    layer = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
    layer |= dict.fromkeys(("attn_k", "attn_v"), (width * kv_heads // HEADS, width))
    layer |= {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    layer |= {"attn_norm": (width,), "ffn_norm": (width,)}
    return _write(
        writer, path, shapes | {f"blk.0.{n}": s for n, s in layer.items()}, kinds, settings
    )


def write_gemma(
    path: Path, kinds: dict[str, Kind] | None = None, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write a file with a Gemma 3 of seven layers, the sixth of which has no window.

    Args:
        path: Where to.
        kinds: Types of tensors by name (without "blk.N."), where they are not F32.
        settings: Metadata to add or replace, by key; None leaves a key out.
    """
    whole = ["\n", "\n\n", "  ", "   "]
    letters = ["▁", *"abcdehlot", "▁t", "he", "ll", "▁the", "hell", "hello", "日"]
    tokens = [*GEMMA_TOKENS, *whole, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    before = len(tokens) - len(letters)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(GEMMA_LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(GEMMA_SIZE)
    writer.add_value_length(GEMMA_SIZE)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(4)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * before + [-float(n) for n in range(len(letters))])
    writer.add_token_types([3] * 6 + [4] * 4 + [6] * 256 + [1] * len(letters))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), WIDTH)}
    shapes["output_norm"] = (WIDTH,)
    layer: dict[str, tuple[int, ...]]
    layer = {"attn_q": (HEADS * GEMMA_SIZE, WIDTH), "attn_output": (WIDTH, HEADS * GEMMA_SIZE)}
    layer |= dict.fromkeys(("attn_k", "attn_v"), (GEMMA_SIZE, WIDTH))
    layer |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    names = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    layer |= dict.fromkeys(names, (WIDTH,)) | dict.fromkeys(
        ("attn_q_norm", "attn_k_norm"), (GEMMA_SIZE,)
    )
    shapes |= {f"blk.{n}.{name}": s for n in range(GEMMA_LAYERS) for name, s in layer.items()}
    return _write(writer, path, shapes, kinds, settings)


def packed(weights: NDArray[np.float32], kind: Kind, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks of a kind: of these weights, or random ones where the package cannot quantise."""
    if kind not in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        return gguf.quants.quantize(weights, kind)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weights.shape
    raw = rng.integers(0, 256, (rows, columns // block, n_bytes), np.uint8)
    heads = rng.uniform(0.001, 0.002, (rows, columns // block, 2)).astype(np.float16)
    if kind == Kind.Q6_K:
        raw[..., -2:] = heads[..., :1].view(np.uint8)
    else:
        raw[..., :4] = heads.view(np.uint8)
    return raw.reshape(rows, -1)


def _write(
    writer: gguf.GGUFWriter,
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    kinds: dict[str, Kind] | None,
    settings: Mapping[str, Any] | None,
) -> Path:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        weights = rng.standard_normal(shape).astype(np.float32)
        kind = (kinds or {}).get(name.split(".")[-1])
        if kind is None:
            writer.add_tensor(f"{name}.weight", weights)
        else:
            writer.add_tensor(f"{name}.weight", packed(weights, kind, rng), raw_dtype=kind)
    for key, value in (settings or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            value_type = gguf.GGUFValueType.get_type(value)
            # As converters write them: counts and ids without a sign.
            if value_type == gguf.GGUFValueType.INT32:
                value_type = gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, value_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
