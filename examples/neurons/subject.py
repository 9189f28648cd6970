"""The default model and its modulator; or with --tiny random ones that need no download."""

import sys

import torch


def subject():
    """A model, a modulator for it, and a function from text to token ids."""
    if "--tiny" in sys.argv:
        return _tiny()
    from transformers import AutoModelForCausalLM

    from vesicle import Text, load_default_modulator, resolve_model

    folder = resolve_model(None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, load_default_modulator(), Text.from_folder(folder).encode


def _tiny():
    from vesicle import Modulator
    from vesicle.families import find_family
    from vesicle.scratch import DecoderSize, new_decoder

    size = DecoderSize(
        vocabulary=256, width=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn=64, context=256
    )
    model = new_decoder(size, seed=0)
    shape = find_family(model.config).decoder_config(model.config).shape
    modulator = Modulator.new(shape)
    with torch.no_grad():  # an untrained one releases the same level everywhere
        for parameter in modulator.predictor.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, modulator, lambda text: list(text.encode())
