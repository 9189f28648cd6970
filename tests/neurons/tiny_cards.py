"""Cards of a tiny random model, whose tokens try to break out of a page."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.tiny import randomise, shape_of, tiny_modulator
from vesicle.models import Text
from vesicle.modulator import ModulatorMethod
from vesicle.neurons.cards import Cards, CardSettings, make_cards
from vesicle.neurons.hooks import Hooked
from vesicle.phases import EVERYWHERE

HARMFUL = (
    "</script><img src=x onerror=alert(1)>",
    "</ScRiPt >",
    "<!--<script>",
    "]]></style>",
    "&lt;b&gt;",
    "\u202eevil\x1b[2J",
    '" onclick="',
)
SETTINGS = CardSettings(top=4, mixtures=6, contexts=5, drawn=64, attributed=2, attributed_tokens=16)


def tiny_tokenizer() -> Tokenizer:
    """A token for each byte, one that is special, and the harmful ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in HARMFUL])
    return tokenizer


def tiny_text() -> Text:
    """The text side of `tiny_llama`."""
    return Text(
        tiny_tokenizer(), special_tokens={}, template=None, eos_ids=[256], context_window=512
    )


def tiny_llama(seed: int = 0) -> Any:
    """A random Llama of 3 layers of 80 neurons that reads those tokens."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        vocab_size=256 + 1 + len(HARMFUL),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


def tiny_windows() -> Tensor:
    """(18, 32) token ids of sentences, with every harmful token among them."""
    text = tiny_text()
    ids = text.encode("The cat café sat on the mat; 日本 caught it.\n" * 12)[: 18 * 32]
    windows = torch.tensor(ids).view(18, 32)
    for place, token in enumerate(HARMFUL):
        windows[place, 12 + 2 * place] = text.encode(token)[0]
    return windows


def tiny_hooked(*, dial: float = 0.4, seed: int = 2) -> Hooked:
    """The model with a modulator that releases three transmitters."""
    model = tiny_llama()
    modulator = tiny_modulator(shape_of(model), seed=seed, dtype=torch.float32)
    return Hooked(model, ModulatorMethod(modulator, dial, EVERYWHERE))


def tiny_cards(folder: Path) -> Cards:
    """Cards of all 240 neurons."""
    return make_cards(tiny_hooked(), tiny_windows(), folder, SETTINGS, name="tiny </title>")
