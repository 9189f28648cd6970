"""A base model saved alone, whose tensors have no prefix, is the causal LM if its head is tied."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.configs import TYPES
from tests.parity.test_engine import executed
from tests.tiny import tiny_model, tokens
from vesicle.engine import Engine, weights
from vesicle.errors import ModelError
from vesicle.families import find_family
from vesicle.models.checks import check_weights, read_config
from vesicle.models.resolve import resolve_model
from vesicle.plan import Dense


def tie(folder: Path, tied: bool) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": tied}))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_model_saved_alone(model_type: str, sharded: bool, tmp_path: Path):
    model = tiny_model(TYPES[model_type], dtype=torch.float32)
    model.save_pretrained(tmp_path / "whole")
    tie(tmp_path / "whole", True)
    folder = tmp_path / "base"
    size = "20KB" if sharded else "1GB"
    model.base_model.save_pretrained(folder, max_shard_size=size)
    tie(folder, True)
    stored = check_weights(folder, read_config(folder))
    prefix = find_family(model.config).prefix
    assert all(name == prefix + tensor.key for name, tensor in stored.items())
    assert not any(tensor.key.startswith(prefix) for tensor in stored.values())
    assert resolve_model(folder) == folder
    ids = tokens(30)
    first, second = (
        executed(Engine(weights.from_folder(f)), ids, Dense())[0]
        for f in (folder, tmp_path / "whole")
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_base_model_without_a_head(model_type: str, tmp_path: Path):
    tiny_model(TYPES[model_type]).base_model.save_pretrained(tmp_path)
    tie(tmp_path, False)
    with pytest.raises(ModelError, match=r"lack the head, and .*false.*: they are of a base model"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_head_beside_tensors_without_prefix(model_type: str, tmp_path: Path):
    model = tiny_model(TYPES[model_type], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    ids = tokens(30)
    expected = executed(Engine(weights.from_folder(tmp_path)), ids, Dense())[0]
    tensors, prefix = load_file(tmp_path / "model.safetensors"), find_family(model.config).prefix
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    assert torch.equal(executed(Engine(weights.from_folder(tmp_path)), ids, Dense())[0], expected)


def test_tensors_of_other_names_are_named(tmp_path: Path):
    """They are all there, but for another model's code."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {f"transformer.{name}": tensor for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ModelError, match=r"no tensors named as .* but others, such as 'transfo"):
        resolve_model(tmp_path)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path):
    model = tiny_model("llama", dtype=torch.float32).base_model
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"lack 'model\.layers\.1\.mlp\.up_proj\.weight'; the mode"
    ):
        resolve_model(tmp_path)
