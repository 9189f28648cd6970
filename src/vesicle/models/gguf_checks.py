"""Whether a GGUF file's metadata and tensors make up one whole model.

What converts the file fills a tensor that is missing with random numbers, and leaves out a tensor
whose name it does not know, all without a word. So every tensor must be one that the architecture
has a place for, in the shape that the metadata asks for. What becomes of the settings is told in
`gguf_settings.py`.
"""

import math
from pathlib import Path

from vesicle.errors import ModelError
from vesicle.models.gguf_header import GgufArray, GgufHeader, Value
from vesicle.models.gguf_settings import check_settings, refuse_part, shown_value
from vesicle.models.gguf_tokenizer import ENDS, NAMED, read_tokenizer_settings

# Architecture to the one-dimensional tensors a layer has beyond those of Llama.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": (),
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
    "gemma3": (
        "attn_q_norm.weight",
        "attn_k_norm.weight",
        "post_attention_norm.weight",
        "post_ffw_norm.weight",
    ),
}
_INTEGERS = ("I8", "I16", "I32", "I64")
_PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16"}
_TOKENS = "tokenizer.ggml.tokens"
_TOKEN_IDS = dict.fromkeys((*NAMED, *ENDS))


def check_gguf_model(path: Path, header: GgufHeader) -> None:
    """Check that a GGUF file holds a whole model of a known architecture.

    Args:
        path: The file.
        header: What `read_gguf_header` gave for it.

    Raises:
        ModelError: Metadata or a tensor is missing, unknown, out of range or of the wrong shape, a
            setting would be lost, the file is one part of several, or a norm or bias holds NaN or
            infinity.
    """
    refuse_part(path, header)
    expected = _expected_shapes(path, header)
    for name, shape in expected.items():
        if name not in header.tensors:
            raise ModelError(f"{path} is damaged or incomplete: it lacks the tensor {name}")
        tensor = header.tensors[name]
        if tensor.shape != shape:
            raise ModelError(
                f"{path} is damaged: {name} is {tensor.shape}; its metadata asks for {shape}"
            )
        if tensor.kind in _INTEGERS:
            raise ModelError(f"{path}: {name} is stored as {tensor.kind}, which is no weight type")
    if unknown := header.tensors.keys() - expected.keys():
        raise ModelError(
            f"{path} holds the tensor {min(unknown)!r}, which has no place in its architecture"
        )
    _check_finite(path, header)


def _expected_shapes(path: Path, header: GgufHeader) -> dict[str, tuple[int, ...]]:
    """Every tensor that the metadata asks for, and its shape."""
    facts = _Facts(path, header.metadata)
    arch = facts.architecture
    layers = facts.whole(f"{arch}.block_count", most=4096)
    width = facts.whole(f"{arch}.embedding_length", most=1 << 20)
    ffn = facts.whole(f"{arch}.feed_forward_length", most=1 << 22)
    heads = facts.whole(f"{arch}.attention.head_count", most=1 << 14)
    # Without it transformers leaves a Llama's rows in llama.cpp's order, and says nothing.
    none = None if arch == "llama" else heads
    kv_heads = facts.whole(f"{arch}.attention.head_count_kv", most=heads, default=none)
    facts.whole(f"{arch}.context_length", most=2**31 - 1)
    facts.real(f"{arch}.attention.layer_norm_rms_epsilon", most=1.0)
    facts.real(f"{arch}.rope.freq_base", most=1e12, default=10_000.0)
    if arch == "gemma3":
        facts.real(f"{arch}.rope.freq_base_swa", most=1e12, default=10_000.0)
        facts.real(f"{arch}.rope.scaling.factor", most=1e6, default=1.0)
        facts.whole(f"{arch}.attention.sliding_window", least=0, most=2**31 - 1, default=0)
        facts.whole(f"{arch}.attention.sliding_window_pattern", most=4096, default=6)
    if heads % kv_heads:
        raise facts.wrong(f"{arch}.attention.head_count_kv", f"divisors of {heads} (the heads)")
    size_key = f"{arch}.attention.key_length"
    if size_key not in header.metadata and width % heads:
        raise facts.wrong(f"{arch}.attention.head_count", f"divisors of {width} (the width)")
    size = facts.whole(size_key, most=1 << 14, default=width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.whole(f"{arch}.{key}", most=1 << 14, default=size) != size:
            raise facts.wrong(f"{arch}.{key}", f"{size} (the head size)")
    if size % 2:
        raise ModelError(f"{path}: its heads have the size {size}; rotary heads have an even size")
    vocabulary = _check_vocabulary(facts)
    check_settings(path, header)
    read_tokenizer_settings(path, header)

    vector = {"attn_norm.weight": width, "ffn_norm.weight": width}
    vector |= {"attn_q.bias": heads * size, "attn_k.bias": kv_heads * size}
    vector |= {"attn_v.bias": kv_heads * size}
    vector |= {"attn_q_norm.weight": size, "attn_k_norm.weight": size}
    vector |= {"post_attention_norm.weight": width, "post_ffw_norm.weight": width}
    named = ("attn_norm.weight", "ffn_norm.weight", *ARCHITECTURES[arch])
    layer: dict[str, tuple[int, ...]] = {name: (vector[name],) for name in named}
    layer |= {"attn_q.weight": (heads * size, width), "attn_output.weight": (width, heads * size)}
    layer |= dict.fromkeys(("attn_k.weight", "attn_v.weight"), (kv_heads * size, width))
    layer |= dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), (ffn, width))
    layer |= {"ffn_down.weight": (width, ffn)}
    if layers * len(layer) > len(header.tensors):
        raise ModelError(
            f"{path} is damaged or incomplete: {arch}.block_count is {layers:,}, and the file's "
            f"{len(header.tensors):,} tensors are too few for that"
        )
    shapes = {f"blk.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if "output.weight" in header.tensors:
        shapes["output.weight"] = (vocabulary, width)
    return shapes


def _check_vocabulary(facts: "_Facts") -> int:
    """The vocabulary's size, once all that speaks of it agrees."""
    tokens = facts.metadata.get(_TOKENS)
    if not isinstance(tokens, GgufArray) or not tokens.is_text or not tokens.length:
        raise facts.wrong(_TOKENS, "a list of one string or more")
    count = tokens.length
    if facts.whole(f"{facts.architecture}.vocab_size", most=1 << 24, default=count) != count:
        raise facts.wrong(f"{facts.architecture}.vocab_size", f"{count} (its tokens)")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        value = facts.metadata.get(key)
        if value is not None and (not isinstance(value, GgufArray) or value.length != count):
            raise facts.wrong(key, f"a list as long as the {count} tokens")
    for name in _TOKEN_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        facts.whole(key, least=0, most=count - 1, default=0)
    return count


def _check_finite(path: Path, header: GgufHeader) -> None:
    """Read the gains and biases, which are few: one NaN among them spoils every answer."""
    import numpy as np  # late: importing `vesicle.models` stays cheap

    with path.open("rb") as file:
        for name, tensor in header.tensors.items():
            if len(tensor.shape) == 1 and tensor.kind in _PLAIN:
                file.seek(tensor.start)
                values = np.frombuffer(file.read(tensor.n_bytes), _PLAIN[tensor.kind])
                if not np.isfinite(values).all():
                    raise ModelError(f"{path} is damaged: {name} holds NaN or infinity")


class _Facts:
    """Typed look-ups in the metadata that name the key when its value will not do."""

    def __init__(self, path: Path, metadata: dict[str, Value]) -> None:
        self.path = path
        self.metadata = metadata
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise self.wrong("general.architecture", ", ".join(ARCHITECTURES))
        self.architecture = arch

    def whole(self, key: str, *, most: int, least: int = 1, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"whole numbers from {least} to {most}")
        return value

    def real(self, key: str, *, most: float, default: float | None = None) -> None:
        value = self.metadata.get(key, default)
        if not isinstance(value, float) or not math.isfinite(value) or not 0 < value <= most:
            raise self.wrong(key, f"numbers above 0, up to {most:g}")

    def wrong(self, key: str, allowed: str) -> ModelError:
        if key not in self.metadata:
            return ModelError(f"{self.path} is incomplete: it has no {key}; expected: {allowed}")
        return ModelError(
            f"{self.path}: {key} is {shown_value(self.metadata[key])}; allowed: {allowed}"
        )
