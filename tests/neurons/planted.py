"""A tiny model with planted neurons: each marks one last word, and writes one next word.

Attention gives nothing, so that a token is followed by what its own neurons write. Embeddings are
orthogonal: there are 64 words at most. All other neurons are silent.
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from vesicle.families import find_family

WIDTH, LAYERS, FFN = 64, 4, 40
SIZE = LAYERS * FFN


def word_level(words: list[str]) -> Tokenizer:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def planted(words: list[str], plan: dict[int, tuple[str | set[str], str | None]]):
    """A Llama in which neuron number n (layer * FFN + index) fires at a word, and writes another.

    One that writes is enough to have its word follow, whatever others are silenced.

    Args:
        words: The vocabulary.
        plan: By neuron, the word at which it fires, or several, its gate being below 0 at all
            others; and the word that it writes, if any.
    """
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=FFN,
        vocab_size=len(words),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    family = find_family(config)
    with torch.no_grad():
        drawn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
        table = torch.linalg.qr(drawn).Q[: len(words)]
        model.get_input_embeddings().weight.copy_(table)
        for layer in family.layers(model):
            own = family.modules(layer)
            own.out.weight.zero_()
            for linear in (*own.ffn_in, own.ffn_out):
                linear.weight.zero_()
        for number, (at, write) in plan.items():
            own = family.modules(family.layers(model)[number // FFN])
            i = number % FFN
            if isinstance(at, str):
                row = table[words.index(at)]
            else:
                row = sum((2 * (word in at) - 1) * table[k] for k, word in enumerate(words))
            for linear in own.ffn_in:
                linear.weight[i] = row
            if write is not None:
                own.ffn_out.weight[:, i] = 0.02 * table[words.index(write)]
    return model


def save(model, words: list[str], folder: Path) -> Path:
    """As a folder that a command can load."""
    model.save_pretrained(folder)
    word_level(words).save(str(folder / "tokenizer.json"))
    return folder
