"""A GGUF file with a random Llama of one layer and a byte-level tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, FFN, HEADS = 32, 64, 4


def write_gguf(
    path: Path,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the file.

    Args:
        path: Where to.
        kinds: Types of tensors by name (without "blk.0."), where they are not F32.
        settings: Metadata to add or replace, by key; None leaves a key out.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
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
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    layer = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
    layer |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    layer |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    rng = np.random.default_rng(0)
    for name, shape in (shapes | {f"blk.0.{name}": s for name, s in layer.items()}).items():
        weights = rng.standard_normal(shape).astype(np.float32)
        kind = (kinds or {}).get(name.removeprefix("blk.0."))
        if kind is None:
            writer.add_tensor(f"{name}.weight", weights)
        else:
            packed = gguf.quants.quantize(weights, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for key, value in (settings or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            # As converters write them: counts and ids without a sign.
            if kind == gguf.GGUFValueType.INT32:
                kind = gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
