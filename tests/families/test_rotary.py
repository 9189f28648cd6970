"""Configs in every spelling give the rotary phases, the window and the logits of transformers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families.configs import DROP, TYPES, model_folder, tiny_weights, values_of, write_config
from tests.parity.test_engine import FP64, close, executed
from tests.tiny import CONFIGS, random_plan, tiny_modulator, tokens
from vesicle.engine import Engine, weights
from vesicle.errors import ModelError
from vesicle.families import find_family, settings_of
from vesicle.models.checks import read_config
from vesicle.plan import Dense, Plan, Replay
from vesicle.reference.attach import attach
from vesicle.shapes import context_window

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
YARN_FULL = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 0.8,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def bare(parameters: dict[str, Any]) -> dict[str, Any]:
    """With the scaling's kind as older configs have it."""
    return {"type" if name == "rope_type" else name: v for name, v in parameters.items()}


SPELLINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": DEFAULT},
    "nothing": {"rope_parameters": DROP},
    "null": {"rope_parameters": None},
    "scaling null": {"rope_parameters": DROP, "rope_scaling": None},
    "no kind": {"rope_parameters": {"rope_theta": 1000.0}},
    "no theta": {"rope_parameters": {"rope_type": "default"}},
    "linear": {"rope_parameters": {**LINEAR, "rope_theta": 1000.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 1000.0}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 1000.0}},
    "yarn, all": {"rope_parameters": YARN_FULL},
    "yarn, no original": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "bare type": {"rope_parameters": {**bare(LINEAR), "rope_theta": 1000.0}},
    "bare yarn": {"rope_parameters": bare(YARN)},
    "scaling": {"rope_parameters": DROP, "rope_scaling": LINEAR},
    "bare scaling": {"rope_parameters": DROP, "rope_scaling": bare(YARN)},
    "scaling beside parameters": {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
    "bare scaling beside parameters": {"rope_parameters": DEFAULT, "rope_scaling": bare(LLAMA3)},
    "original outside": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 256},
        "original_max_position_embeddings": 64,
    },
}
LLAMA_LIKE: dict[str, dict[str, Any]] = {
    **SPELLINGS,
    "theta outside": {"rope_parameters": DROP, "rope_theta": 500.0},
    "theta beside parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
    "theta and scaling": {"rope_parameters": DROP, "rope_theta": 500.0, "rope_scaling": LINEAR},
    "whole": {"partial_rotary_factor": 1.0},
    "settings that no one knows": {"unk_token_id": 3, "made_by": "x", "rope_interleaved": False},
}
QWEN: dict[str, dict[str, Any]] = {
    **LLAMA_LIKE,
    "no window": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    "no window, no layers": {
        "use_sliding_window": False,
        "sliding_window": 8,
        "layer_types": ["full_attention"] * 3,
    },
    "window after the last layer": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    "window of the whole context": {
        "use_sliding_window": True,
        "sliding_window": 512,
        "max_window_layers": 0,
    },
    "window of some layers": {
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "a short window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
}
BOTH = {"full_attention": {**DEFAULT, "rope_theta": 1e6}, "sliding_attention": DEFAULT}
GEMMA: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": BOTH},
    "nothing": {"rope_parameters": DROP},
    "scaled": {"rope_parameters": {**BOTH, "full_attention": {**LINEAR, "rope_theta": 1e6}}},
    "bases outside": {
        "rope_parameters": DROP,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 700.0,
    },
    "scaling outside": {"rope_parameters": DROP, "rope_theta": 5000.0, "rope_scaling": LINEAR},
    "whole": {"partial_rotary_factor": 1.0},
    "original outside": {"original_max_position_embeddings": 64},
    "a pattern": {"layer_types": DROP, "sliding_window_pattern": 2},
    "all full": {"layer_types": ["full_attention"] * 3},
    "no cap": {"final_logit_softcapping": None},
    "a short window": {"sliding_window": 5},
    "a window of a block": {"sliding_window": 16},
    "window of the whole context": {"sliding_window": 512},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **LLAMA_LIKE,
        "no window": {"use_sliding_window": False, "sliding_window": 8},
    },
    "mistral": {
        **LLAMA_LIKE,
        "window of the whole context": {"sliding_window": 512},
        "a window": {"sliding_window": 17},
    },
    "qwen2": QWEN,
    "qwen3": QWEN,
    "smollm3": {
        **LLAMA_LIKE,
        "no window": {"use_sliding_window": False, "sliding_window": 8},
        "layers without phases": {"no_rope_layers": DROP, "no_rope_layer_interval": 2},
        "a longer list": {"no_rope_layers": [0, 1, 1, 0, 0]},
        "window of a layer": {
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    },
    "gemma3_text": GEMMA,
    "gpt_neox": {
        **SPELLINGS,
        "part beside parameters": {"rope_parameters": DEFAULT, "rotary_pct": 0.75},
        "part inside and beside": {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
        "no part": {"rope_parameters": DEFAULT, "rotary_pct": DROP},
        "no part, scaling": {"rope_scaling": LINEAR, "rotary_pct": DROP},
        "part and base outside": {
            "rope_parameters": DROP,
            "rotary_pct": 0.5,
            "rotary_emb_base": 500,
        },
        "part and scaling": {"rope_parameters": DROP, "rotary_pct": 1.0, "rope_scaling": LINEAR},
    },
}
CASES = [(t, name) for t, variants in VARIANTS.items() for name in variants]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers comments on configs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights by model type; those of GPT-NeoX fit every part of a head."""
    folders = {t: tmp_path_factory.mktemp(t) for t in TYPES}
    for model_type, folder in folders.items():
        tiny_weights(folder, values_of(model_type, {}))
    return folders


# How a spelling is read does not depend on the family: all run in one, and some in each.
RUN = [
    (model_type, name)
    for model_type, name in CASES
    if model_type in ("llama", "gemma3_text")
    or name not in SPELLINGS
    or name in ("default", "yarn, all", "bare scaling")
]


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "name"), RUN)
def test_spellings(model_type: str, name: str, saved: dict[str, Path], tmp_path: Path):
    values = values_of(model_type, VARIANTS[model_type][name])
    folder = model_folder(tmp_path / "model", saved[model_type], values)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    engine = Engine(weights.from_folder(folder, torch.float64))
    theirs = model.base_model.rotary_emb
    kinds = [""]
    if model_type == "gemma3_text":
        kinds = [f"{kind}_" for kind in dict.fromkeys(model.config.layer_types)]
    for kind, ours in zip(kinds, engine.config.rotaries, strict=True):
        frequencies = getattr(theirs, f"{kind}inv_freq").double()
        torch.testing.assert_close(ours.frequencies.double(), frequencies, rtol=1e-6, atol=0)
        assert ours.scale == pytest.approx(getattr(theirs, f"{kind}attention_scaling"))
    assert engine.config.context_window == context_window(values)
    ids = tokens(70)
    close(executed(engine, ids, Dense())[0], model(ids).logits[0], FP64)
    shape = engine.shape
    # Blocks of the cache are not chosen: a score 1e-7 from another would flip a choice.
    plan = random_plan(shape, 70, np.random.default_rng(0)).with_fields(
        kv_blocks=Plan.rest(shape, 70).kv_blocks
    )
    method = Replay(plan, tiny_modulator(shape).stand_ins)
    with attach(model, method):
        expected = model(ids).logits[0]
    close(executed(engine, ids, method)[0], expected, FP64)


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_a_config_read_alone_is_what_transformers_reads(model_type: str, name: str, tmp_path: Path):
    """Whether or not its class was asked."""
    folder = write_config(tmp_path, values_of(model_type, VARIANTS[model_type][name]))
    ours, theirs = read_config(folder), AutoConfig.from_pretrained(folder)
    family = find_family(theirs)
    assert str(family.decoder_config(ours)) == str(family.decoder_config(theirs))
    assert family.presence(ours) == family.presence(theirs)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_today_need_no_class(name: str, tmp_path: Path):
    """Importing transformers takes seconds."""
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    read, family = read_config(tmp_path), find_family(config)
    assert isinstance(read, SimpleNamespace)
    assert str(family.decoder_config(read)) == str(family.decoder_config(config))


def test_every_folded_setting_has_a_spelling():
    for model_type, variants in VARIANTS.items():
        spelled = {name for changes in variants.values() for name in changes}
        folded = {s.name for s in settings_of(model_type).values() if s.role == "folded"}
        assert folded - spelled == set()


REFUSED = [
    ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaling 'dynamic' is not"),
    (
        "longrope",
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            }
        },
        "scaling 'longrope' is not",
    ),
    ("proportional", {"rope_parameters": {**DEFAULT, "rope_type": "proportional"}}, "proportional"),
    ("su", {"rope_scaling": {"type": "su", "factor": 2.0}}, "scaling 'su' is not supported"),
    ("mrope", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope' is not supp"),
    ("text", {"rope_scaling": "linear"}, "rope_scaling 'linear'; allowed: an object"),
    (
        "nested",
        {"rope_parameters": {"full_attention": DEFAULT, **DEFAULT}},
        "rotates all layers alike",
    ),
    ("no factor", {"rope_scaling": {"type": "linear"}}, "factor"),
]


ALIKE = [t for t in TYPES if t != "gemma3_text"]
"""Types whose layers all rotate alike."""


@pytest.mark.parametrize("model_type", ALIKE)
@pytest.mark.parametrize(
    ("changes", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_scalings_that_are_refused(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ModelError, match=message):
        read_config(write_config(tmp_path, values_of(model_type, changes)))


GEMMA_REFUSED = [
    (
        {"rope_parameters": {**BOTH, "full_attention": {**DEFAULT, "rope_type": "su"}}},
        "'su' is not",
    ),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0; allowed: numbers above 0"),
    ({"final_logit_softcapping": -1.0}, "final_logit_softcapping -1.0; allowed: numbers above 0"),
    ({"sliding_window": None}, "no sliding_window for it"),
    ({"sliding_window": 0}, "sliding_window 0; allowed: whole numbers"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0, which is not supported"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention True, which is not"),
]


@pytest.mark.parametrize(("changes", "message"), GEMMA_REFUSED)
def test_what_is_refused_of_gemma(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ModelError, match=message):
        read_config(write_config(tmp_path, values_of("gemma3_text", changes)))


@pytest.mark.parametrize("model_type", [t for t in ALIKE if t != "gpt_neox"])
@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_a_part_of_a_head(model_type: str, changes: dict[str, Any], tmp_path: Path):
    """In models that rotate whole heads, by transformers' own code."""
    with pytest.raises(ModelError, match=r"partial_rotary_factor 0\.5; model type .* whole heads"):
        read_config(write_config(tmp_path, values_of(model_type, changes)))


SLIDING = [
    ("mistral", {"sliding_window": 8}, (8, 8, 8)),
    ("mistral", {"sliding_window": 512}, ()),
    # A window of all positions that the model was trained on, and yarn makes more.
    ("mistral", {"sliding_window": 512, "rope_scaling": YARN}, (512, 512, 512)),
    # As transformers' auto classes read it; its own class reads none of them.
    (
        "mistral",
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
        "has 4 layer_types",
    ),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}, ()),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        (0, 8, 8),
    ),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        (0, 0, 8),
    ),
    ("gemma3_text", {"sliding_window": 8}, (8, 0, 8)),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "no sliding_window for it"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "x"]}, "'chunked_attention'"),
    ("llama", {"sliding_window": 8}, "window of 8"),
]


@pytest.mark.parametrize(("model_type", "changes", "found"), SLIDING)
def test_sliding_windows(
    model_type: str, changes: dict[str, Any], found: tuple[int, ...] | str, tmp_path: Path
):
    folder = write_config(tmp_path, values_of(model_type, changes))
    if isinstance(found, str):
        with pytest.raises(ModelError, match=found):
            read_config(folder)
        return
    family = find_family(SimpleNamespace(model_type=model_type))
    assert family.decoder_config(read_config(folder)).shape.windows == found


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({}, None),
        ({"max_position_embeddings": "64"}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 512, "rope_scaling": YARN}, 2048),
        ({"max_position_embeddings": 512, "rope_parameters": bare(YARN)}, 2048),
        ({"max_position_embeddings": 4096, "rope_parameters": YARN}, 4096),
        ({"max_position_embeddings": 512, "rope_scaling": LINEAR}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": LINEAR, "rope_parameters": YARN}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4}}, 2048),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn"}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": -4}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {**YARN, "factor": 1e30}}, 2**31 - 1),
        ({"max_position_embeddings": 512, "rope_scaling": "yarn"}, 512),
        (
            {
                "max_position_embeddings": 512,
                "original_max_position_embeddings": 1024,
                "rope_scaling": YARN,
            },
            4096,
        ),
    ],
)
def test_context_windows(settings: dict[str, Any], window: int | None):
    assert context_window(settings) == window
