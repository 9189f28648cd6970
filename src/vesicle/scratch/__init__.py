"""Small decoders trained from scratch, on which a study can afford every variant and seed."""

from vesicle.scratch.decoder import DecoderSize, new_decoder
from vesicle.scratch.tokenizer import learn_tokenizer
from vesicle.scratch.training import Recipe, draw, fit

__all__ = ["DecoderSize", "Recipe", "draw", "fit", "learn_tokenizer", "new_decoder"]
