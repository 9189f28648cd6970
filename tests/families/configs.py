"""Tiny models of every type as folders whose `config.json` is spelled in any way."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import CONFIGS, randomise

TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma3_text": "gemma3",
    "gpt_neox": "gpt_neox_parallel",
}
"""Model types, and the tiny config of each."""
DROP = object()
"""In place of a value: the setting is left out."""


def values_of(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a tiny model, changed; what follows from other settings is left out."""
    values = json.loads(CONFIGS[TYPES[model_type]]().to_json_string())
    if model_type != "gemma3_text":  # whose pattern would have no full layer among three
        values.pop("layer_types", None)
    if model_type == "gpt_neox":
        values["hidden_size"] = 64  # so that a quarter of a head is even
        # As in every checkpoint there is; the class of transformers 5.0 forgets the other spelling.
        values["rotary_pct"] = values["rope_parameters"].pop("partial_rotary_factor")
    return {name: value for name, value in (values | changes).items() if value is not DROP}


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    """A folder with a config and no weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tiny_weights(folder: Path, values: dict[str, Any]) -> Any:
    """A random model of a config, saved with it."""
    write_config(folder, values)
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.float32
    model: Any = AutoModelForCausalLM.from_config(config)
    randomise(model, 0)
    model.save_pretrained(folder)
    write_config(folder, values)  # in the spelling that was given
    return model.double().eval()


def model_folder(folder: Path, weights: Path, values: dict[str, Any]) -> Path:
    """A folder with a config and with weights that lie elsewhere."""
    write_config(folder, values)
    (folder / "model.safetensors").symlink_to(weights / "model.safetensors")
    return folder
