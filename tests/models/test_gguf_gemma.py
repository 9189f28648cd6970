"""A GGUF file with a Gemma 3 becomes the folder that transformers' own reading of it would give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests.models.tiny_gguf import GEMMA_LAYERS, GEMMA_SIZE, WIDTH, write_gemma
from vesicle.errors import ModelError
from vesicle.models import gguf
from vesicle.models.checks import check_weights, read_config
from vesicle.models.gguf import convert_once
from vesicle.models.gguf_checks import check_gguf_model
from vesicle.models.gguf_config import config_settings
from vesicle.models.gguf_header import read_gguf_header
from vesicle.models.groups import describe_kinds, read_groups
from vesicle.models.text import Text

KINDS = {"token_embd": Kind.Q8_0, "attn_q": Kind.Q5_0, "attn_k": Kind.Q4_0, "ffn_up": Kind.Q4_1}
WINDOWED, FULL = "sliding_attention", "full_attention"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is converted is not looked at: so a fault of the family is none of the conversion."""
    monkeypatch.setattr(gguf, "_check_result", lambda path, folder: None)


def settings(path: Path, **changes: Any) -> dict[str, Any]:
    file = write_gemma(path / "tiny.gguf", settings={f"gemma3.{k}": v for k, v in changes.items()})
    header = read_gguf_header(file)
    check_gguf_model(file, header)
    return config_settings(file, header)


def logits(folder: Path, ids: list[int], **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([ids])).logits
    return result


@pytest.mark.usefixtures("unchecked")
def test_the_folder_is_what_transformers_reads(tmp_path: Path):
    path = write_gemma(tmp_path / "tiny.gguf", KINDS)
    folder, ids = convert_once(path), [2, *range(40, 52), 7]
    found = logits(folder, ids)
    # Which takes 256 for the size of all heads that scale attention.
    scale = {"query_pre_attn_scalar": GEMMA_SIZE}
    assert torch.equal(found, logits(tmp_path, ids, gguf_file=path.name, **scale))
    # The window of 4 is felt, and not by all layers.
    config = json.loads((folder / "config.json").read_text())
    for types in ([FULL] * GEMMA_LAYERS, [WINDOWED] * GEMMA_LAYERS):
        (folder / "config.json").write_text(json.dumps({**config, "layer_types": types}))
        assert not torch.allclose(found, logits(folder, ids))


@pytest.mark.usefixtures("unchecked")
def test_gains_are_stored_without_the_one_that_files_have_added(tmp_path: Path):
    import gguf as package
    from safetensors.torch import load_file

    path = write_gemma(tmp_path / "tiny.gguf")
    weights = load_file(convert_once(path) / "model.safetensors")
    names = {
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.3.post_attention_norm.weight": "model.layers.3.post_attention_layernorm.weight",
        "blk.3.ffn_norm.weight": "model.layers.3.pre_feedforward_layernorm.weight",
        "blk.3.post_ffw_norm.weight": "model.layers.3.post_feedforward_layernorm.weight",
        "blk.6.attn_q_norm.weight": "model.layers.6.self_attn.q_norm.weight",
        "blk.6.attn_k_norm.weight": "model.layers.6.self_attn.k_norm.weight",
    }
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in package.GGUFReader(path).tensors}
    for name, ours in names.items():
        assert torch.equal(weights[ours], stored[name] - 1), name


@pytest.mark.usefixtures("unchecked")
def test_groups_are_kept(tmp_path: Path):
    folder = convert_once(write_gemma(tmp_path / "tiny.gguf", KINDS))
    assert describe_kinds(folder) == "F32 28, Q4_0 7, Q4_1 7, Q5_0 7, Q8_0 1"
    groups = read_groups(folder)
    assert groups is not None
    found = groups.get("model.layers.6.self_attn.q_proj.weight")
    assert found is not None
    assert found.scale.shape == (4 * GEMMA_SIZE, WIDTH // 32)


def test_the_family_finds_all_it_needs(tmp_path: Path):
    """From the file to a folder that is checked as any is, and read without transformers."""
    folder = convert_once(write_gemma(tmp_path / "tiny.gguf", KINDS))
    config = read_config(folder)
    assert config.model_type == "gemma3_text"
    assert check_weights(folder, config)


def test_every_setting_is_spelled_out(tmp_path: Path):
    found = settings(tmp_path)
    assert found == {
        "model_type": "gemma3_text",
        "max_position_embeddings": 64,
        "num_hidden_layers": GEMMA_LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": GEMMA_SIZE,
        "rms_norm_eps": pytest.approx(1e-6),
        "tie_word_embeddings": True,
        "vocab_size": found["vocab_size"],
        "bos_token_id": 2,
        "eos_token_id": [1, 5],
        "pad_token_id": 0,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [WINDOWED] * 5 + [FULL, WINDOWED],
        "sliding_window": 4,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 1_000_000.0},
            WINDOWED: {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "query_pre_attn_scalar": GEMMA_SIZE,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


def test_windows(tmp_path: Path):
    """Every so many layers attends to all; without a window all do."""
    other = settings(tmp_path, **{"attention.sliding_window_pattern": 3})
    assert other["layer_types"] == [WINDOWED, WINDOWED, FULL] * 2 + [WINDOWED]
    for window in (0, None):
        without = settings(tmp_path, **{"attention.sliding_window": window})
        assert without["layer_types"] == [FULL] * GEMMA_LAYERS
        assert without["sliding_window"] == without["max_position_embeddings"]


def test_rotary_bases_and_scaling(tmp_path: Path):
    scaling = {"rope.freq_base_swa": 5000.0, "rope.scaling.type": "linear"}
    found = settings(tmp_path, **scaling, **{"rope.scaling.factor": 8.0})["rope_parameters"]
    assert found[FULL] == {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
    assert found[WINDOWED] == {"rope_type": "default", "rope_theta": 5000.0}
    for ignored in ({"type": "none", "factor": 8.0}, {"type": "linear", "factor": 1.0}):
        named = {f"rope.scaling.{key}": value for key, value in ignored.items()}
        found = settings(tmp_path, **named)["rope_parameters"]
        assert found[FULL] == {"rope_type": "default", "rope_theta": 1_000_000.0}


def test_the_largest_model_scales_attention_by_its_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vesicle.models.gguf_config._LARGEST_LAYERS", GEMMA_LAYERS)
    assert settings(tmp_path)["query_pre_attn_scalar"] == WIDTH // 4


def test_a_named_end_of_turn_stands(tmp_path: Path):
    ends = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 4}
    file = write_gemma(tmp_path / "tiny.gguf", settings=ends)
    assert config_settings(file, read_gguf_header(file))["eos_token_id"] == [1, 4]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"final_logit_softcapping": 30.0}, "softcapping is 30.0, which a GGUF .* allowed: 0.0"),
    ({"attn_logit_softcapping": 50.0}, "softcapping is 50.0, which a GGUF .* allowed: 0.0"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "scales its rotary frequencies"),
    ({"rope.scaling.factor": 0.0}, "scaling.factor is 0.0; allowed: numbers above 0"),
    ({"rope.scale_linear": 4.0}, "scales its rotary frequencies"),
    ({"rope.freq_base_swa": -1.0}, "freq_base_swa is -1.0; allowed: numbers above 0"),
    ({"attention.sliding_window": 2.0}, "sliding_window is 2.0; allowed: whole numbers from 0"),
    ({"attention.sliding_window_pattern": 0}, "pattern is 0; allowed: whole numbers from 1"),
    ({"attention.sliding_window_pattern": [True, False]}, "pattern is a list of 2 items; allowed"),
    ({"attention.scale": 0.1}, "gemma3.attention.scale is 0.1"),
    ({"attention.key_length": 8}, "value_length is 16; allowed: 8"),
    ({"vision.block_count": 2}, r"holds a part for images as well \(gemma3.vision.block_count\)"),
    ({"mm.tokens_per_image": 2}, r"holds a part for images as well \(gemma3.mm.tokens_per_image\)"),
    ({"altup.num_inputs": 4}, "the setting gemma3.altup.num_inputs"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_carried_over_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ModelError, match=message):
        settings(tmp_path, **changes)


def test_windows_of_other_architectures_are_refused(tmp_path: Path):
    from tests.models.tiny_gguf import write_gguf

    for key, value in (("attention.sliding_window", 4), ("rope.freq_base_swa", 5000.0)):
        file = write_gguf(tmp_path / "tiny.gguf", settings={f"llama.{key}": value})
        with pytest.raises(ModelError, match=f"llama.{key}"):
            check_gguf_model(file, read_gguf_header(file))


PIECES = {
    "hello the cat": ["hello", " the", " ", "c", "a", "t"],
    "the the": ["t", "he", " the"],
    "a\n\n\nb": ["a", "\n\n", "\n", "b"],
    "a    the": ["a", "   ", " the"],
    "<start_of_turn>the": ["<start_of_turn>", "t", "he"],
}


@pytest.mark.usefixtures("unchecked")
def test_text_is_split_as_llama_cpp_splits_it(tmp_path: Path):
    from transformers import AutoTokenizer

    path = write_gemma(tmp_path / "tiny.gguf")
    folder = convert_once(path)
    text, tokenizer = Text.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for string, pieces in PIECES.items():
        ids = text.encode(string)
        assert text.pieces(ids) == ["<bos>", *pieces]
        assert tokenizer(string).input_ids == ids
    for string in ("hello  the\n\n\ncat ", " é日\t"):
        assert text.decode(text.encode(string)) == string
    assert len(text.encode("é")) == 3
    assert text.eos_ids == {1, 5}
