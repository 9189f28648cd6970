"""Each setting of every config has the effect that the table in `docs/families.md` says it has."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.families.configs import TYPES, model_folder, tiny_weights, values_of, write_config
from tests.parity.test_engine import FP64, close, executed
from tests.tiny import tokens
from vesicle.activations import ACTIVATIONS
from vesicle.engine import Engine, weights
from vesicle.errors import ModelError
from vesicle.families import SETTINGS, find_family, settings_of, supported_model_types
from vesicle.families.settings import settings_table
from vesicle.models.checks import check_weights, read_config
from vesicle.plan import Dense

DOCS = Path(__file__).parents[2] / "docs"
TEMPORARY = ("name_or_path", "attn_implementation", "experts_implementation", "num_labels")
"""Arguments of a class that it does not write into `config.json`, or only derives."""
SCALED = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
CHANGED: dict[str, list[Any]] = {
    "num_hidden_layers": [2],
    "hidden_size": [80],
    "num_attention_heads": [2],
    "num_key_value_heads": [1],
    "head_dim": [8],
    "intermediate_size": [64],
    "vocab_size": [99],
    "hidden_act": [*ACTIVATIONS],
    "hidden_activation": [*ACTIVATIONS],
    "rms_norm_eps": [0.5],
    "layer_norm_eps": [0.5],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "use_parallel_residual": [True, False],
    "max_position_embeddings": [256],
    "rope_parameters": [SCALED],
    "no_rope_layers": [[0, 1, 1]],
    "sliding_window": [24, 4096],
    "query_pre_attn_scalar": [7],
    "final_logit_softcapping": [None, 3.0],
    "use_sliding_window": [False],
    "layer_types": [["full_attention"] * 3],
}
"""Values for settings that are carried over."""
IDLE: dict[str, Any] = {
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.5,
    "hidden_dropout": 0.5,
    "classifier_dropout": 0.5,
    "initializer_range": 0.5,
    "pretraining_tp": 2,
    "problem_type": "regression",
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "use_cache": False,
    "output_hidden_states": True,
    "output_attentions": False,
    "tie_last_hidden_states": True,
    "return_dict": False,
    "is_decoder": True,
    "is_encoder_decoder": True,
    "chunk_size_feed_forward": 7,
    "bos_token_id": 5,
    "eos_token_id": [5, 6],
    "pad_token_id": 5,
    "architectures": ["Other"],
    "transformers_version": "4.0.0",
    "dtype": "float32",
    "torch_dtype": "float32",
    "_name_or_path": "x",
    "_sliding_window_pattern": 3,
}
REFUSED: dict[str, list[Any]] = {
    "quantization_config": [{"quant_method": "gptq"}],
    "per_layer_config": [{"1": {"intermediate_size": 8}}],
    "no_rope_layers": [[0, 1, 1], 3],
    "head_dim": [8],
    "rotary_pct": [0.25],
    "num_experts": [8],
    "num_local_experts": [8],
}
"""The others are refused when they are true, or 0.5."""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers comments on configs


def cases(role: str) -> list[tuple[str, str]]:
    return [(t, s.name) for t in TYPES for s in settings_of(t).values() if s.role == role]


def read(folder: Path) -> str:
    """All that is made of a config."""
    config = read_config(folder)
    family = find_family(config)
    made = (family.decoder_config(config), family.presence(config), config.tie_word_embeddings)
    return str(made)


def test_each_setting_is_there_once_for_each_type():
    rows = [(t, s.name) for s in SETTINGS for t in s.model_types]
    assert len(rows) == len(set(rows))
    assert {t for t, _ in rows} == set(TYPES) == set(supported_model_types())


@pytest.mark.parametrize("model_type", TYPES)
def test_classes_have_no_other_settings(model_type: str):
    """Of the version of transformers at hand."""
    config = AutoConfig.for_model(model_type)
    names = {*config.to_dict(), *inspect.signature(type(config).__init__).parameters}
    if dataclasses.is_dataclass(config):
        names |= {field.name for field in dataclasses.fields(config)}
    names -= {"self", "kwargs", "args", *TEMPORARY}
    assert sorted(names - settings_of(model_type).keys()) == []


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "name"), [c for c in cases("carried") if c[1] in CHANGED])
def test_what_is_carried_over(model_type: str, name: str, tmp_path: Path):
    base = read(write_config(tmp_path / "base", values_of(model_type, {})))
    outcomes = {base}
    values = [None, 4096] if (model_type, name) == ("llama", "sliding_window") else CHANGED[name]
    for number, value in enumerate(values):
        changes = {name: value}
        if name == "rope_parameters" and model_type == "gemma3_text":
            changes[name] = dict.fromkeys(("full_attention", "sliding_attention"), value)
        if name == "num_hidden_layers" and model_type == "gemma3_text":
            changes["layer_types"] = ["sliding_attention", "full_attention"]
        folder = tmp_path / str(number)
        model = tiny_weights(write_config(folder, {}), values_of(model_type, changes))
        engine = Engine(weights.from_folder(folder, torch.float64))
        ids = tokens(40)
        close(executed(engine, ids, Dense())[0], model(ids).logits[0], FP64)
        outcomes.add(read(folder))
    slides = model_type in ("mistral", "gemma3_text")  # others have no windowed layer here
    idle = not slides and name in ("sliding_window", "use_sliding_window", "layer_types")
    assert (len(outcomes) > 1) == (not idle)


def test_every_carried_setting_is_tried():
    assert {name for _, name in cases("carried")} == CHANGED.keys() | {"model_type"}
    assert {name for _, name in cases("no effect")} == IDLE.keys()


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_what_has_no_effect(model_type: str, tmp_path: Path):
    """Neither on what is read here, nor on transformers' own logits."""
    from transformers import AutoModelForCausalLM

    saved = tmp_path / "base"
    tiny_weights(saved, values_of(model_type, {}))
    model: Any = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64).eval()
    base, ids = read(saved), tokens(40)
    expected = model(ids).logits
    for name in (n for t, n in cases("no effect") if t == model_type):
        values = values_of(model_type, {name: IDLE[name]})
        folder = model_folder(tmp_path / name, saved, values)
        assert read(folder) == base, name
        check_weights(folder, read_config(folder))
        changed: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        changed.config.return_dict = True  # transformers' own code fails without it
        assert torch.equal(changed(ids).logits, expected), name


@pytest.mark.parametrize(("model_type", "name"), cases("refused"))
def test_what_is_refused(model_type: str, name: str, tmp_path: Path):
    setting = settings_of(model_type)[name]
    refused = REFUSED.get(name, [True, 0.5])
    for value in refused:
        message = "quantised" if name == "quantization_config" else f"{name} .*not supported; allo"
        with pytest.raises(ModelError, match=message):
            read_config(write_config(tmp_path, values_of(model_type, {name: value})))
    expected = read(write_config(tmp_path, values_of(model_type, {})))
    for value in setting.allowed:
        if value != []:
            assert read(write_config(tmp_path, values_of(model_type, {name: value}))) == expected


def test_refused_settings_that_change_nothing_are_accepted(tmp_path: Path):
    for model_type, changes in (
        ("llama", {"no_rope_layers": [1, 1, 1]}),
        ("gpt_neox", {"head_dim": 16}),
    ):
        assert read_config(write_config(tmp_path, values_of(model_type, changes)))


def test_the_table_in_the_docs_is_this_one():
    """If it fails: put what `settings_table()` returns between the marks."""
    _, mark, rest = (
        (DOCS / "families.md").read_text(encoding="utf-8").partition("<!-- settings -->\n")
    )
    table, end, _ = rest.partition("\n<!-- /settings -->")
    assert mark
    assert end
    assert table == settings_table()
