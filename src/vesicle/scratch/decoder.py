"""Small decoders of the Llama family with random weights, as transformers builds them.

So a trained one is saved, loaded and run like any other model, by the engine too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class DecoderSize:
    """Sizes of a decoder.

    Attributes:
        vocabulary: Of its tokenizer.
        width: D.
        n_layers: L.
        n_heads: H query heads; they share the width.
        n_kv_heads: G.
        ffn: F.
        context: Most tokens of a text.
    """

    vocabulary: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn: int
    context: int

    def __post_init__(self) -> None:
        """Check that heads share the width and each other evenly.

        Raises:
            ValueError: They do not, or a size is below 1.
        """
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} is {size}; allowed: 1 and above")
        for name, whole, part in (
            ("width", self.width, self.n_heads),
            ("n_heads", self.n_heads, self.n_kv_heads),
        ):
            if whole % part:
                raise ValueError(f"{name} is {whole}; allowed: multiples of {part}")


def new_decoder(size: DecoderSize, seed: int) -> LlamaForCausalLM:
    """A decoder with random weights, input and output embeddings tied, in fp32.

    Args:
        size: Its sizes.
        seed: Of its weights; the state of torch's own generator is left as it was.
    """
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_kv_heads,
        intermediate_size=size.ffn,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()
