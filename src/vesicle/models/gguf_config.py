"""The Hugging Face config of the model in a GGUF file, made from the file's header alone.

Every setting is spelled out: no default of a class may stand where llama.cpp means something else.
What llama.cpp knows of an architecture without reading it in the file is said here. Of Gemma 3:

- every sixth layer attends to all that came before, the others through a window, unless the file
  has another period or no window, and then all layers do;
- layers with a window rotate by a base of their own, 10,000, and are not scaled;
- attention is scaled by one over the root of the head size; in the largest model (62 layers) by one
  over the root of width / heads;
- `<end_of_turn>` ends an answer, whether or not the file names it.

That embeddings are scaled by the root of the width, and that gains are stored with 1 added, is what
transformers' class and its reader of GGUF files know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesicle.models.gguf_header import GgufArray, GgufHeader, read_array
from vesicle.models.gguf_tokenizer import read_tokenizer_settings

_LOCAL_BASE = 10_000.0
_PERIOD = 6
_LARGEST_LAYERS = 62
_END_OF_TURN = "<end_of_turn>"


def config_settings(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The settings of a config, `model_type` among them.

    Args:
        path: The GGUF file.
        header: What `read_gguf_header` gave for it, checked by `check_gguf_model`.

    Returns:
        Settings by the names that transformers has for them.

    Raises:
        ModelError: The file cannot be read.
    """
    arch = str(header.metadata["general.architecture"])
    heads, width = _number(header, "attention.head_count"), _number(header, "embedding_length")
    tokenizer = read_tokenizer_settings(path, header)
    ids, ends = tokenizer.ids, tokenizer.end_ids
    if arch == "gemma3" and "eot" not in ids:
        ends = list(dict.fromkeys([*ends, *_ids_of(path, header, _END_OF_TURN)]))
    settings = {
        "model_type": arch,
        "max_position_embeddings": _number(header, "context_length"),
        "num_hidden_layers": _number(header, "block_count"),
        "hidden_size": width,
        "intermediate_size": _number(header, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(header, "attention.head_count_kv", heads),
        "head_dim": _number(header, "attention.key_length", width // heads),
        "rms_norm_eps": _number(header, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding"),
    }
    rope = {"rope_type": "default", "rope_theta": _number(header, "rope.freq_base", 10_000.0)}
    if arch == "gemma3":
        return settings | _gemma3(header, rope, settings)
    return settings | {"hidden_act": "silu", "rope_parameters": rope}


def _gemma3(header: GgufHeader, rope: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What a config of Gemma 3 has beyond or instead of the others'."""
    layers, size = settings["num_hidden_layers"], settings["head_dim"]
    window = _number(header, "attention.sliding_window", 0)
    period = _number(header, "attention.sliding_window_pattern", _PERIOD) if window else 1
    factor = _number(header, "rope.scaling.factor", 1.0)
    if _number(header, "rope.scaling.type", "linear") == "linear" and factor != 1:
        rope = rope | {"rope_type": "linear", "factor": factor}
    local = {
        "rope_type": "default",
        "rope_theta": _number(header, "rope.freq_base_swa", _LOCAL_BASE),
    }
    if layers == _LARGEST_LAYERS:
        size = settings["hidden_size"] // settings["num_attention_heads"]
    kinds = ("full_attention", "sliding_attention")
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [kinds[(n + 1) % period != 0] for n in range(layers)],
        # Without one, transformers' class wants a number all the same.
        "sliding_window": window or settings["max_position_embeddings"],
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "query_pre_attn_scalar": size,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


def _number(header: GgufHeader, key: str, default: Any = None) -> Any:
    """A setting of the file's architecture."""
    return header.metadata.get(f"{header.metadata['general.architecture']}.{key}", default)


def _ids_of(path: Path, header: GgufHeader, token: str) -> list[int]:
    """The token's id, or nothing."""
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GgufArray)
    texts: list[Any] = read_array(path, tokens)
    return [texts.index(token)] if token in texts else []
