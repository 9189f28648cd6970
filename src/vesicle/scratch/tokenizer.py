"""A small byte-level BPE vocabulary, learnt from the texts that a decoder will be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<end>"
"""Ends a text; id 0."""


def learn_tokenizer(documents: Sequence[str], vocabulary: int) -> Tokenizer:
    """Learn one. The same documents give the same tokenizer.

    Args:
        documents: Texts.
        vocabulary: Most tokens, the 256 bytes and `END` included.

    Raises:
        ValueError: There is no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < 257:
        raise ValueError(f"vocabulary is {vocabulary}; allowed: 257 and above")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
