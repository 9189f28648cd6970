"""A model folder with a random Llama of two layers, written without PyTorch or transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

WIDTH, FFN, HEADS, KV_HEADS, VOCABULARY, LAYERS = 16, 24, 4, 2, 20, 2
SIZE = WIDTH // HEADS
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def tensors() -> dict[str, NDArray[np.float32]]:
    """The model's weights by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for n in range(LAYERS):
        p = f"model.layers.{n}"
        shapes |= {
            f"{p}.input_layernorm.weight": (WIDTH,),
            f"{p}.self_attn.q_proj.weight": (HEADS * SIZE, WIDTH),
            f"{p}.self_attn.k_proj.weight": (KV_HEADS * SIZE, WIDTH),
            f"{p}.self_attn.v_proj.weight": (KV_HEADS * SIZE, WIDTH),
            f"{p}.self_attn.o_proj.weight": (WIDTH, HEADS * SIZE),
            f"{p}.post_attention_layernorm.weight": (WIDTH,),
            f"{p}.mlp.gate_proj.weight": (FFN, WIDTH),
            f"{p}.mlp.up_proj.weight": (FFN, WIDTH),
            f"{p}.mlp.down_proj.weight": (WIDTH, FFN),
        }
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_folder(
    folder: Path,
    config: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    *,
    sharded: bool = False,
) -> Path:
    """Write the folder.

    Args:
        folder: Made if missing.
        config: Instead of `CONFIG`.
        weights: Instead of `tensors()`.
        sharded: Whether the weights are spread over two files with an index.
    """
    folder.mkdir(exist_ok=True)
    weights = tensors() if weights is None else weights
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if not sharded:
        save_file(weights, folder / "model.safetensors")
        return folder
    parts = [
        {name: value for name, value in weights.items() if (".layers.1." in name) == bool(n)}
        for n in range(2)
    ]
    for part, name in zip(parts, SHARDS, strict=True):
        save_file(part, folder / name)
    weight_map = {tensor: SHARDS[n] for n, part in enumerate(parts) for tensor in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
