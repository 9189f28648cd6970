"""What becomes of each setting in a GGUF file's header: carried over, harmless, or refused.

A conversion either carries a setting over or refuses it by name. A key of the architecture or of
the tokenizer that stands in none of the tables below is refused, because it may change what the
model computes. Keys of other namespaces (`general.*`, those of the programs that wrote the file)
describe the file, and llama.cpp does not read them either.

`*` stands for the architecture, such as `llama`.
"""

from __future__ import annotations

import re
from math import isclose
from pathlib import Path

from vesicle.errors import ModelError
from vesicle.models.gguf_header import GgufArray, GgufHeader, Value

CARRIED = frozenset(
    {
        "general.alignment",
        "general.architecture",
        "*.attention.head_count",
        "*.attention.head_count_kv",
        "*.attention.key_length",
        "*.attention.layer_norm_rms_epsilon",
        "*.attention.value_length",
        "*.block_count",
        "*.context_length",
        "*.embedding_length",
        "*.feed_forward_length",
        "*.rope.dimension_count",
        "*.rope.freq_base",
        "*.vocab_size",
        "tokenizer.chat_template",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eom_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.model",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.unknown_token_id",
    }
)
"""Read by the conversion, which checks their values where it reads them."""

CARRIED_BY_ARCHITECTURE: dict[str, frozenset[str]] = {
    "gemma3": frozenset(
        {
            "*.attention.sliding_window",
            "*.attention.sliding_window_pattern",
            "*.rope.freq_base_swa",
            "*.rope.scaling.factor",
            "*.rope.scaling.type",
        }
    )
}
"""Carried for these architectures, whatever the tables below say."""

NEUTRAL: dict[str, tuple[Value, ...]] = {
    "general.quantization_version": (2,),
    "general.type": ("model",),
    "*.attention.causal": (True,),
    "*.attention.clamp_kqv": (0.0,),
    "*.attention.max_alibi_bias": (0.0,),
    "*.attention.scale": (0.0,),
    "*.attention.sliding_window": (0,),
    "*.attn_logit_softcapping": (0.0,),
    "*.embedding_scale": (0.0, 1.0),
    "*.expert_count": (0,),
    "*.final_logit_softcapping": (0.0,),
    "*.leading_dense_block_count": (0,),
    "*.logit_scale": (0.0, 1.0),
    "*.nextn_predict_layers": (0,),
    "*.residual_scale": (0.0, 1.0),
    "*.rope.scaling.attn_factor": (0.0, 1.0),
    "*.tensor_data_layout": ("Meta AI original pth",),
    "*.use_parallel_residual": (False,),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
}
"""Harmless with one of these values, which mean what the conversion computes; else refused."""

HARMLESS = frozenset(
    {
        # Scaling itself is refused.
        "*.rope.scale_linear",
        "*.rope.scaling.factor",
        "*.rope.scaling.finetuned",
        "*.rope.scaling.original_context_length",
        "*.rope.scaling.type",
        "*.rope.scaling.yarn_attn_factor",
        "*.rope.scaling.yarn_beta_fast",
        "*.rope.scaling.yarn_beta_slow",
        "*.rope.scaling.yarn_ext_factor",
        "*.rope.scaling.yarn_log_multiplier",
        # Experts are refused, and these describe them.
        "*.expert_feed_forward_length",
        "*.expert_used_count",
        # Not of this kind of norm.
        "*.attention.layer_norm_epsilon",
        # What is done with hidden states afterwards; logits do not depend on it.
        "*.pooling_type",
        # Names of tokens for uses that do not exist here.
        "tokenizer.ggml.cls_token_id",
        "tokenizer.ggml.fim_mid_token_id",
        "tokenizer.ggml.fim_pad_token_id",
        "tokenizer.ggml.fim_pre_token_id",
        "tokenizer.ggml.fim_rep_token_id",
        "tokenizer.ggml.fim_sep_token_id",
        "tokenizer.ggml.fim_suf_token_id",
        "tokenizer.ggml.mask_token_id",
        "tokenizer.ggml.middle_token_id",
        "tokenizer.ggml.prefix_token_id",
        "tokenizer.ggml.seperator_token_id",
        "tokenizer.ggml.suffix_token_id",
        "tokenizer.ggml.token_type_count",
        # The same tokenizer once more, and templates beside the default one.
        "tokenizer.chat_templates",
        "tokenizer.huggingface.json",
    }
)
"""Change nothing that the model computes here, whatever their values."""

_NAMED_TEMPLATE = re.compile(r"tokenizer\.chat_template\.[^.]+")
_SCALINGS_WITHOUT_EFFECT = (0.0, 1.0)


def check_settings(path: Path, header: GgufHeader) -> None:
    """Refuse every setting that the conversion would neither carry over nor may leave out.

    Args:
        path: The file.
        header: What `read_gguf_header` gave for it, of a supported architecture.

    Raises:
        ModelError: A setting is unknown, or has a value that the conversion would lose.
    """
    metadata = header.metadata
    arch = str(metadata["general.architecture"])
    _refuse_scaling(path, arch, header)
    if metadata.get(f"{arch}.expert_count", 0) != 0:
        raise ModelError(f"{path} is a mixture of experts, which is not supported")
    for key, value in metadata.items():
        name = f"*.{key.removeprefix(f'{arch}.')}" if key.startswith(f"{arch}.") else key
        if name in CARRIED_BY_ARCHITECTURE.get(arch, ()):
            continue
        if name.startswith(("*.vision.", "*.mm.")):
            raise ModelError(
                f"{path} holds a part for images as well ({key}), which is not supported: use a "
                "file of the text model alone"
            )
        if name in NEUTRAL and not any(_same(value, allowed) for allowed in NEUTRAL[name]):
            allowed = ", ".join(map(repr, NEUTRAL[name]))
            raise ModelError(
                f"{path}: {key} is {shown_value(value)}, which a GGUF file's conversion would "
                f"lose; allowed: {allowed}"
            )
        if not name.startswith(("*.", "tokenizer.", "adapter.")):
            continue
        if name not in NEUTRAL and not _is_known(name):
            raise ModelError(
                f"{path} holds the setting {key} ({shown_value(value)}), which is not known here "
                "and may change the model: use the model's safetensors folder or hub id"
            )


def refuse_part(path: Path, header: GgufHeader) -> None:
    """Refuse a file that is one part of a model.

    Args:
        path: The file.
        header: What `read_gguf_header` gave for it.

    Raises:
        ModelError: It is one of several parts.
    """
    count, number = (header.metadata.get(f"split.{key}", 0) for key in ("count", "no"))
    if not isinstance(count, int) or not isinstance(number, int) or count <= 1:
        return
    raise ModelError(
        f"{path} is part {number + 1} of {count} of a split model: join the parts first "
        "(llama-gguf-split --merge FIRST_PART JOINED.gguf), and name the joined file"
    )


def shown_value(value: Value) -> str:
    """A setting's value, in a message.

    Args:
        value: The value.

    Returns:
        Text of bounded length.
    """
    if isinstance(value, GgufArray):
        return f"a list of {value.length:,} {'strings' if value.is_text else 'items'}"
    return repr(value[:60] if isinstance(value, str) else value)


def _is_known(name: str) -> bool:
    return name in CARRIED or name in HARMLESS or bool(_NAMED_TEMPLATE.fullmatch(name))


def _same(value: Value, allowed: Value) -> bool:
    if isinstance(value, float) and isinstance(allowed, float):
        return isclose(value, allowed, rel_tol=1e-6)
    return type(value) is type(allowed) and value == allowed


def _refuse_scaling(path: Path, arch: str, header: GgufHeader) -> None:
    """Refuse rotary scaling; llama.cpp takes a factor without a type as linear scaling.

    Gemma's is carried over if it is linear.
    """
    metadata = header.metadata
    kind = metadata.get(f"{arch}.rope.scaling.type", "linear")
    factor = metadata.get(f"{arch}.rope.scaling.factor", 1.0)
    old_factor = metadata.get(f"{arch}.rope.scale_linear", 1.0)
    if arch == "gemma3" and kind in ("none", "linear"):
        factor = 1.0
    neutral = all(f in _SCALINGS_WITHOUT_EFFECT for f in (factor, old_factor))
    by_type = kind not in ("none", "linear", "yarn")
    if by_type or (kind != "none" and not neutral) or "rope_freqs.weight" in header.tensors:
        raise ModelError(
            f"{path} scales its rotary frequencies, which a GGUF file's conversion loses: use the "
            "model's safetensors folder or hub id"
        )
