"""Every setting of a config, what transformers makes of it, and what is made of it here.

Whether a setting is carried over, folded into another, without effect on what a model computes, or
refused is said here once. The table in `docs/families.md` is made from it, and tests go through it:
transformers' classes have no setting that is not here, and each has the effect that it says.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from vesicle.errors import ModelError
from vesicle.families.checks import MOST_LAYERS, check_divides, check_layer_types, whole

Role = Literal["carried", "folded", "no effect", "refused"]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
GEMMA = ("gemma3_text",)
RMS = (*LLAMA_LIKE, *GEMMA)
ALL = (*RMS, "gpt_neox")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of one or more model types.

    Attributes:
        name: In `config.json`.
        model_types: Those it is a setting of, or could be taken for one.
        role: `carried` over; `folded` into another setting by transformers' own class, which then
            reads the config; of `no effect` on what a model computes when it is run; or `refused`.
        transformers: What transformers makes of it.
        here: What is made of it here.
        allowed: Values with which a refused setting is accepted.
    """

    name: str
    model_types: tuple[str, ...] = ALL
    role: Role
    transformers: str
    here: str
    allowed: tuple[Any, ...] = ()


def _carried(name: str, transformers: str, here: str, types: tuple[str, ...] = ALL) -> Setting:
    return Setting(
        name=name, model_types=types, role="carried", transformers=transformers, here=here
    )


def _folded(name: str, into: str, types: tuple[str, ...] = ALL) -> Setting:
    here = "as transformers: its class reads a config that has this"
    return Setting(name=name, model_types=types, role="folded", transformers=into, here=here)


def _idle(name: str, why: str, types: tuple[str, ...] = ALL, here: str = "not read") -> Setting:
    return Setting(name=name, model_types=types, role="no effect", transformers=why, here=here)


def _refused(
    name: str,
    *allowed: Any,
    types: tuple[str, ...] = ALL,
    transformers: str = "not read by these models' code",
) -> Setting:
    return Setting(
        name=name,
        model_types=types,
        role="refused",
        transformers=transformers,
        here="refused: other arithmetic" if not allowed else "refused unless it changes nothing",
        allowed=(None, *allowed),
    )


_TEXT = "for text and generation"
_TRAINING = "for training alone"
_FILE = "describes the file"
SETTINGS: tuple[Setting, ...] = (
    _carried("model_type", "which class reads the rest", "the family; others are refused"),
    _carried("num_hidden_layers", "layers", "the same"),
    _carried("hidden_size", "width", "the same"),
    _carried("num_attention_heads", "query heads", "the same"),
    _carried(
        "num_key_value_heads", "KV heads; null: as many as query heads", "the same", LLAMA_LIKE
    ),
    _carried("num_key_value_heads", "KV heads", "the same", GEMMA),
    _carried("head_dim", "size of a head; null: width / heads", "the same", LLAMA_LIKE),
    _carried("head_dim", "size of a head", "the same", GEMMA),
    _carried("intermediate_size", "FFN width", "the same"),
    _carried("vocab_size", "rows of embedding and head", "the same"),
    _carried(
        "hidden_act",
        "activation of the FFN",
        "the same; refused if not among the known",
        (*LLAMA_LIKE, "gpt_neox"),
    ),
    _carried(
        "hidden_activation",
        "activation of the FFN",
        "the same; refused if not among the known",
        GEMMA,
    ),
    _carried("rms_norm_eps", "added to the variance", "the same", RMS),
    _carried("layer_norm_eps", "added to the variance", "the same", ("gpt_neox",)),
    _carried("tie_word_embeddings", "whether the head is the embedding", "the same"),
    _carried(
        "attention_bias",
        "biases of queries, keys, values and output",
        "the same",
        ("llama", "qwen3", "smollm3", "gpt_neox", *GEMMA),
    ),
    _idle("attention_bias", "not read: Qwen2 always has three", ("mistral", "qwen2")),
    _carried("mlp_bias", "biases of the FFN", "the same", ("llama", "smollm3")),
    _idle("mlp_bias", "not read: none", ("mistral", "qwen2", "qwen3")),
    _carried(
        "use_parallel_residual", "attention and FFN read the same input", "the same", ("gpt_neox",)
    ),
    _carried(
        "max_position_embeddings",
        "positions; the base of some rotary scalings",
        "the context window; YaRN's is longer (factor times `original_max_position_embeddings`)",
    ),
    _carried(
        "rope_parameters",
        "rotary base, scaling and rotated part of a head",
        "the same for `default`, `linear`, `llama3`, `yarn`; others, parts of a head outside "
        "`gpt_neox` and parameters by kind of layer are refused",
        (*LLAMA_LIKE, "gpt_neox"),
    ),
    _carried(
        "rope_parameters",
        "rotary base and scaling of each kind of layer",
        "the same for `default`, `linear`, `llama3`, `yarn`; others are refused",
        GEMMA,
    ),
    _folded("rope_scaling", "`rope_parameters`; wins over it where both are there"),
    _folded("rope_theta", "`rope_parameters`", RMS),
    _folded("rope_local_base_freq", "`rope_parameters`, of sliding attention", GEMMA),
    _folded("partial_rotary_factor", "`rope_parameters`", RMS),
    _folded("original_max_position_embeddings", "`rope_parameters`"),
    _folded(
        "rotary_pct", "`rope_parameters`: `partial_rotary_factor`, 0.25 by default", ("gpt_neox",)
    ),
    _folded("rotary_emb_base", "`rope_parameters`: `rope_theta`", ("gpt_neox",)),
    _carried(
        "no_rope_layers", "1 for each layer that rotates, 0 for others", "the same", ("smollm3",)
    ),
    _folded("no_rope_layer_interval", "`no_rope_layers`, where that is not given", ("smollm3",)),
    _carried(
        "sliding_window",
        "window of every layer (Mistral), or of those that `layer_types` names; Llama reads none",
        "the same; Llama: refused if it is shorter than the context window",
        RMS,
    ),
    _carried(
        "use_sliding_window",
        "false: no `sliding_window` (SmolLM3: none unless `layer_types` names it)",
        "the same",
        ("qwen2", "qwen3", "smollm3"),
    ),
    _folded("max_window_layers", "`layer_types`, where that is not given", ("qwen2", "qwen3")),
    _carried(
        "layer_types",
        "kind of attention of each layer",
        "the same; other names than `full_attention` and `sliding_attention` are refused",
        ("qwen2", "qwen3", "smollm3", *GEMMA),
    ),
    _folded("sliding_window_pattern", "`layer_types`, where that is not given", GEMMA),
    _carried(
        "query_pre_attn_scalar", "s of the factor s^-0.5 on attention scores", "the same", GEMMA
    ),
    _carried("final_logit_softcapping", "c of logits c tanh(x / c); null: none", "the same", GEMMA),
    # What these models' code does not have, and would change every answer if it had.
    _refused("quantization_config", transformers="unpacks the weights as it says"),
    _refused("per_layer_config", {}, transformers="other sizes for some layers"),
    _refused(
        "no_rope_layers", [], types=("llama", "mistral", "qwen2", "qwen3", "gpt_neox", *GEMMA)
    ),
    _refused("head_dim", types=("gpt_neox",), transformers="read by a part of the code"),
    _refused("rotary_pct", 1.0, types=RMS),
    _refused("rope_interleaved", False),
    _refused("attention_multiplier"),
    _refused("query_pre_attn_scalar", types=(*LLAMA_LIKE, "gpt_neox")),
    _refused("embedding_multiplier", 1.0),
    _refused("residual_multiplier", 1.0),
    _refused("logits_scaling", 1.0),
    _refused("logit_scale", 1.0),
    _refused("scale_emb", 1.0),
    _refused("attn_logit_softcapping"),
    _refused("final_logit_softcapping", types=(*LLAMA_LIKE, "gpt_neox")),
    _refused("attention_chunk_size"),
    _refused("clip_qkv"),
    _refused("alibi", False),
    _refused("use_qk_norm", False),
    _refused("qk_layernorm", False),
    _refused("num_experts", 0, 1),
    _refused("num_local_experts", 0, 1),
    _refused("use_bidirectional_attention", False),
    # Without effect on what a model computes when it is run.
    _idle("attention_dropout", _TRAINING),
    _idle("hidden_dropout", _TRAINING, ("gpt_neox",)),
    _idle("classifier_dropout", _TRAINING, ("gpt_neox",)),
    _idle("initializer_range", _TRAINING),
    _idle("pretraining_tp", _TRAINING, ("llama",)),
    _idle("problem_type", "for classifiers"),
    _idle("id2label", "for classifiers"),
    _idle("label2id", "for classifiers"),
    _idle("use_cache", "whether to keep keys and values", here="always kept"),
    _idle("output_hidden_states", "what is returned"),
    _idle("output_attentions", "what is returned"),
    _idle("tie_last_hidden_states", "what is returned"),
    _idle("return_dict", "what is returned"),
    _idle("is_decoder", "not read"),
    _idle("is_encoder_decoder", "not read"),
    _idle("chunk_size_feed_forward", "not read"),
    _idle("bos_token_id", _TEXT),
    _idle("eos_token_id", _TEXT, here="ends a generation"),
    _idle("pad_token_id", _TEXT),
    _idle("_sliding_window_pattern", _FILE, GEMMA),
    _idle("architectures", _FILE),
    _idle("transformers_version", _FILE),
    _idle("dtype", "number format of the weights", here="of the weights as stored, or as asked"),
    _idle("torch_dtype", "the older spelling of `dtype`", here="of the weights as stored"),
    _idle("_name_or_path", _FILE),
)
"""A setting may be here twice, for other model types."""


_NULL = {"sliding_window", "final_logit_softcapping"}
"""Carried settings that may be null."""


def settings_of(model_type: str) -> dict[str, Setting]:
    """The settings of a model type by name."""
    return {s.name: s for s in SETTINGS if model_type in s.model_types}


def refuse_foreign(values: Mapping[str, Any]) -> None:
    """Refuse settings of other architectures, and what transformers' classes would choke on.

    Args:
        values: A `config.json` of a supported `model_type`.

    Raises:
        ModelError: Naming the setting and what is allowed.
    """
    for setting in settings_of(values["model_type"]).values():
        if setting.role != "refused" or setting.name not in values:
            continue
        value = values[setting.name]
        if not _is_allowed(setting, value, values):
            raise ModelError(_refusal(setting, value))
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name)
        if rope is not None and not isinstance(rope, dict):
            raise ModelError(
                f"the model's config has {name} {reprlib.repr(rope)}; allowed: an object"
            )
    layers = values.get("num_hidden_layers")
    if layers is not None:  # of which classes make lists
        whole(SimpleNamespace(num_hidden_layers=layers), "num_hidden_layers", MOST_LAYERS)
        check_layer_types(values.get("layer_types"), layers)
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    # Classes say it in words of their own; Qwen3's has a default for the size of a head.
    if values.get("head_dim") is None and values["model_type"] not in ("qwen3", *GEMMA):
        if isinstance(heads, int) and isinstance(width, int) and heads > 0:
            check_divides(heads, "num_attention_heads", width, "hidden_size")


def _is_allowed(setting: Setting, value: Any, values: Mapping[str, Any]) -> bool:
    if setting.name == "no_rope_layers" and isinstance(value, list):
        return all(value)
    if setting.name == "head_dim":
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        return value is None or (
            isinstance(heads, int)
            and isinstance(width, int)
            and heads > 0
            and value == width / heads
        )
    return any(
        value == a and isinstance(value, bool) == isinstance(a, bool) for a in setting.allowed
    )


def _refusal(setting: Setting, value: Any) -> str:
    if setting.name == "quantization_config":
        method = value.get("quant_method") if isinstance(value, dict) else value
        return (
            f"the weights are quantised ({reprlib.repr(method)}), which is not supported: use the "
            "original weights, or a GGUF file"
        )
    allowed = [a for a in setting.allowed if a is not None]
    return (
        f"the model's config has {setting.name} {reprlib.repr(value)}, which is not supported; "
        f"allowed: {', '.join([*map(repr, allowed), 'nothing'])}"
    )


def is_spelled_out(values: Mapping[str, Any]) -> bool:
    """Whether a config says all that is carried over, as transformers' own class would read it.

    So it is with configs that a current transformers wrote, unless rotary frequencies are scaled.
    (GPT-NeoX's class in transformers 5.0 forgets a `partial_rotary_factor` that it wrote itself.)

    Args:
        values: A `config.json` of a supported `model_type`.
    """
    model_type, rope = values["model_type"], values.get("rope_parameters")
    known = settings_of(model_type)
    carried = {name for name, s in known.items() if s.role == "carried"}
    if not isinstance(rope, dict):
        return False
    if model_type in ("llama", "qwen2", "smollm3"):  # whose classes have not both of these
        carried -= {"sliding_window"} if model_type == "llama" else {"head_dim"}
    spelled = {"rope_type", "rope_theta"}
    if model_type == "gpt_neox":
        spelled.add("partial_rotary_factor")
    each = [rope]
    if model_type in GEMMA:
        each = list(rope.values())
        if rope.keys() != {"full_attention", "sliding_attention"}:
            return False
    # Current versions write these two as well; they act where what they are folded into is absent.
    folded = {name for name, s in known.items() if s.role == "folded"}
    folded -= {"no_rope_layer_interval", "max_window_layers"}
    if model_type == "mistral":
        folded.add("layer_types")  # which makes transformers read it as another type
    return (
        carried <= values.keys()
        and not folded & values.keys()
        and all(isinstance(one, dict) and one.keys() == spelled for one in each)
        and all(one["rope_type"] == "default" for one in each)
        and all(values[name] is not None for name in carried - _NULL)
        and (
            values.get("sliding_window") is None
            or model_type in ("mistral", *GEMMA)
            or values.get("use_sliding_window") is True
        )
    )


def settings_table() -> str:
    """The settings as the Markdown table of `docs/families.md`."""
    lines = [
        "| setting | of | transformers | here | role |",
        "| --- | --- | --- | --- | --- |",
    ]
    for s in SETTINGS:
        short = {ALL: "all", RMS: "all but gpt_neox", LLAMA_LIKE: ", ".join(LLAMA_LIKE)}
        of = short.get(s.model_types, ", ".join(s.model_types))
        lines.append(f"| `{s.name}` | {of} | {s.transformers} | {s.here} | {s.role} |")
    return "\n".join(lines)
